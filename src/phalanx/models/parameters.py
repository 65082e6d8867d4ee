"""A model's parameters by name, as programs that read or write weights get them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from phalanx.errors import UserError


class Parameters(Mapping[str, Tensor]):
    """Names and tensors. Experts that are held in 4 bits have a name, and asking for one is a UserError."""

    def __init__(self, tensors: Mapping[str, Tensor], in_four_bits: frozenset[str]) -> None:
        self._tensors = tensors
        self._in_four_bits = in_four_bits

    def __getitem__(self, name: str) -> Tensor:
        if name in self._in_four_bits:
            raise UserError(
                f"{name} is held in 4 bits, and can be neither read nor written to: start with --dequantise-weights"
            )
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._in_four_bits

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._in_four_bits

    def __len__(self) -> int:
        return len(self._tensors) + len(self._in_four_bits)

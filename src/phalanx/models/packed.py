"""Weights laid out as a CPU's matrix kernels want them.

oneDNN multiplies by blocks of a weight that stand in the order in which it reads them. Given a plain weight, it copies
every block there first, in every product. A packed weight was copied once; and layers that multiply the same input
(q, k and v; gate and up) become one product. docs/decisions/0011 has the measurements, and who owns which memory.

Shape suffixes: T tokens, I inputs, O outputs of all layers of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from phalanx.errors import UserError
from phalanx.models.packed_memory import PackedMemory, PackedPlace

Keep = Callable[[int, Tensor], Tensor]
"""Copy a packed weight, the one of this number, to its place, and give the one that lies there."""

Release = Callable[[Sequence[str]], None]
"""Give back the memory of these parameters. They read as zeros from now on, and take memory again when written to."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch can multiply by packed weights of the type."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Packable(Protocol):
    """Weights that can be packed. They begin plain."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The plain weights, by parameter names: not read while they are packed."""

    @property
    def biases(self) -> Sequence[Tensor]:
        """What is copied with them, and stays."""

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """How many packed weights there are, and their [O, I]."""

    def pack(self, keep: Keep | None = None) -> None:
        """Copy the weights into packed ones; with `keep` these lie where it puts them."""

    def use(self, packed: Sequence[Tensor]) -> None:
        """Compute by these, which were packed before."""

    def unpack(self) -> None:
        """Write the weights back where they were, bit for bit."""

    def forget(self) -> None:
        """Compute by the plain weights, whatever these hold by now."""


class Linear(NamedTuple):
    """A linear layer's name and parameters. The weight is [outputs, I]."""

    name: str
    weight: Tensor
    bias: Tensor | None = None


class Product:
    """What one or several linear layers make of the same input. It begins with the plain weights."""

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self._packed: Tensor | None = None
        self._bias_O: Tensor | None = None
        self._splits = [layer.weight.shape[0] for layer in layers]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By the names of their parameters."""
        return {f"{layer.name}.weight": layer.weight for layer in self.layers}

    @property
    def biases(self) -> Sequence[Tensor]:
        """Those of the layers that have one."""
        return [layer.bias for layer in self.layers if layer.bias is not None]

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """One [O, I]."""
        return 1, sum(self._splits), self.layers[0].weight.shape[1]

    def pack(self, keep: Keep | None = None) -> None:
        """Copy the weights into a packed one. The plain ones are not read any more, and may be lost."""
        weights = [layer.weight for layer in self.layers]
        packed = torch.ops.mkldnn._reorder_linear_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
        self.use([packed if keep is None else keep(0, packed)])

    def use(self, packed: Sequence[Tensor]) -> None:
        """Compute by this one, and the biases as they are now."""
        (self._packed,) = packed
        if any(layer.bias is not None for layer in self.layers):
            self._bias_O = torch.cat(
                [
                    layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
                    for layer in self.layers
                ]
            )

    def unpack(self) -> None:
        """Write the weights back where they were, bit for bit, and use those."""
        assert self._packed is not None
        plain_OI = self._packed.to_dense()
        for layer, part in zip(self.layers, plain_OI.split_with_sizes(self._splits), strict=True):
            layer.weight.copy_(part)
        self.forget()

    def forget(self) -> None:
        """Use the plain weights, whatever they hold by now."""
        self._packed = self._bias_O = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., T, I] to [..., T, outputs] of each layer."""
        if self._packed is None:
            return [functional.linear(x, layer.weight, layer.bias) for layer in self.layers]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias_O, "none", [], "")
        return (out,) if len(self.layers) == 1 else out.split_with_sizes(self._splits, dim=-1)


class Packing:
    """The weights of a model: packed while it computes, plain while somebody reads or writes them.

    With a PackedMemory the packed weights, and whether a product's weights are packed, are shared with all processes
    that have it. One of them may step or write to weights at a time. The one after it finds, whenever the one before
    was killed, each product either packed or plain, and what was written to weights before.
    """

    def __init__(
        self, products: Sequence[Packable], release: Release, *, kept: str, memory: PackedMemory | None = None
    ) -> None:
        """The parameter `kept` is read by others too, and never released."""
        self._products = tuple(products)
        self._release = release
        self._kept = kept
        self._places = [_place(product, memory) if memory is not None else None for product in products]
        size = 1 + len(products)
        state = memory.state(size) if memory is not None else np.zeros(size, dtype=np.int64)
        self._is_packed_P = state[1:]
        """Of each product: a packed weight counts from then on, a plain one until then."""
        self._num_lent = state[:1]
        """How often weights were made plain for somebody: then nothing counts that was made of them before."""
        self._seen: int | None = None
        """That number when this process had them packed; None if it has not."""
        self._lent: list[tuple[str, Tensor]] = []
        self._returned: list[tuple[str, Tensor, int]] = []
        """Tensors that were lent the last time, with their versions when the weights were packed after that."""

    @property
    def duplicate_bytes(self) -> int:
        """What packed weights take beside plain ones that are kept."""
        return sum(
            weight.nbytes
            for product in self._products
            for name, weight in product.weights.items()
            if name == self._kept
        )

    def prepare(self) -> None:
        """Take over what others have packed, and write nothing: they may be at it. The first step does what is left."""
        seen = int(self._num_lent[0])
        if self._is_packed_P.all():
            for product, place in zip(self._products, self._places, strict=True):
                assert place is not None
                product.use(place.found())
            self._seen = seen

    def pack(self) -> None:
        """Get ready for a step. Raises UserError if what was lent for the time before an earlier step was written to.

        Lent tensors of packed weights are empty from now on.
        """
        for name, tensor, version in self._returned:
            if tensor._version != version:
                raise UserError(f"{name} was written to after a step began: ask named_parameters() for it again")
        if self._seen == self._num_lent[0]:
            return
        for i, (product, place) in enumerate(zip(self._products, self._places, strict=True)):
            if self._is_packed_P[i]:
                assert place is not None, "packed by somebody else"
                product.use(place.found())
            else:
                product.pack(place.keep if place is not None else None)
                self._is_packed_P[i] = 1  # before the plain ones are lost
                self._release([name for name in product.weights if name != self._kept])
        self._seen = int(self._num_lent[0])
        for _, tensor in self._lent:
            tensor.set_(torch.empty(0, dtype=tensor.dtype))  # type: ignore[call-overload]
        self._returned = [(name, tensor, tensor._version) for name, tensor in self._lent]
        self._lent = []

    def find(self) -> None:
        """Other weights lie in the memory by now, packed by whoever had it before."""
        assert self._is_packed_P.all() and not self._lent
        self._seen = None
        self.pack()

    def forget(self) -> None:
        """From now on what the plain weights hold counts, and `pack` packs it: others are to be written there."""
        for product in self._products:
            product.forget()
        self._is_packed_P[:] = 0
        self._num_lent[0] += 1

    @property
    def names(self) -> Sequence[str]:
        """Of the memory from the allocator that packed weights lie in."""
        return [place.name for place in self._places if place is not None and place.is_open]

    def lend(self, parameters: Mapping[str, Tensor]) -> None:
        """Make these hold the weights until the next step, which packs what is in them then."""
        for i, (product, place) in enumerate(zip(self._products, self._places, strict=True)):
            if self._is_packed_P[i]:
                if self._seen != self._num_lent[0]:
                    assert place is not None, "packed by somebody else"
                    product.use(place.found())
                product.unpack()
                self._is_packed_P[i] = 0  # not before the plain ones are whole
        self._num_lent[0] += 1
        packed = {
            part.data_ptr() for product in self._products for part in (*product.weights.values(), *product.biases)
        }
        self._lent += [(name, tensor) for name, tensor in parameters.items() if tensor.data_ptr() in packed]


def _place(product: Packable, memory: PackedMemory) -> PackedPlace:
    name, weight = next(iter(product.weights.items()))
    return PackedPlace(name, product.packed_shape, weight.dtype, memory)

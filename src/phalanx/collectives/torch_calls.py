"""What a call of torch.distributed is, as far as all members of its group must agree on it.

Not the reduction (where a call comes from C++ it cannot be read), nor a shape: the backends move elements. Sizes that
may differ between members are left out as well: those of an all_to_all, and of single parts of lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.collectives.descriptor import dtype_name
from phalanx.ledger.program import ALL_MEET

_ROOTED = {"broadcast": "from", "reduce": "to", "gather": "to", "scatter": "from"}
_ONE_WAY = "send/recv"
_ANY = -1


class Call(NamedTuple):
    """A collective, or one end of a send and receive."""

    operation: str
    """By its name in torch.distributed; of both ends of a message the same one, as they are one operation."""
    device: str
    dtype: torch.dtype | None = None
    num_elements: int = _ANY
    """-1 if members may differ."""
    root: int = _ANY
    """A rank of the group, -1 if there is none."""
    source: int = _ANY
    """Of a send: a rank of the group, -1 if it is this one."""
    destination: int = _ANY
    tag: int = 0

    @property
    def is_one_way(self) -> bool:
        return self.operation == _ONE_WAY

    def text(self, ranks: Sequence[int]) -> str:
        """In words; `ranks` are the group's."""
        said = self.operation
        if self.dtype is not None:
            number = f" {self.num_elements}" if self.num_elements >= 0 else ""
            said += f" of{number} {dtype_name(self.dtype)}"
        if self.root >= 0:
            said += f" {_ROOTED[self.operation]} rank {ranks[self.root]}"
        return said

    def digest(self, text: str) -> int:
        """64 bits for its text. One of them says whether nobody gets through before all have come."""
        number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        all_meet = not self.is_one_way and self.root < 0
        return number | ALL_MEET if all_meet else number & ~ALL_MEET


def _of(operation: str, tensors: Any, root: Any = _ANY) -> Call:
    x = tensors if isinstance(tensors, Tensor) else tensors[0]
    return Call(operation, x.device.type, x.dtype, x.numel(), root if isinstance(root, int) else root.rootRank)


def _of_many(operation: str, tensors: Sequence[Tensor]) -> Call:
    x = tensors[0]
    return Call(operation, x.device.type, x.dtype, sum(one.numel() for one in tensors))


def _of_any_size(operation: str, tensors: Any) -> Call:
    return _of(operation, tensors)._replace(num_elements=_ANY)


def _of_no_tensor(operation: str, where: Any = None) -> Call:
    device = getattr(where, "device", None)
    return Call(operation, "cpu" if device is None else device.type)


def _sent(tensors: Sequence[Tensor], destination: int, tag: int = 0) -> Call:
    return _of(_ONE_WAY, tensors)._replace(destination=destination, tag=tag)


def _received(tensors: Sequence[Tensor], source: int, tag: int = 0) -> Call:
    return _of(_ONE_WAY, tensors)._replace(source=source, tag=tag)


METHODS: Mapping[str, Callable[..., Call]] = {
    "allreduce": lambda tensors, *_: _of("all_reduce", tensors),
    "allreduce_coalesced": lambda tensors, *_: _of_many("all_reduce_coalesced", tensors),
    "broadcast": lambda tensors, root, *_: _of("broadcast", tensors, root),
    "reduce": lambda tensors, root, *_: _of("reduce", tensors, root),
    "allgather": lambda outs, *_: _of_many("all_gather", outs[0]),
    "_allgather_base": lambda _, x, *__: _of("all_gather_into_tensor", x),
    "all_gather_single": lambda _, x, *__: _of("all_gather_into_tensor", x),
    "allgather_coalesced": lambda _, tensors, *__: _of_many("all_gather_coalesced", tensors),
    "allgather_into_tensor_coalesced": lambda _, tensors, *__: _of_many("all_gather_into_tensor_coalesced", tensors),
    "all_gather_single_coalesced": lambda _, tensors, *__: _of_many("all_gather_into_tensor_coalesced", tensors),
    "gather": lambda _, tensors, root, *__: _of("gather", tensors, root),
    "scatter": lambda outs, _, root, *__: _of("scatter", outs, root),
    "reduce_scatter": lambda _, ins, *__: _of_many("reduce_scatter", ins[0]),
    "_reduce_scatter_base": lambda _, x, *__: _of("reduce_scatter_tensor", x),
    "reduce_scatter_single": lambda _, x, *__: _of("reduce_scatter_tensor", x),
    "reduce_scatter_tensor_coalesced": lambda _, ins, *__: _of_many("reduce_scatter_tensor_coalesced", ins),
    "reduce_scatter_single_coalesced": lambda _, ins, *__: _of_many("reduce_scatter_tensor_coalesced", ins),
    "alltoall_base": lambda _, x, *__: _of_any_size("all_to_all_single", x),
    "all_to_all_single": lambda _, x, *__: _of_any_size("all_to_all_single", x),
    "alltoall": lambda _, ins, *__: _of_any_size("all_to_all", ins),
    "barrier": lambda opts=None, *_: _of_no_tensor("barrier", opts),
    "monitored_barrier": lambda *_, **__: _of_no_tensor("monitored_barrier"),
    "send": lambda tensors, destination, tag=0, *_: _sent(tensors, destination, tag),
    "recv": lambda tensors, source, tag=0, *_: _received(tensors, source, tag),
}
"""What a call of a method of a ProcessGroup is, from its arguments. Some have another name from torch 2.13 on. Who
receives from anybody (`recv_anysource`) has no peer that could be blamed."""


class Operator(NamedTuple):
    """An operator `c10d::...`, to which each method leads, and all that is called from C++."""

    method: str
    group: int
    """Which of its arguments the group is."""
    arguments: tuple[int, ...]
    """Which of them are those of the method."""


OPERATORS: Mapping[str, Operator] = {
    "allreduce_": Operator("allreduce", 1, (0,)),
    "allreduce_coalesced_": Operator("allreduce_coalesced", 1, (0,)),
    "broadcast_": Operator("broadcast", 1, (0, 2)),
    "reduce_": Operator("reduce", 1, (0, 3)),
    "allgather_": Operator("allgather", 2, (0,)),
    "_allgather_base_": Operator("_allgather_base", 2, (0, 1)),
    "allgather_coalesced_": Operator("allgather_coalesced", 2, (0, 1)),
    "allgather_into_tensor_coalesced_": Operator("allgather_into_tensor_coalesced", 2, (0, 1)),
    "gather_": Operator("gather", 2, (0, 1, 3)),
    "scatter_": Operator("scatter", 2, (0, 1, 3)),
    "reduce_scatter_": Operator("reduce_scatter", 2, (0, 1)),
    "_reduce_scatter_base_": Operator("_reduce_scatter_base", 2, (0, 1)),
    "reduce_scatter_tensor_coalesced_": Operator("reduce_scatter_tensor_coalesced", 2, (0, 1)),
    "alltoall_": Operator("alltoall", 2, (0, 1)),
    "alltoall_base_": Operator("alltoall_base", 2, (0, 1)),
    "barrier": Operator("barrier", 1, (0,)),
    "send": Operator("send", 1, (0, 2, 3)),
    "recv_": Operator("recv", 1, (0, 2, 3)),
}

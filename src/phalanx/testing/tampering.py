"""A collective that is left out or done otherwise: what a rank then issues, and what it goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phalanx.collectives.descriptor import Descriptor, Operation, dtype_name
from phalanx.collectives.group import Group

Call = Callable[..., Any]
"""An operation of a group."""

_OTHER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.int32: torch.int64}


def describe(operation: Operation, args: tuple[Any, ...], named: dict[str, Any]) -> str:
    """As journals have it (collectives/journaled.py)."""
    if operation == "barrier":
        return str(Descriptor("barrier"))
    x: Tensor = args[0]
    shape, argument = tuple(x.shape), 0
    if operation == "all_gather":
        argument = (args[1] if len(args) > 1 else named.get("dim", -1)) % x.dim()
    elif operation == "broadcast":
        argument = args[1] if len(args) > 1 else named["src"]
    elif operation == "all_to_all":
        shape = shape[1:]
    return str(Descriptor(operation, dtype_name(x.dtype), shape, argument))


def without(operation: Operation, size: int, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a rank that leaves the collective out goes on with: of the right shape, with its own data or none."""
    if operation == "barrier":
        return None
    x: Tensor = args[0]
    if operation == "all_gather":
        return torch.cat([x] * size, args[1] if len(args) > 1 else named.get("dim", -1))
    if operation == "reduce_scatter":
        return x[: len(x) // size].clone()
    if operation == "all_to_all":
        return x.new_zeros(sum(args[2]), *x.shape[1:])
    return x


def other_shape(x: Tensor) -> Tensor:
    """One column less, or one more if there is but one."""
    return x[..., :-1].contiguous() if x.shape[-1] > 1 else torch.cat([x, x], -1)


def other_dtype(x: Tensor) -> Tensor:
    """The same numbers in another type."""
    return x.to(_OTHER.get(x.dtype, torch.float32))


def swapped(group: Group, operation: Operation, x: Tensor) -> tuple[Operation, tuple[Any, ...], Call]:
    """Another operation on the same tensor."""
    if operation == "all_reduce":
        return "all_gather", (x, 0), group.all_gather
    return "all_reduce", (x.clone(),), group.all_reduce

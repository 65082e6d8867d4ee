"""Ranks that agree on each collective before any of them issues it: the guard for groups that do not compare.

It costs a meeting for every collective, and lets nobody run ahead. NCCL's ranks, whose host otherwise waits for nobody,
meet on the host.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import torch

from phalanx.collectives.descriptor import Descriptor
from phalanx.collectives.exchange import Exchange
from phalanx.collectives.lockstep import Lockstep
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import CollectiveMismatchError


class Agreement(Protocol):
    """This rank's place among those that agree. For the use of one thread."""

    def agree(self, descriptor: Descriptor) -> None:
        """Return when all members are about to issue this.

        Raises CollectiveMismatchError saying what each is about to issue, DeadlineError or PeerDiedError naming who
        does not come within the group's `timeout_s`; every later call raises that again.
        """
        ...

    def close(self) -> None:
        """Leave; a peer that waits for this rank is told. Never blocks. May be repeated."""
        ...


class SharedAgreement:
    """Of ranks on one host, in shared memory."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        """Blocks until all members are there. Raises what `Lockstep` raises."""
        assert spec.agreement is not None
        self._lockstep = Lockstep(msgspec.structs.replace(spec, rendezvous=spec.agreement, slot_bytes=0), rank)

    def agree(self, descriptor: Descriptor) -> None:
        self._lockstep.issue(descriptor)
        self._lockstep.arrive()

    def close(self) -> None:
        self._lockstep.close()


class SpanningAgreement:
    """Of ranks on several hosts: all tell each other over connections of their own."""

    def __init__(self, spec: GroupSpec, rank: int, exchange: Exchange) -> None:
        """Blocks until all members are there. Raises what `SpanningGroup` raises."""
        # torch.distributed takes a while to import, and most groups do without it.
        from phalanx.collectives.spanning import SpanningGroup

        told = msgspec.structs.replace(spec, name=f"agreement of {spec.name}", backend="gloo", runs_ahead=False)
        self._spec = spec
        self._group = SpanningGroup(told, rank, exchange)
        self._sequence = 0
        self._failure: CollectiveMismatchError | None = None

    def agree(self, descriptor: Descriptor) -> None:
        if self._failure is not None:
            raise self._failure
        self._sequence += 1
        mine = torch.frombuffer(bytearray(descriptor.encoded), dtype=torch.uint8)
        met = [bytes(of_rank.tolist()) for of_rank in self._group.all_gather(mine).view(self._spec.size, -1)]
        if len(set(met)) > 1:
            who = "; ".join(
                f"rank {rank} is in {Descriptor.decode(encoded)}"
                for rank, encoded in zip(self._spec.ranks, met, strict=True)
            )
            where = f"sequence {self._sequence} of group {self._spec.name}, epoch {self._spec.epoch}"
            self._failure = CollectiveMismatchError(f"at {where}: {who}")
            raise self._failure

    def close(self) -> None:
        self._group.close()


def agreement(spec: GroupSpec, rank: int, exchange: Exchange | None) -> Agreement | None:
    """Of a group whose ranks agree; None for others. Blocks until all members are there, and raises as they do."""
    if not spec.agrees or spec.size == 1:
        return None
    if not spec.spans_hosts:
        return SharedAgreement(spec, rank)
    assert exchange is not None
    return SpanningAgreement(spec, rank, exchange)

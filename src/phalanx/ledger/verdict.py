"""Who is to blame, and how that is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from phalanx.ledger.look import Standing

Cause = Literal[
    "gone",
    "lost",
    "diverged",
    "stopped",
    "gil",
    "skipped",
    "late",
    "slow",
    "behind",
    "circle",
    "hung",
    "store",
    "overdue",
]
"""gone: its process has ended. lost: nothing is heard of its node. diverged: it follows another plan than its peers, or
is in another collective. stopped: by a signal. gil: a call into C keeps its GIL. skipped: it has left a step without a
collective that its peers are in. late: it is in the step that its peers are in, or still in one before it, does not
come to the collective that they wait in, and is not known to compute. slow: it computes, in such a step or before it.
behind: it is in no step, has not begun the one that its peers are in, or have left, and is not known to compute.
circle: ranks wait for each other in different groups. hung: all have come to a collective and it does not end. store:
it does not answer, so ranks cannot join. overdue: it takes too long for what it says that it does."""

HOPELESS: frozenset[Cause] = frozenset({"diverged", "skipped", "circle"})
"""What ranks that live do not get out of by themselves."""

WAITED: frozenset[Cause] = frozenset({"skipped", "late", "slow", "behind", "circle", "hung"})
"""What is told only when somebody has waited for long."""

_STARVED_SHARE = 0.1
"""Of a wait. Threads that sleep and wake have to wait for a core now and then, but not for so long."""

_LINES_SHOWN = 6


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong first, and with whom."""

    cause: Cause
    culprits: tuple[int, ...]
    """Ranks. Several only where it cannot be told which; none where it is no rank: the store, or what carries data."""
    nodes: tuple[str, ...]
    """Of the culprits."""
    what: str
    """What was seen of the culprit, in words that follow its name; a whole sentence if there is no culprit."""
    step: int | None = None
    group: str | None = None
    sequence: int | None = None
    theirs: str | None = None
    """The collective of the culprit, if there is one."""
    peers: str | None = None
    """The collective that its peers are in."""
    waiting: tuple[int, ...] = ()
    """Ranks that wait for it."""
    waited_s: float = 0.0
    starved_s: float = 0.0
    """For how long of that those who are waited for had no core."""
    stacks: dict[int, tuple[str, ...]] = {}
    """Of the culprits and of one who waits, as far as they answered: lines of Python, innermost first."""
    standings: dict[int, Standing] = {}
    """What every rank was doing, and because of whom."""

    @property
    def is_hopeless(self) -> bool:
        """Whether waiting is of no use, though all ranks are there."""
        return self.cause in HOPELESS

    @property
    def is_final(self) -> bool:
        """Whether the run is over, so that no other verdict can follow. Who is late or stopped may still come."""
        return self.is_hopeless or self.cause == "gone"

    @property
    def is_of_a_wait(self) -> bool:
        """Whether it is told only when somebody has waited for long. Of a node that is there, but not watched, too."""
        return self.cause in WAITED or (self.cause == "lost" and self.sequence is not None)

    @property
    def is_of_a_busy_host(self) -> bool:
        """Whether those who are waited for may just have too little of a core: then they come when they get it."""
        return self.is_of_a_wait and self.starved_s >= _STARVED_SHARE * self.waited_s > 0

    @property
    def is_ambiguous(self) -> bool:
        return len(self.culprits) > 1 and self.cause != "lost"

    def __str__(self) -> str:
        """One paragraph, the culprit first; then where the ranks are."""
        said = f"{self._names()} {self.what}".lstrip()
        if self.is_ambiguous:
            said += "; which of them is wrong cannot be told"
        if self.waiting:
            ranks = ", ".join(map(str, self.waiting))
            said += f"; rank{'s' if len(self.waiting) > 1 else ''} {ranks} waited for {self.waited_s:.2f} s"
            said += f" in {self.peers}" if self.peers else ""
        if self.sequence is not None:
            step = f"step {self.step}, " if self.step is not None else ""  # a program of others need not have steps
            said += f" ({step}sequence {self.sequence} of group {self.group})"
        for rank, lines in self.stacks.items():
            said += f"\n  rank {rank} is at" + "".join(f"\n    {line}" for line in lines[:_LINES_SHOWN])
        return said

    def _names(self) -> str:
        ranks = [f"rank {rank}" for rank in self.culprits]
        if self.cause == "lost":
            by_node = {node: [r for r, n in zip(ranks, self.nodes, strict=True) if n == node] for node in self.nodes}
            return " and ".join(f"node {node} ({', '.join(of_node)})" for node, of_node in by_node.items())
        there = zip(ranks, self.nodes, strict=True)
        return " or ".join(f"{rank} on {node}" if node else rank for rank, node in there)  # a file may not say where


class Suspect(Protocol):
    """A rank of ours, or of a program that is not ours."""

    @property
    def rank(self) -> int: ...

    @property
    def node(self) -> str: ...


class Place(NamedTuple):
    """Where ranks have met, or should have."""

    step: int | None = None
    group: str | None = None
    sequence: int | None = None
    theirs: str | None = None
    """The collective of the culprit, if there is one."""
    peers: str | None = None
    """The collective that its peers are in."""


class Waiting(NamedTuple):
    """Who waits, and for how long the first of them has."""

    ranks: Sequence[int] = ()
    for_s: float = 0.0

    def but(self, rank: int) -> Waiting:
        """The same, without one of them."""
        return self._replace(ranks=[one for one in self.ranks if one != rank])


_NOWHERE, _NOBODY = Place(), Waiting()


def blame(
    cause: Cause, culprits: Sequence[Suspect], what: str, place: Place = _NOWHERE, waiting: Waiting = _NOBODY
) -> Verdict:
    """The verdict on these, in words that follow their names."""
    return Verdict(
        cause=cause,
        culprits=tuple(one.rank for one in culprits),
        nodes=tuple(one.node for one in culprits),
        what=what,
        waiting=tuple(waiting.ranks),
        waited_s=waiting.for_s,
        **place._asdict(),
    )

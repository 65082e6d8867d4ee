"""What befalls an engine that heals, from a seed: faults of its ranks, and the end of what else there is. Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from phalanx.errors import ConfigError
from phalanx.testing.faults import KINDS, LATER, OF_A_PROCESS, Fault, Kind, State, World

End = Literal[
    "kill-standby",
    "kill-both",
    "kill-lines",
    "kill-switch",
    "kill-reload",
    "kill-resize",
    "kill-watcher",
    "kill-owner",
    "kill-engine",
    "kill-server",
]
"""Of a rank that stands ready; of a rank and of one that stands ready, at once; of the process that has started all
ranks, and so of all lines; of a rank, and of one of those that come after it, or stand ready, while these take over; of
a rank while weights are reloaded; of a rank, of this line or of the next, during a resize; of the ledger's watchers; of
the process that holds the memory of a node's ranks (with Ray: elsewhere that is the engine's); of the engine's; of the
server's, with which all ends (serving.py)."""

BlowKind = Kind | End
Moment = State | Literal["any"]
"""any: whatever the ranks do then, by a signal from outside."""

ENDS: tuple[End, ...] = get_args(End)
BLOW_KINDS: tuple[BlowKind, ...] = (*(kind for kind in KINDS if kind != "store"), *ENDS)
"""A store is of no use but at a start: what hurts one while others serve is kill-switch."""
MOMENTS: tuple[Moment, ...] = ("any", "idle", "prefill", "decode")

_BY_SIGNAL: frozenset[BlowKind] = frozenset({"kill", "stop", *ENDS})
_LATEST = 0.8
"""Of the tokens of all streams, a blow comes after so many at the latest."""
_LONG_S = 60.0
_LOOP_S = 2.0
"""Who computes is left alone: it goes on after that."""
_TIES: frozenset[BlowKind] = frozenset({"skip", "extra", "swap", "shape", "dtype", "early-return", "reorder"})
"""Where two ranks differ, and nothing tells which of them is wrong."""

_TAKES: dict[str, str] = {
    "kill-standby": "--standby 1",
    "kill-both": "--standby 1",
    "kill-lines": "ranks without Ray",
    "kill-owner": "--launcher ray",
    "kill-resize": "several ranks that share layers or experts",
    "kill-server": "a server of its own (benchmarks/kills.py)",
}
_TWICE: frozenset[BlowKind] = frozenset({"kill-both", "kill-switch"})
"""Two are killed, maybe before anybody has noticed the first."""
OF_NO_RANK: frozenset[BlowKind] = frozenset({"kill-lines", "kill-watcher", "kill-engine", "kill-server"})

_FOR_MEMORY = "the kernel has killed"
_NAMED = re.compile(r"rank (\d+)")


class Blow(msgspec.Struct, frozen=True, kw_only=True):
    """One, in a round of streams."""

    kind: BlowKind
    rank: int
    state: Moment = "any"
    step: int = 1
    """As in Fault."""
    collective: int = 0
    after: float = 0.0
    """It is prepared when so much of the tokens of all streams has come: a share. Not in state idle."""

    @property
    def fault(self) -> Fault | None:
        """What the rank does to itself; None if it is hurt from outside."""
        if self.state == "any":
            return None
        seconds = _LOOP_S if self.kind == "loop" else _LONG_S
        kind: Kind = self.kind  # type: ignore[assignment]  # the others come at any moment
        return Fault(
            kind=kind, rank=self.rank, state=self.state, step=self.step, collective=self.collective, seconds=seconds
        )

    @property
    def ends_a_line(self) -> bool | None:
        """Whether ranks are ended for it; None if that depends."""
        if self.kind == "loop":  # it goes on
            return None
        if self.kind in _TWICE or self.kind in ("kill-reload", "kill-resize"):  # or an order fails, and no line
            return None
        return self.kind not in ("kill-standby", "kill-watcher", "kill-engine")

    def __str__(self) -> str:
        if self.kind in OF_NO_RANK:
            return f"{self.kind} after {self.after:.0%}"
        where = f" after {self.after:.0%}" if self.state == "any" else f" in {self.state}"
        return f"{self.kind} of rank {self.rank}{where}"


def blow_of_seed(
    seed: int,
    index: int,
    world: World,
    *,
    has_standby: bool,
    kinds: Sequence[BlowKind] = BLOW_KINDS,
    states: Sequence[Moment] = MOMENTS,
) -> Blow:
    """The same for the same arguments: kinds are uniform, and so are the states of each, and ranks.

    Kinds that cannot happen there are left out. Raises ConfigError if none can.
    """
    possible = {kind: found for kind in kinds if (found := _states(kind, states, world, has_standby=has_standby))}
    if not possible:
        needs = "".join(f"; {kind} takes {_TAKES[kind]}" for kind in kinds if kind in _TAKES)
        allowed = f"none of them can happen here in {', '.join(states)}{needs}"
        raise ConfigError("kinds", ", ".join(kinds), allowed)
    dice = random.Random(f"{seed} {index}")
    kind = dice.choice(sorted(possible))
    return Blow(
        kind=kind,
        rank=dice.randrange(world.size),
        state=dice.choice(possible[kind]),
        step=dice.randint(1, LATER),
        collective=dice.randrange(1000),
        after=dice.uniform(0.0, _LATEST),
    )


def is_named(blow: Blow, fault: str) -> bool:
    """Whether the words for what has ended a line begin with the rank that was hurt, or say why with none."""
    head = fault.partition(":")[0] if blow.kind == "link" else fault
    named = [int(rank) for rank in _NAMED.findall(_culprits(head))]
    if blow.kind in _TWICE or blow.kind in ("kill-lines", "kill-resize"):  # any of several may be seen first
        return bool(named) or "fork server" in fault
    if blow.kind == "kill-owner":  # its ranks end with it
        return bool(named) or fault.startswith("node ")
    if blow.kind == "link" and "to blame is no rank" in fault:
        return True
    if blow.kind == "oom" and _FOR_MEMORY not in fault:
        return False
    return named == [blow.rank] or (blow.kind in _TIES and blow.rank in named and "cannot be told" in fault)


def _culprits(fault: str) -> str:
    """The names with which it begins: `rank 1 on here or rank 2 on here issued ...`."""
    found = re.match(r"(?:rank \d+(?: on \S+)?(?: or |, | and )?)+", fault)
    return found[0] if found else ""


def _states(kind: BlowKind, states: Sequence[Moment], world: World, *, has_standby: bool) -> tuple[Moment, ...]:
    if kind in ENDS:
        is_there = {
            "kill-standby": has_standby,
            "kill-both": has_standby,
            "kill-lines": not world.has_agents,
            "kill-owner": world.has_agents,
            "kill-resize": world.can_shrink,
            "kill-server": False,
        }
        return ("any",) if is_there.get(kind, True) else ()
    if world.why_not(kind) is not None:  # type: ignore[arg-type]
        return ()
    return tuple(state for state in states if _may_be(kind, state))


def _may_be(kind: BlowKind, state: Moment) -> bool:
    if state == "any":
        return kind in _BY_SIGNAL
    return state != "idle" or kind in OF_A_PROCESS

"""Fault plans: what is to go wrong, with whom, and when; from a seed, or from JSON or TOML. No torch here.

[[faults]]
kind = "stop"
rank = 2
state = "prefill"     # or decode (the default), idle, start
step = 3              # the third step with a prompt after the plan was armed
collective = 1        # before the second collective of that step
seconds = 5.0
"""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.testing import memory_limit
from phalanx.topology.grid import Grid

Kind = Literal[
    "kill",
    "oom",
    "stop",
    "wedge",
    "loop",
    "slow",
    "error",
    "skip",
    "extra",
    "swap",
    "shape",
    "dtype",
    "early-return",
    "reorder",
    "link",
    "store",
]
"""kill, stop: by a signal. oom: it takes memory until the kernel kills it for that. wedge: a call into C that holds the
GIL. loop: Python that does not end. slow: it sleeps. error: an exception. The others are collectives: one is left out,
one is issued that nobody else knows of, another operation in its place, another shape, another dtype; a rank that
leaves a layer of experts early, as one does that thinks there is no token for it; and two collectives of two groups in
the other order. link: nothing that is sent to the rank over its connections to other ranks arrives. store: that by
which ranks find each other does not answer."""

State = Literal["idle", "prefill", "decode", "start"]
"""What the ranks do when it happens: wait for work, compute a prompt, compute a token of each request, or start."""

KINDS: tuple[Kind, ...] = get_args(Kind)
OF_A_PROCESS: frozenset[Kind] = frozenset({"kill", "oom", "stop", "wedge", "loop", "error"})
"""What can befall a rank that is in no step."""
OF_A_START: frozenset[Kind] = frozenset({"kill", "stop", "store"})
"""What can be done to a rank from outside, while it joins its peers; the last of them only then."""
LATER = 3
"""A fault from a seed comes within so many steps of its state."""

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Index = Annotated[int, Meta(ge=0, le=1_000_000)]


class World(NamedTuple):
    """Ranks, as far as it matters for what can happen to them."""

    size: int
    has_experts: bool = False
    """Whether experts are shared out to ranks."""
    shares_groups: bool = False
    """Whether two ranks are together in two groups."""
    has_connections: bool = False
    """Whether ranks reach each other over TCP, and nothing else does that one could cut with it."""
    has_agents: bool = False
    """Whether the memory of ranks is held by processes beside the engine's: ranks are actors, on several nodes."""
    can_shrink: bool = False
    """Whether there is a smaller grid to go to while they serve."""
    has_memory_limits: bool = False
    """Whether a process can have one of its own, and be killed for it."""

    @classmethod
    def of(cls, config: Config) -> World:
        """That of an engine on this host."""
        parallel = config.parallel
        together = Counter(
            pair for group in Grid.of(parallel).groups() if not group.is_link for pair in combinations(group.ranks, 2)
        )
        return cls(
            parallel.world_size,
            has_experts=parallel.enable_expert_parallel,
            shares_groups=max(together.values(), default=0) > 1,
            has_connections=config.executor.collective_backend == "gloo" and config.executor.launcher != "ray",
            can_shrink=max(parallel.tensor_parallel_size, parallel.data_parallel_size) > 1,
            has_memory_limits=memory_limit.is_possible(),
        )

    @classmethod
    def unknown(cls, size: int) -> World:
        """Where the ranks themselves refuse what cannot happen to them."""
        return cls(size, has_experts=True, shares_groups=True, has_connections=True, has_memory_limits=True)

    def why_not(self, kind: Kind) -> str | None:
        """Why this cannot happen here; None if it can."""
        if kind == "early-return" and not self.has_experts:
            return "only where experts are shared out to ranks"
        if kind == "reorder" and not self.shares_groups:
            return (
                "only where two ranks are together in two groups, such as tensor parallel ranks that share out experts"
            )
        if kind == "oom" and not self.has_memory_limits:
            return "only where control groups with a limit on memory can be made, as by root"
        if kind == "store" and not self.has_connections:
            return "only where ranks meet through a store: with collective_backend gloo and without Ray"
        if kind == "link" and not self.has_connections:
            return (
                "only over connections that ranks have for themselves: with collective_backend gloo and without Ray,"
                " whose own would be cut as well; between nodes cut the network, such as with ip link set DEVICE down"
            )
        return None


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that goes wrong, once."""

    kind: Kind
    rank: Index
    state: State = "decode"
    step: Count = 1
    """The how many-th step of that state it is, from when the fault is armed. The first step of all is not counted: it
    shows how many collectives there are."""
    collective: Index = 0
    """Before, or at, the how many-th collective of the step it happens; from 0, modulo the number of those that the
    rank takes part in."""
    seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 60.0
    """How long it lasts: stop, wedge, loop, slow, link and store."""

    def __str__(self) -> str:
        where = {"idle": "while idle", "start": "while it starts"}.get(self.state)
        where = where or f"in {self.state} step {self.step}, collective {self.collective}"
        return f"{self.kind} of rank {self.rank} {where}"

    def check(self, world: World) -> None:
        """Raises ConfigError if it cannot happen there."""
        if self.rank >= world.size:
            raise ConfigError("rank", self.rank, f"there are {world.size} ranks, from 0")
        if (why_not := world.why_not(self.kind)) is not None:
            raise ConfigError("kind", self.kind, why_not)
        if self.state == "idle" and self.kind not in OF_A_PROCESS:
            raise ConfigError("kind", self.kind, f"in state idle it must be one of {_list(OF_A_PROCESS)}")
        if self.state != "start" and self.kind == "store":
            raise ConfigError("kind", self.kind, "only in state start: ranks that have joined need no store")
        if self.state == "start" and self.kind not in OF_A_START:
            raise ConfigError("kind", self.kind, f"in state start it must be one of {_list(OF_A_START)}")


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Faults, one after the other, each in a run of its own."""

    faults: tuple[Fault, ...]

    @classmethod
    def of_seed(
        cls,
        seed: int,
        count: int,
        world: World,
        *,
        kinds: Sequence[Kind] = KINDS,
        states: Sequence[State] = ("idle", "prefill", "decode"),
    ) -> FaultPlan:
        """The same faults for the same arguments: ranks and kinds are uniform, and so are the states of each kind.

        Kinds that cannot happen in the world are left out. Raises ConfigError if none can happen in any of the states.
        """
        dice = random.Random(seed)
        possible = {kind: _states(kind, states) for kind in kinds if world.why_not(kind) is None}
        usual = [kind for kind, its_states in possible.items() if its_states]
        if not usual:
            why_not = "; ".join(f"{kind}: {why}" for kind in kinds if (why := world.why_not(kind)) is not None)
            raise ConfigError("kinds", _list(kinds), why_not or f"none of them can happen in {_list(states)}")
        return cls(faults=tuple(_draw(dice, usual, possible, world.size) for _ in range(count)))

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """From JSON, if it begins with a brace, or TOML. Raises ConfigError."""
        try:
            if text.lstrip().startswith("{"):
                return msgspec.json.decode(text, type=cls)
            return msgspec.convert(tomllib.loads(text), cls)
        except (msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError("plan", text[:40], str(error)) from error


def _states(kind: Kind, states: Sequence[State]) -> tuple[State, ...]:
    refused = {"idle": kind not in OF_A_PROCESS, "start": kind not in OF_A_START}
    return tuple(state for state in states if not refused.get(state, kind == "store"))


def _draw(dice: random.Random, kinds: Sequence[Kind], states: dict[Kind, tuple[State, ...]], world_size: int) -> Fault:
    kind = dice.choice(kinds)
    return Fault(
        kind=kind,
        rank=dice.randrange(world_size),
        state=dice.choice(states[kind]),
        step=dice.randint(1, LATER),
        collective=dice.randrange(1000),
    )


def _list(names: Sequence[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names))


class Injected(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank notes just before it does harm: what the verdict should say."""

    at_ns: int
    """Of the host's monotonic clock."""
    step: int = 0
    """The number that the rank's journal has for it."""
    group: str | None = None
    sequence: int | None = None
    """Of the first collective that peers are in without this rank, or that it is in without them."""
    theirs: str | None = None
    """What the rank issues there; None if it issues nothing."""
    peers: str | None = None
    """What its peers issue there; None if it cannot know."""
    is_exact: bool = True
    """False if that may show at a later collective of the step only."""

"""A worker extension that carries out faults. Nothing of it is in the way of a rank before a fault is armed.

It takes the place of `accept` of its worker, which is how it knows of steps, and of the operations of its groups, in
the one rank that is to blame, from the arming on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from phalanx.collectives.descriptor import Operation
from phalanx.errors import ConfigError
from phalanx.protocol.worker import Call, Step
from phalanx.testing import harm, memory_limit, tampering
from phalanx.testing.faults import OF_A_PROCESS, Fault, Injected, State, World
from phalanx.testing.mailbox import receive_faults
from phalanx.worker.methods import remote_method

if TYPE_CHECKING:
    from phalanx.collectives.group import Group
    from phalanx.worker.worker import Worker

IDLE_DELAY_S = 0.05
"""The answer of the call that arms a fault is on its way for less than that."""

_OPERATIONS: tuple[Operation, ...] = (
    *("all_reduce", "all_gather", "broadcast", "barrier", "reduce_scatter", "all_to_all"),
)


class Saboteur:
    """The extension."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        if threading.current_thread() is threading.main_thread():
            receive_faults(self.arm_fault)

    @remote_method
    def arm_fault(self, fault: Fault, report: str) -> bool:
        """Have it happen, once, if it is this rank's. Where it does, `Injected` is appended to the file `report` first.

        Gives whether it is this rank's. Raises ConfigError if it cannot happen here.
        """
        spec = self._worker.spec
        fault.check(World.of(spec.config))
        if fault.state == "start":
            raise ConfigError("state", fault.state, "this rank has started")
        if fault.rank != spec.rank:
            return False
        file = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        armed = _Armed(self._worker, fault, partial(_note, file))
        if fault.state == "idle":
            armed.strike_idle(IDLE_DELAY_S)
        else:
            armed.hook()
        return True


def _note(file: int, injected: Injected) -> None:
    os.write(file, msgspec.json.encode(injected) + b"\n")


class _Issued(NamedTuple):
    """A collective, and how it was asked for."""

    group: Group
    operation: Operation
    issue: tampering.Call
    args: tuple[Any, ...]
    named: dict[str, Any]


class _Armed:
    """One fault in the rank that is to blame for it."""

    def __init__(self, worker: Worker, fault: Fault, note: Callable[[Injected], None]) -> None:
        self._worker = worker
        self._fault = fault
        self._note = note
        self._step = 0
        self._state: State = "idle"
        self._num_steps = 0  # of the fault's state, so far
        self._count = 0  # of this step's collectives, so far
        self._usual_count = 0  # in the step before
        self._layer_starts: list[int] = []  # the collectives that the layers of experts began with
        self._usual_starts: list[int] = []
        self._issued: list[_Issued] = []  # in this step, so far; for what is to be reordered
        self._usual: list[_Issued] = []  # in the step before
        self._early: tuple[int, Any] | None = None  # what was issued before its turn: its place, and what came of it
        self._is_over = False
        self._shift: tuple[str, str] | None = None  # a group, and what its peers do where this rank does the next thing

    def strike_idle(self, delay_s: float) -> None:
        """In the main thread, when the call that armed it has been answered."""
        signal.signal(signal.SIGALRM, lambda *_: self._befall(None, None))
        signal.setitimer(signal.ITIMER_REAL, delay_s)

    def hook(self) -> None:
        """Take the place of what is to be watched."""
        self._worker.accept = partial(self._accept, self._worker.accept)  # type: ignore[method-assign]
        for group in self._worker.groups.values():
            if group.size > 1:
                for operation in _OPERATIONS:
                    setattr(group, operation, partial(self._issue, group, operation, getattr(group, operation)))
        for experts in self._worker.model.experts.values():
            experts.module.forward = partial(self._layer, experts.module.forward)

    def _accept(self, accept: Callable[[Call], None], call: Call) -> None:
        """A call to the worker."""
        if not isinstance(call.body, Step):
            return accept(call)
        self._begin(call.body)
        accept(call)
        if self._shift is not None:  # it leaves the step without what its peers are in
            self._tell_shift(None)
        self._usual_count, self._usual_starts = self._count, self._layer_starts
        self._usual, self._issued, self._early = self._issued, [], None
        return None

    def _begin(self, step: Step) -> None:
        self._step = step.number + 1  # as in the journal, where 0 is no step
        is_prefill = any(plan.shape.num_tokens > plan.shape.num_rows for plan in step.plans)
        self._state = "prefill" if is_prefill else "decode"
        self._count, self._layer_starts = 0, []
        if self._usual_count and self._state == self._fault.state:
            self._num_steps += 1

    def _is_due(self) -> bool:
        return (
            not self._is_over
            and self._usual_count > 0
            and self._state == self._fault.state
            and self._num_steps >= self._fault.step
        )

    def _issue(self, group: Group, operation: Operation, issue: tampering.Call, *args: Any, **named: Any) -> Any:
        """A collective."""
        if self._is_capturing():
            return issue(*args, **named)
        number, self._count = self._count, self._count + 1
        if self._shift is not None and self._shift[0] == group.name:
            self._follow(group, tampering.describe(operation, args, named))
        kind = self._fault.kind
        if kind == "reorder":
            return self._issue_in_order(_Issued(group, operation, issue, args, named), number)
        if kind == "early-return" or not self._is_due() or number != self._fault.collective % self._usual_count:
            return issue(*args, **named)
        what = tampering.describe(operation, args, named)
        if kind == "link":
            self._tell(group, theirs=None, peers=None, is_exact=False)  # who only sends there goes on
            self._is_over = True
            num_cut = harm.silence(self._fault.seconds)
            assert num_cut, "a rank without a connection"
            return issue(*args, **named)
        if kind in OF_A_PROCESS or kind == "slow":
            runs_ahead = self._runs_ahead(group) and operation == "broadcast"
            self._befall(None if runs_ahead else group, what)  # nobody waits there for who receives
            return issue(*args, **named)
        self._is_over = True
        fake = partial(tampering.without, operation, group.size, args, named)
        if kind == "skip":
            self._shift = group.name, what
            self._tell(group, theirs=None, peers=what, is_exact=False)
            return fake()
        if kind == "extra":
            return self._add(group, issue(*args, **named))
        self._alter(group, operation, issue, args, named)
        return fake()

    def _issue_in_order(self, now: _Issued, number: int) -> Any:
        """Or first what comes after it, in another group, as it was in the step before."""
        if self._early is not None and self._early[0] == number:
            return self._early[1]
        self._issued.append(now)
        places = self._places_to_reorder()
        if not (self._is_due() and places and number == places[self._fault.collective % len(places)]):
            return now.issue(*now.args, **now.named)
        self._is_over = True
        later = self._usual[number + 1]
        what, peers = (tampering.describe(one.operation, one.args, one.named) for one in (later, now))
        self._tell(now.group, theirs=what, peers=peers)
        self._early = number + 1, later.issue(*later.args, **later.named)
        return now.issue(*now.args, **now.named)

    def _places_to_reorder(self) -> list[int]:
        """Where in a step a collective is followed by one of another group, and one peer is in both: they then wait for
        each other."""
        members = {spec.name: set(spec.ranks) for spec in self._worker.spec.groups if not spec.runs_ahead}
        names = [one.group.name for one in self._usual]
        return [
            place
            for place, (one, after) in enumerate(pairwise(names))
            if one != after and len(members.get(one, set()) & members.get(after, set())) > 1
        ]

    def _is_capturing(self) -> bool:
        """Whether what is done now goes into a graph: it was done before, in the same step."""
        import torch

        return self._worker.model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _runs_ahead(self, group: Group) -> bool:
        return any(spec.runs_ahead for spec in self._worker.spec.groups if spec.name == group.name)

    def _layer(self, forward: tampering.Call, *args: Any, **named: Any) -> Any:
        """A layer of experts."""
        if self._is_capturing():
            return forward(*args, **named)
        layer = len(self._layer_starts)
        self._layer_starts.append(self._count)
        is_it = self._usual_starts and layer == self._fault.collective % len(self._usual_starts)
        if self._fault.kind != "early-return" or not self._is_due() or not is_it:
            return forward(*args, **named)
        self._is_over = True
        groups = [g for name, g in self._worker.groups.items() if name.startswith(("dp@", "ep@")) and g.size > 1]
        self._tell(groups[0] if groups else None, theirs=None, peers=None, is_exact=False)
        return args[0].new_zeros(args[0].shape)

    def _befall(self, group: Group | None, what: str | None) -> None:
        """Harm to the process, here and now."""
        self._is_over = True
        fault = self._fault
        if fault.kind == "oom":
            memory_limit.enter()
        self._tell(group, theirs=None, peers=what)
        if fault.kind == "kill":
            harm.kill()
        elif fault.kind == "oom":
            memory_limit.run_out()
        elif fault.kind == "error":
            harm.fail()
        else:
            {"stop": harm.stop, "wedge": harm.wedge, "loop": harm.loop, "slow": harm.slow}[fault.kind](fault.seconds)

    def _add(self, group: Group, result: Any) -> Any:
        import torch

        extra = torch.ones(1, dtype=torch.int64, device=self._worker.model.device)
        self._tell(group, theirs=tampering.describe("all_reduce", (extra,), {}), peers=None)
        group.all_reduce(extra)
        return result

    def _alter(
        self, group: Group, operation: Operation, issue: tampering.Call, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Issue something else than the peers do. Should it come back, its result is of no use."""
        peers = tampering.describe(operation, args, named)
        if self._fault.kind == "swap":
            operation, args, issue = tampering.swapped(group, operation, args[0])
            named = {}
        elif self._fault.kind == "shape":
            args = (tampering.other_shape(args[0]), *args[1:])
        else:
            args = (tampering.other_dtype(args[0]), *args[1:])
        self._tell(group, theirs=tampering.describe(operation, args, named), peers=peers)
        issue(*args, **named)

    def _follow(self, group: Group, what: str) -> None:
        """Since it left a collective out, a rank is one ahead: that shows where two in a row are not the same."""
        assert self._shift is not None
        if what != self._shift[1]:
            self._tell_shift(what)

    def _tell_shift(self, theirs: str | None) -> None:
        assert self._shift is not None
        name, peers = self._shift
        self._shift = None
        self._tell(self._worker.groups[name], theirs=theirs, peers=peers)

    def _tell(self, group: Group | None, *, theirs: str | None, peers: str | None, is_exact: bool = True) -> None:
        from phalanx.collectives.journaled import JournaledGroup  # with torch, which only workers have

        self._note(
            Injected(
                at_ns=time.monotonic_ns(),
                step=self._step,
                group=group.name if group is not None else None,
                sequence=1 + group.num_noted if isinstance(group, JournaledGroup) else None,
                theirs=theirs,
                peers=peers,
                is_exact=is_exact,
            )
        )

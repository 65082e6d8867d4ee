"""The ring's protocol, checked in every interleaving under a memory model that is weaker than ARMv8.

`transport/ring.py` states the protocol; `_writer` and `_reader` below are that text as instructions, with labels on
fences and wake-ups. The checker visits every state that a few frames, slots and readers can reach. A state is wrong if
a reader holds anything but its frame, if it stops before the last frame, or if nobody can go on (a lost wake-up).

Memory model: each location has its whole history of values; each process has a view, the oldest value of each location
that it may still read. A load takes any value from there on (so loads pass loads, and stores are seen late and out of
order). Loads of the payload may also be delayed beyond what follows them, to the next fence or to their use. A fence
exchanges the view with a global one: what is before a fence is visible after every later fence. Ringing and sleeping
are atomic on the bell's newest count, as the kernel does them under its hash bucket's lock, but order nothing else.
Stores do not pass the branches that they depend on, which no machine does.

Not all interleavings have to be tried (Lipton, Reduction, 1975). A load sees no less if it comes later, up to its
process' next step that is no load. A store hides nothing from others if it comes earlier, up to its process' last step
that is no store, as each location has one process that stores. So loads, at most one step of another kind, and stores
go without interruption, and delayed loads are made at the last moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

Registers = dict[str, int]
Instruction = tuple[Any, ...]
Mutation = str | None

_LOADS, _OTHERS, _STORES = range(3)
"""The order of steps that go without interruption."""

_AWAIT_LATE_LOADS = ("fence", "require")


class Violation(Exception):
    """The protocol is wrong."""


class Program:
    """Instructions with labels to jump to. An instruction that is called what `without` says is left out."""

    def __init__(self, without: Mutation) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._without = without

    def add(self, *instruction: Any, called: str = "") -> None:
        if not called or called != self._without:
            self.code.append(instruction)

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def jump_if(self, condition: Callable[[Registers], bool], label: str) -> None:
        self.code.append(("jump_if", condition, label))


def _writer(num_frames: int, num_slots: int, num_readers: int, closes: bool, without: Mutation) -> Program:
    p = Program(without)
    for n in range(num_frames):
        slot = n % num_slots

        def load_cursors(p: Program = p) -> None:
            for r in range(num_readers):
                p.add("load", f"c{r}", f"cursor{r}")

        def has_space(registers: Registers, n: int = n) -> bool:
            return min(registers[f"c{r}"] for r in range(num_readers)) > n - num_slots

        if n >= num_slots:
            load_cursors()
            p.jump_if(has_space, f"write{n}")
            p.add("store", "waits", 1, called="say that the writer waits")
            p.label(f"wait{n}")
            p.add("clear")
            p.add("load", "seen", "writer_bell")
            p.add("fence", called="bell before cursors")
            load_cursors()
            p.jump_if(has_space, f"waited{n}")
            p.add("sleep", "writer_bell", "seen")
            p.jump_if(lambda _: True, f"wait{n}")
            p.label(f"waited{n}")
            p.add("store", "waits", 0)
        p.label(f"write{n}")
        p.add("clear")
        p.add("store", f"payload{slot}", n + 1)
        p.add("fence", called="payload before sequence")
        p.add("store", f"sequence{slot}", n + 1)
        p.add("fence", called="sequence before ring")
        p.add("ring", "readers_bell", called="wake the readers")
    if not closes:
        return p
    p.add("store", "closed", 1)
    p.add("fence", called="closed before ring")
    p.add("ring", "readers_bell", called="wake the readers at the end")
    return p


def _reader(reader: int, num_frames: int, num_slots: int, closes: bool, without: Mutation) -> Program:
    p = Program(without)
    for n in range(num_frames + closes):
        slot = n % num_slots

        def is_there(registers: Registers, n: int = n) -> bool:
            return registers["s"] == n + 1

        p.add("load", "s", f"sequence{slot}")
        p.jump_if(is_there, f"take{n}")
        p.label(f"wait{n}")
        p.add("clear")
        p.add("load", "seen", "readers_bell")
        p.add("fence", called="bell before sequence")
        p.add("load", "closed", "closed")
        p.jump_if(lambda registers: not registers["closed"], f"poll{n}")
        p.add("fence", called="closed before the last poll")
        p.label(f"poll{n}")
        p.add("load", "s", f"sequence{slot}")
        p.jump_if(is_there, f"take{n}")
        p.jump_if(lambda registers: bool(registers["closed"]), f"end{n}")
        p.add("sleep", "readers_bell", "seen")
        p.jump_if(lambda _: True, f"wait{n}")
        p.label(f"end{n}")
        p.add("require", lambda _, n=n: n == num_frames, f"reader stopped after {n} frames")
        p.jump_if(lambda _: True, "end")
        p.label(f"take{n}")
        p.add("clear")
        p.add("fence", called="sequence before payload")
        p.add("load_late", "payload", f"payload{slot}")
        p.add("fence", called="payload before cursor")
        p.add("store", f"cursor{reader}", n + 1)
        p.add(
            "require",
            lambda registers, n=n: registers["payload"] == n + 1,
            f"reader read something else than frame {n}",
        )
        p.add("fence", called="cursor before waits")
        p.add("load", "w", "waits")
        p.jump_if(lambda registers: not registers["w"], f"next{n}")
        p.add("ring", "writer_bell", called="wake the writer")
        p.label(f"next{n}")
        p.add("clear")
    p.label("end")
    return p


class Thread(NamedTuple):
    pc: int
    registers: tuple[tuple[str, int], ...]
    view: tuple[int, ...]
    late: tuple[tuple[str, int], ...]  # loads under way: register and location
    asleep_on: int  # a location, or -1


class State(NamedTuple):
    histories: tuple[tuple[int, ...], ...]
    fenced: tuple[int, ...]  # the global view
    threads: tuple[Thread, ...]


class Checker:
    """Explores what `programs` can do together; with `every_step` also where the order makes no difference."""

    def __init__(self, programs: list[Program], every_step: bool = False) -> None:
        self.programs = programs
        self._every_step = every_step
        stored = [name for p in programs for name in {i[1] for i in p.code if i[0] == "store"}]
        assert len(stored) == len(set(stored)), "stores to one location by several programs have an order"
        names = [i[1] for p in programs for i in p.code if i[0] in ("store", "ring", "sleep")]
        names += [i[2] for p in programs for i in p.code if i[0] in ("load", "load_late")]
        self.locations = {name: i for i, name in enumerate(dict.fromkeys(names))}

    def run(self) -> int:
        """Number of states. Raises Violation."""
        zeros = (0,) * len(self.locations)
        threads = tuple(Thread(0, (), zeros, (), -1) for _ in self.programs)
        first = self._settled(State(((0,),) * len(self.locations), zeros, threads))
        seen, stack = {first}, [first]
        while stack:
            state = stack.pop()
            successors = [s for i in range(len(state.threads)) for s in self._uninterrupted(state, i)]
            if not successors and not self._is_done(state):
                raise Violation("nobody can go on: a wake-up was lost")
            for successor in successors:
                successor = _trimmed(self._settled(successor))
                if successor not in seen:
                    seen.add(successor)
                    stack.append(successor)
        return len(seen)

    def _is_done(self, state: State) -> bool:
        return all(t.pc == len(p.code) for t, p in zip(state.threads, self.programs, strict=True))

    def _uninterrupted(self, state: State, index: int) -> Iterator[State]:
        """After the next steps of a thread, up to one before which others may have to come."""
        if self._every_step:
            yield from self._steps(state, index)
            return
        pending = [(following, self._order(state, index)) for following in self._steps(state, index)]
        while pending:
            state, before = pending.pop()
            state = self._settled(state)
            order = self._order(state, index)
            if order is None or order < before or order == before == _OTHERS:
                yield state
            else:
                pending += [(following, order) for following in self._steps(state, index)]

    def _order(self, state: State, index: int) -> int | None:
        """Of the next step; None if there is none before others have gone on."""
        thread, program = state.threads[index], self.programs[index]
        if thread.asleep_on >= 0 or thread.pc == len(program.code):
            return None
        kind = program.code[thread.pc][0]
        if kind == "load" or (thread.late and kind in _AWAIT_LATE_LOADS):
            return _LOADS
        return _OTHERS if kind in ("fence", "ring", "sleep") else _STORES

    def _steps(self, state: State, index: int) -> Iterator[State]:
        thread, program = state.threads[index], self.programs[index]
        if thread.asleep_on >= 0 or thread.pc == len(program.code):
            return
        kind, *arguments = program.code[thread.pc]
        if self._every_step or kind in _AWAIT_LATE_LOADS:
            for register, location in thread.late:
                others = tuple(late for late in thread.late if late != (register, location))
                yield from self._loads(state, index, thread._replace(late=others), register, location)
        following = thread._replace(pc=thread.pc + 1)
        yield from getattr(self, f"_{kind}")(state, index, following, *arguments)

    def _loads(self, state: State, index: int, thread: Thread, register: str, location: int) -> Iterator[State]:
        history = state.histories[location]
        for at in range(thread.view[location], len(history)):
            registers = dict(thread.registers) | {register: history[at]}
            yield _with(
                state,
                index,
                thread._replace(registers=tuple(sorted(registers.items())), view=_replaced(thread.view, location, at)),
            )

    def _load(self, state: State, index: int, thread: Thread, register: str, name: str) -> Iterator[State]:
        return self._loads(state, index, thread, register, self.locations[name])

    def _load_late(self, state: State, index: int, thread: Thread, register: str, name: str) -> Iterator[State]:
        yield _with(state, index, thread._replace(late=(*thread.late, (register, self.locations[name]))))

    def _store(self, state: State, index: int, thread: Thread, name: str, value: int) -> Iterator[State]:
        yield self._appended(state, index, thread, self.locations[name], value)

    def _appended(self, state: State, index: int, thread: Thread, location: int, value: int) -> State:
        history = state.histories[location]
        histories = _replaced(state.histories, location, (*history, value))
        view = _replaced(thread.view, location, len(history))
        return _with(state._replace(histories=histories), index, thread._replace(view=view))

    def _fence(self, state: State, index: int, thread: Thread) -> Iterator[State]:
        if not thread.late:
            joined = tuple(map(max, thread.view, state.fenced))
            yield _with(state._replace(fenced=joined), index, thread._replace(view=joined))

    def _ring(self, state: State, index: int, thread: Thread, name: str) -> Iterator[State]:
        bell = self.locations[name]
        rung = self._appended(state, index, thread, bell, state.histories[bell][-1] + 1)
        awake = tuple(t._replace(asleep_on=-1) if t.asleep_on == bell else t for t in rung.threads)
        yield rung._replace(threads=awake)

    def _sleep(self, state: State, index: int, thread: Thread, name: str, register: str) -> Iterator[State]:
        bell = self.locations[name]
        history = state.histories[bell]
        if history[-1] == dict(thread.registers)[register]:
            yield _with(state, index, thread._replace(asleep_on=bell))
        else:
            yield _with(state, index, thread._replace(view=_replaced(thread.view, bell, len(history) - 1)))

    def _settled(self, state: State) -> State:
        """After the steps that nobody else can see."""
        return state._replace(threads=tuple(map(self._branched, state.threads, self.programs)))

    def _branched(self, thread: Thread, program: Program) -> Thread:
        while thread.pc < len(program.code):
            kind, *arguments = program.code[thread.pc]
            if kind == "jump_if":
                taken = arguments[0](dict(thread.registers))
                thread = thread._replace(pc=program.labels[arguments[1]] if taken else thread.pc + 1)
            elif kind == "clear":
                thread = thread._replace(pc=thread.pc + 1, registers=())
            else:
                break
        return thread

    def _require(
        self, state: State, index: int, thread: Thread, condition: Callable[[Registers], bool], message: str
    ) -> Iterator[State]:
        if not thread.late:
            if not condition(dict(thread.registers)):
                raise Violation(message)
            yield _with(state, index, thread)


def _replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _with(state: State, index: int, thread: Thread) -> State:
    return state._replace(threads=_replaced(state.threads, index, thread))


def _trimmed(state: State) -> State:
    """The same state without the values that nobody can read any more."""
    oldest = tuple(map(min, state.fenced, *(t.view for t in state.threads)))
    if not any(oldest):
        return state
    return State(
        tuple(h[o:] for h, o in zip(state.histories, oldest, strict=True)),
        tuple(v - o for v, o in zip(state.fenced, oldest, strict=True)),
        tuple(t._replace(view=tuple(v - o for v, o in zip(t.view, oldest, strict=True))) for t in state.threads),
    )


def _check(
    num_frames: int,
    num_slots: int,
    num_readers: int,
    *,
    closes: bool = True,
    without: Mutation = None,
    every_step: bool = False,
) -> int:
    readers = [_reader(r, num_frames, num_slots, closes, without) for r in range(num_readers)]
    return Checker([_writer(num_frames, num_slots, num_readers, closes, without), *readers], every_step).run()


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize(("num_frames", "num_slots"), [(1, 1), (3, 1), (4, 2)])
def test_every_interleaving_of_one_reader_is_right(num_frames: int, num_slots: int, every_step: bool) -> None:
    assert _check(num_frames, num_slots, num_readers=1, every_step=every_step) > 100


@pytest.mark.slow
def test_every_interleaving_of_two_readers_is_right() -> None:
    """With `every_step` these are 393,954 states."""
    assert _check(2, 1, num_readers=2, closes=False) > 35_000


@pytest.mark.parametrize(
    ("left_out", "symptom"),
    [
        ("payload before sequence", "something else"),
        ("sequence before payload", "something else"),
        ("payload before cursor", "something else"),
        ("sequence before ring", "stopped|wake-up"),
        ("wake the readers", "wake-up"),
        ("bell before sequence", "wake-up"),
        ("say that the writer waits", "wake-up"),
        ("bell before cursors", "wake-up"),
        ("cursor before waits", "wake-up"),
        ("wake the writer", "wake-up"),
        ("closed before ring", "wake-up"),
        ("wake the readers at the end", "wake-up"),
        ("closed before the last poll", "stopped"),
    ],
)
@pytest.mark.parametrize("every_step", [False, True])
def test_each_fence_and_wake_up_is_needed(left_out: str, symptom: str, every_step: bool) -> None:
    with pytest.raises(Violation, match=symptom):
        _check(2, 1, num_readers=1, without=left_out, every_step=every_step)

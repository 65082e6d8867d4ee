"""A line of another size, prepared by a thread of its own beside the line that serves, until it takes over.

It shares nothing with the line that serves but the host, or bundles of Ray's: it has processes, groups, weights and a
KV cache of its own.
So to undo a resize is to end that line, in whichever state it is; the line that serves never hears of it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from phalanx.config import Config
from phalanx.errors import ConfigError, DeadlineError, PhalanxError, PlacementError
from phalanx.executor.executor import Executor
from phalanx.executor.line_plan import Capacity
from phalanx.executor.start import settle
from phalanx.membership.forgetting import forget_locals
from phalanx.membership.lines import Interruption, Line, Lines, end
from phalanx.membership.memory import FormationMemory, RankHolder
from phalanx.membership.resize import LineResize, Resizing, Size
from phalanx.membership.room import check_devices, check_memory, no_places, shares_devices
from phalanx.memory.holder import Holder
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.client import StartProgress

if TYPE_CHECKING:
    from phalanx.executor.ray.placement import RayPlacement

END_DEADLINE_S = 30.0
ANSWER_S = 2.0
"""For a sign of life of a line that has just been made ready."""
LAST_LOOK_S = 0.02
"""A line that has nothing more to do than that is waited for so long: whatever those that serve make meanwhile, it has
to compute when it takes over."""

RESIZE_HOOK = "reinitialize_distributed"
"""What a worker extension may declare, to be called on the ranks of a line of another size."""

log = logging.getLogger("phalanx.membership")


class NextLine(NamedTuple):
    """A line of the size asked for, and what lines after it are started with."""

    config: Config
    """Settled."""
    line: Line
    capacity: Capacity
    memory: FormationMemory
    """What it leaves."""
    placement: RayPlacement | None = None
    """With Ray, where it is."""

    def close(self) -> None:
        """End it. Raises DeadlineError."""
        with ExitStack() as stack:
            if self.placement is not None:
                stack.callback(self.placement.close)
            stack.callback(self.memory.close)
            stack.callback(end, self.line)


NextWork = Callable[[NextLine], Callable[[], None] | None]
"""What a line that could step is to do before it takes over, in the thread that has prepared it; None if nothing."""


def nothing_to_do(_: NextLine) -> None:
    """It takes over as soon as it can."""


class Preparation:
    """A start of a line, and what it then does before it takes over, in a thread of its own. Belongs to one thread."""

    def __init__(self, prepare: Callable[[Preparation], NextLine]) -> None:
        self.interruption = Interruption()
        self.has_room = threading.Event()
        self.progress: StartProgress | None = None
        """What one of its ranks has said last."""
        self._started: NextLine | None = None
        self._awaits_work = threading.Event()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_all_work = False
        self._prepared: Future[NextLine] = Future()
        self._thread = threading.Thread(target=self._run, args=(prepare,), name="phalanx-resizing", daemon=True)
        self._ending: threading.Thread | None = None
        self._thread.start()

    def go_on(self, next_work: NextWork) -> None:
        """Ask for the next work, if the line could do some."""
        if self._awaits_work.is_set() and self._started is not None:
            self._awaits_work.clear()
            work = next_work(self._started)
            self._has_all_work = work is None
            self._work.put(work)

    def is_over(self, timeout_s: float) -> bool:
        """Whether it has come to its end, by then: the line may take over, or there is none."""
        self._thread.join(max(timeout_s, LAST_LOOK_S) if self._has_all_work else timeout_s)
        return not self._thread.is_alive()

    def result(self) -> NextLine:
        """When it is over. Raises what it has failed with."""
        return self._prepared.result(0.0)

    def report(self, progress: StartProgress) -> None:
        """What a rank says."""
        self.progress = progress

    def discard(self) -> None:
        """End it, whatever has come of it, in the background."""
        assert self._ending is None
        self.interruption.begin()
        self._work.put(None)
        self._ending = threading.Thread(target=self._end, name="phalanx-undoing", daemon=True)
        self._ending.start()

    def is_gone(self, timeout_s: float) -> bool:
        """Whether nothing is left of what was discarded, by then."""
        assert self._ending is not None
        self._ending.join(timeout_s)
        return not self._ending.is_alive()

    def _run(self, prepare: Callable[[Preparation], NextLine]) -> None:
        try:
            with ExitStack() as undo:
                self._started = prepare(self)
                undo.callback(self._started.close)
                while (work := self._next_work()) is not None:
                    work()
                self._started.line.executor.check_health(ANSWER_S)
                undo.pop_all()
            self._prepared.set_result(self._started)
        except BaseException as error:  # whatever it is, who waits has to be told
            if not isinstance(error, PhalanxError):
                log.exception("a line of another size cannot be prepared")
            self._prepared.set_exception(error)

    def _next_work(self) -> Callable[[], None] | None:
        self._awaits_work.set()
        return self._work.get()

    def _end(self) -> None:
        try:
            self.interruption.end(self._thread)
            if (error := self._prepared.exception(0.0)) is None:
                self._prepared.result(0.0).close()
            forget_locals(error)
        except DeadlineError as error:  # nobody waits for it any longer; it ends with the engine
            log.error("what a resize that was undone had started does not end: %s", error)


class Resizer:
    """Of one formation. Belongs to its thread, but for `fault` and `healed`."""

    def __init__(self, config: Config, checkpoint: Checkpoint, lines: Lines) -> None:
        """`config`, settled, is that of the line that serves."""
        self._config = config
        self._checkpoint = checkpoint
        self._lines = lines
        parallel = config.parallel
        self._resizing = Resizing(Size(parallel.data_parallel_size, parallel.tensor_parallel_size))
        self._preparation: Preparation | None = None
        self._next_work: NextWork = nothing_to_do

    @property
    def progress(self) -> StartProgress | None:
        """What a rank of the line that is prepared has said last."""
        return None if self._preparation is None else self._preparation.progress

    def begin(self, asked: Size, capacity: Capacity, pids: Iterable[int], next_work: NextWork) -> LineResize:
        """Have a line of this size prepared. `capacity` and `pids` are of the line that serves. Blocks for nobody.

        Requests may then be as long as now. Raises ConfigError for what the model cannot do and where devices are
        missing, ResizeRefusedError while another one is under way, or a fault is healed.
        """
        self._resizing.check()
        config = self._config_of(asked, capacity.max_model_len)
        if config.executor.launcher == "local":
            check_devices(config, self._resizing.size)
        resize = self._resizing.begin(asked)
        log.info("resize %s: ranks are prepared beside those that serve", resize)
        self._next_work = next_work
        self._preparation = Preparation(partial(self._prepare, config, resize, tuple(pids)))
        return resize

    def follow(self, timeout_s: float = 0.0) -> None:
        """Take note of what has come of the resize that is under way; waits for news for `timeout_s` at most."""
        resize, preparation = self._resizing.current, self._preparation
        if resize is None or preparation is None:
            return
        if resize.state == "undoing":
            if preparation.is_gone(timeout_s):
                self._undone()
            return
        if preparation.has_room.is_set():
            self._resizing.note_room()
        preparation.go_on(self._next_work)
        if preparation.is_over(timeout_s):
            self._take_note_of(preparation)

    def cancel(self) -> bool:
        """Undo it. False if it is too late, or none is under way."""
        if not self._resizing.cancel():
            return False
        self._discard()
        return True

    def commit(self) -> NextLine:
        """The line that is ready serves from now on."""
        assert self._preparation is not None
        self._resizing.commit()
        taken, self._preparation = self._preparation.result(), None
        self._config = taken.config
        return taken

    def fault(self, error: Exception) -> None:
        """The line that serves has failed, and is healed: a resize gives way. May be called more than once."""
        undoes = self._resizing.current is not None and self._resizing.current.state != "undoing"
        self._resizing.fault(error)
        if undoes:
            self._discard()

    def healed(self) -> None:
        self._resizing.healed()

    def close(self) -> None:
        """End what is being prepared."""
        self.cancel()
        if self._preparation is not None and not self._preparation.is_gone(END_DEADLINE_S):
            log.error("the end of a resize took longer than %g s", END_DEADLINE_S)
        self._preparation = None

    def _config_of(self, asked: Size, max_model_len: int) -> Config:
        """Settled. Raises ConfigError."""
        parallel = msgspec.structs.replace(
            self._config.parallel,
            data_parallel_size=asked.data_parallel_size,
            tensor_parallel_size=asked.tensor_parallel_size,
        )
        if parallel.engine_size < parallel.world_size:
            allowed = "1 without enable_expert_parallel: such replicas are engines of their own"
            raise ConfigError("data_parallel_size", asked.data_parallel_size, allowed)
        model = msgspec.structs.replace(self._config.model, max_model_len=max_model_len)
        cluster = msgspec.structs.replace(self._config.cluster, avoid_nodes=self._lines.avoided)
        config = msgspec.structs.replace(self._config, parallel=parallel, model=model, cluster=cluster)
        config.refuse_contradictions()
        return settle(config, self._checkpoint)

    def _prepare(self, config: Config, resize: LineResize, pids: Iterable[int], preparation: Preparation) -> NextLine:
        """In the thread of the preparation."""
        with ExitStack() as undo:
            placement = self._find_room(config, resize.before, pids, preparation)
            holder: RankHolder = Holder()
            if placement is not None:
                undo.callback(placement.close)
                preparation.interruption.note(placement)
                holder = placement.holder()
            preparation.has_room.set()
            # Of experts that move nobody knows, after a fault, which are where.
            memory = FormationMemory(config.parallel.world_size, holder, holds_weights=not config.parallel.enable_eplb)
            undo.callback(memory.close)
            line, capacity = self._lines.start(
                preparation.report, config=config, interruption=preparation.interruption, placement=placement
            )
            undo.callback(end, line)
            memory.take(line.told)
            if config.executor.worker_extension_cls is not None:
                _tell_extension(line.executor, resize.before)
            undo.pop_all()
            return NextLine(config, line, capacity, memory, placement)

    def _find_room(
        self, config: Config, before: Size, pids: Iterable[int], preparation: Preparation
    ) -> RayPlacement | None:
        """On this host, or places on the nodes of a cluster, whose memory only the start can tell. Raises ConfigError
        that says what is missing."""
        if config.executor.launcher == "local":
            check_memory(config, before, pids)
        try:
            return self._lines.find_placement(config, preparation.report, shares=shares_devices(config))
        except PlacementError as error:
            raise no_places(config, before, error) from error

    def _take_note_of(self, preparation: Preparation) -> None:
        """Of what has come of it."""
        try:
            preparation.result()
            self._resizing.prepared()
        except Exception as error:  # whatever it is, the line that serves goes on, and who waits has to be told
            self._resizing.failed(error)
            self._discard()

    def _discard(self) -> None:
        assert self._preparation is not None
        self._preparation.discard()

    def _undone(self) -> None:
        resize, self._preparation = self._resizing.current, None
        self._resizing.undone()
        assert resize is not None
        log.warning("resize %s: %s%s", resize, resize.state, _because(resize.error))


def _tell_extension(executor: Executor, before: Size) -> None:
    """Call the extension's hook, if it declares one. Raises what a method does."""
    if executor.collective_rpc("declares", [RESIZE_HOOK], unique_reply_rank=0):
        executor.collective_rpc(RESIZE_HOOK, kwargs=before._asdict())


def _because(error: Exception | None) -> str:
    return "" if error is None else f": {error}"

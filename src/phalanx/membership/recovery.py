"""From a line that has failed to one that goes on; and what stands ready meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from phalanx.config import Config, HealingConfig
from phalanx.errors import EngineDeadError, NotHealedError, PhalanxError, StartError, WorkerError
from phalanx.executor.line_plan import Capacity
from phalanx.executor.presence import Presence
from phalanx.membership.ending import Ending
from phalanx.membership.forgetting import forget_locals
from phalanx.membership.ladder import Attempt, Climb, Ladder, Rung
from phalanx.membership.lines import NO_MEMORY, Interruption, Line, Lines, end
from phalanx.membership.memory import FormationMemory
from phalanx.membership.sharing import kind_of
from phalanx.membership.standby import Standby
from phalanx.memory.held import HeldMemory
from phalanx.memory.shared_weights import SharedWeights
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.client import FormationStats, StartProgress

if TYPE_CHECKING:
    from phalanx.executor.ray.placement import RayPlacement

END_DEADLINE_S = 30.0
HANDED_OVER_S = 0.5
"""Ranks that others of another size have followed are ended after so long: to free their memory takes processor time,
which those others want for their first steps.
"""
HEALTH_S = 2.0
"""For the answer of a line that has just been made ready."""

log = logging.getLogger("phalanx.membership")


class Recovered(NamedTuple):
    """How a line goes on."""

    line: Line
    keeps_cache: bool
    """Whether it finds the KV cache as the failed one has left it..."""
    endings: tuple[Ending, ...]
    """... and who may still write to it, as far as a step under way does."""


class Recovery:
    """Of one formation. `stats` is for any thread; of the others one is called at a time, but for `interrupt`."""

    def __init__(
        self, config: HealingConfig, lines: Lines, capacity: Capacity, memory: FormationMemory, presence: Presence
    ) -> None:
        self.ladder = Ladder(config.heal_timeout_s)
        self.longest_s = config.heal_timeout_s + END_DEADLINE_S
        """Of a recovery with all its tries, and the end of ranks."""
        self._lines = lines
        self._capacity = capacity
        self._memory = memory
        self._presence = presence
        self._may_reload = True
        self._rests_standby = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._retired_epoch = 0
        self._retiring: list[threading.Thread] = []
        self._num_faults = 0
        self._healed: Counter[Rung] = Counter()
        self._failed: Counter[Rung] = Counter()
        self._last_pause_s = 0.0
        self._last_fault = ""
        self._is_healing = False
        self._standby = Standby(self._prepare) if config.standby else None

    def begin(self, work: Callable[[], None]) -> None:
        """Do it in a thread of its own, which `interrupt` waits for."""
        self._thread = threading.Thread(target=work, name="phalanx-healing", daemon=True)
        self._thread.start()

    def carry_out(self, failed: Line, error: PhalanxError) -> Recovered:
        """A line that takes steps.

        Raises NotHealedError, EngineDeadError after `interrupt`, and DeadlineError if the kernel does not end a process
        that has to be awaited.
        """
        began_at = time.monotonic()
        self._is_healing = True
        self._num_faults += 1
        if isinstance(error, WorkerError):
            log.error("%s", error.traceback)
        # Of a verdict the log has the rest already.
        self._last_fault = str(error).partition("\n")[0]
        log.error("the ranks of epoch %d are ended: %s", failed.epoch, self._last_fault)
        forget_locals(error)
        self._retired_epoch = failed.epoch
        self._lines.end(failed)
        climb = self.ladder.begin(began_at)
        while (attempt := self._next(climb)) is not None:
            try:
                line = self._attempt(attempt)
            except (PhalanxError, OSError) as reason:  # OSError: no memory, no processes, no descriptors
                forget_locals(reason)
                self._failed[attempt.rung] += 1
                climb.failed(attempt.rung, str(reason))
                log.warning("healing by %s has failed: %s", attempt.rung, reason)
                continue
            self._healed[attempt.rung] += 1
            self._last_pause_s = time.monotonic() - began_at
            self._is_healing = False
            log.warning("ranks of epoch %d go on after %.3f s (%s)", line.epoch, self._last_pause_s, attempt.rung)
            self._renew_standby()
            return Recovered(line, attempt.rung != "checkpoint", self._lines.endings)
        raise NotHealedError(f"{error}; it could not be healed: {climb.tried}") from error

    def weights_changed(self) -> None:
        """From now on the checkpoint does not have the weights that ranks compute with."""
        self._may_reload = False
        if self._standby is not None and not self._memory.holds_weights:
            log.warning("there is no standby line from now on: it would have the weights of the checkpoint")
            self._standby.discard()

    def rest_standby(self) -> None:
        """Have no standby line before `renew_standby`, also after faults. Blocks until there is none.

        Raises DeadlineError.
        """
        self._rests_standby = True
        if self._standby is not None:
            self._standby.clear(END_DEADLINE_S)

    def renew_standby(self) -> None:
        """Have one again, soon, if there is to be one."""
        self._rests_standby = False
        self._renew_standby()

    def begin_change(self, checkpoint: Checkpoint) -> None:
        """The weights of this one are about to come into ranks: who starts from now on reads them from its files.

        Until `end_change` nothing that ranks leave is trusted: some may have old weights, some new ones, and some both.
        No standby line must be there.
        """
        assert self._rests_standby
        self._memory.begin_change()
        self._lines.checkpoint = checkpoint
        self._may_reload = True

    def end_change(self) -> None:
        """All ranks have them."""
        self._memory.end_change()

    @property
    def shares_weights(self) -> bool:
        """As FormationMemory.shares_weights."""
        return self._memory.shares_weights

    def share_weights(self, config: Config) -> SharedWeights | None:
        """What ranks of another engine on this host may compute with, beside those of this one, which have `config`.

        Raises CheckpointError.
        """
        if not self._may_reload:
            return None
        kind, ranks = kind_of(config, self._lines.checkpoint), self._memory.share()
        return None if ranks is None else SharedWeights(kind, ranks)

    def adopt_weights(self, weights: SharedWeights) -> None:
        """The ranks that compute are about to take these of another engine, between `begin_change` and `end_change`."""
        self._memory.adopt(weights.ranks)

    def follow(self, told: Mapping[int, HeldMemory]) -> None:
        """The ranks that compute have this by now, beside no standby line. Raises as FormationMemory.follow."""
        self._memory.follow(told)

    def resize(
        self,
        config: Config,
        capacity: Capacity,
        memory: FormationMemory,
        placement: RayPlacement | None,
        before: Line,
        after: Line,
    ) -> None:
        """Another line of this size serves now: lines to come are like it, and the one before is ended.

        Blocks for no process: the two lines have nothing in common. Takes over `memory`, which `after` has made, and
        the `placement` where it is, if it is with Ray.
        """
        memory_before, self._memory, self._capacity = self._memory, memory, capacity
        placement_before = self._lines.resize(config, placement)
        self._presence.resize(config)
        self._presence.show(after.executor.watched, after.epoch)
        if self._standby is not None:
            self._standby.discard(self._end_later)
        self._end_later(before, placement_before)
        memory_before.close()
        self._renew_standby()

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Ranks that are placed from now on are to come to other nodes of the cluster. For any thread."""
        self._lines.avoid(nodes)

    def has_retired(self, line: Line) -> bool:
        """Whether it has failed, and is let go of."""
        return line.epoch == self._retired_epoch

    def stats(self, epoch: int) -> FormationStats:
        return FormationStats(
            epoch=epoch,
            is_healing=self._is_healing,
            standby="none" if self._standby is None else self._standby.state,
            num_faults=self._num_faults,
            healed=dict(self._healed.items()),
            failed=dict(self._failed.items()),
            num_standby_faults=0 if self._standby is None else self._standby.num_faults,
            last_pause_s=self._last_pause_s,
            last_fault=self._last_fault,
            lacks_room=self._lines.lacks_room if self._is_healing else None,
            shares_weights=self._memory.shares_weights,
        )

    def interrupt(self) -> None:
        """Nothing is to come any more: what is being healed is not."""
        self._closing.set()
        if self._standby is not None:
            self._standby.close()
        if self._thread is not None and self._thread.is_alive():
            self._lines.close()  # the ranks that are starting end, and so does the wait for them
            self._thread.join(END_DEADLINE_S)

    def close(self) -> None:
        """Wait for what is left of lines that have failed, and let go of what they have left."""
        self.interrupt()
        for thread in self._retiring:
            thread.join(END_DEADLINE_S)
        self._memory.close()

    def _next(self, climb: Climb) -> Attempt | None:
        if self._closing.is_set():
            raise EngineDeadError("the ranks can run no more: their formation was closed")
        if not (self._lines.go_on_beside and self._has_standby):
            self._lines.await_ends()
        weights_are_there = self._may_reload or self._memory.holds_weights
        holds_memory = self._memory.is_whole and weights_are_there
        return climb.next(
            time.monotonic(),
            has_standby=self._has_standby and holds_memory,
            holds_memory=holds_memory,
            may_reload=self._may_reload,
        )

    @property
    def _has_standby(self) -> bool:
        return self._standby is not None and self._standby.state == "ready"

    def _attempt(self, attempt: Attempt) -> Line:
        """A line that has answered, and that others see."""
        if attempt.rung == "checkpoint":
            self._memory.drop()
            if self._standby is not None:
                self._standby.discard()
            line = self._new_line(attempt.deadline_s, NO_MEMORY)
        elif attempt.rung == "standby":
            line = self._take_standby(attempt.deadline_s)
        else:
            line = self._next_line(attempt.deadline_s)
        try:
            line.executor.check_health(min(attempt.deadline_s, HEALTH_S))
            self._memory.take(line.told)
        except BaseException:
            end(line)
            raise
        return line

    def _take_standby(self, timeout_s: float) -> Line:
        """The line that stands ready, or will before `timeout_s`; else it is ended."""
        assert self._standby is not None
        line = self._standby.take(timeout_s)
        if line is None:
            self._standby.discard()
            raise StartError("the standby line", "being prepared", f"it was not ready within {timeout_s:.3g} s")
        self._presence.show(line.executor.watched, line.epoch)
        return line

    def _next_line(self, deadline_s: float) -> Line:
        """The one that is being prepared, if that is sooner; else a new one. A start that hangs is not waited for."""
        if self._standby is not None:
            with suppress(StartError):
                return self._take_standby(min(self._standby.due_in_s, deadline_s))
        return self._new_line(deadline_s, self._memory.of_ranks())

    def _new_line(self, deadline_s: float, memory: Mapping[int, HeldMemory]) -> Line:
        line, _ = self._lines.start(
            _say_nothing,
            capacity=self._capacity,
            memory=memory,
            show=self._presence.show,
            timeout_s=deadline_s,
            is_awaited=True,
        )
        return line

    def _prepare(self, interruption: Interruption) -> Line:
        """A line to stand ready."""
        line, _ = self._lines.start(
            _say_nothing, capacity=self._capacity, memory=self._memory.of_ranks(), interruption=interruption
        )
        return line

    def _renew_standby(self) -> None:
        has_weights = self._may_reload or self._memory.holds_weights
        if self._standby is not None and has_weights and not self._rests_standby:
            self._standby.renew()

    def _end_later(self, line: Line, placement: RayPlacement | None = None) -> None:
        """Kill its processes and let go of what it used, and of `placement`, in the background: nobody waits for it."""

        def work() -> None:
            self._closing.wait(HANDED_OVER_S)
            with ExitStack() as stack:
                if placement is not None:
                    stack.callback(placement.close)
                end(line)

        self._do_in_background(work)

    def _do_in_background(self, work: Callable[[], None]) -> None:
        self._retiring = [thread for thread in self._retiring if thread.is_alive()]
        thread = threading.Thread(target=work, name="phalanx-retiring", daemon=True)
        self._retiring.append(thread)
        thread.start()


def _say_nothing(progress: StartProgress) -> None:
    """Who waits for it is told how it went."""

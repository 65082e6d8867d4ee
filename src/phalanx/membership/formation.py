"""The line that computes, what it leaves to the next one, and, if asked for, the line that stands ready behind it.

When a line fails it is killed, whatever is wrong with it: nobody waits for a sick process to cooperate. Once its
processes are gone, or on GPUs while they end, another line goes on, at another epoch: ladder.py says which one. The
brain then forgets the steps under way; it is told whether the KV cache is still there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec

from phalanx.config import Config, HealingConfig
from phalanx.errors import (
    ConfigError,
    DeadlineError,
    FrameError,
    MaintenanceError,
    PeerDiedError,
    PhalanxError,
    ResizeRefusedError,
    UserError,
)
from phalanx.executor.allocation import told_memory
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import HEALTH_TIMEOUT_S, RPC_TIMEOUT_S, OnFailure, OnProgress
from phalanx.executor.line_plan import Capacity
from phalanx.executor.pending import Pending
from phalanx.executor.presence import Presence
from phalanx.executor.start import open_placement, settle, start_executor
from phalanx.membership.ending import Ending
from phalanx.membership.first_line import start_first_line
from phalanx.membership.lines import NO_MEMORY, Line, Lines
from phalanx.membership.memory import FormationMemory, RankHolder
from phalanx.membership.recovery import Recovery
from phalanx.membership.resize import LineResize, Size
from phalanx.membership.resizer import NextWork, Resizer, nothing_to_do
from phalanx.membership.sharing import kind_of, may_share
from phalanx.memory.held import HeldMemory
from phalanx.memory.holder import Holder
from phalanx.memory.shared_weights import SharedWeights
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.client import FormationStats, StartProgress
from phalanx.protocol.worker import FIRST_EPOCH, CommandBody, ReplyBody, Step, StepResult

OF_EVERY_WORKER = frozenset({"whereabouts", "expert_load", "methods_that_change_weights", "declares"})
"""Methods that leave nothing."""

log = logging.getLogger("phalanx.membership")


class Healed(NamedTuple):
    """Another line goes on."""

    epoch: int
    keeps_cache: bool
    """Whether it finds the KV cache as the line before it has left it..."""
    endings: tuple[Ending, ...] = ()
    """... and who may still write to it, where that was a step under way."""


class Resized(NamedTuple):
    """A line of another size goes on, with an empty KV cache."""

    epoch: int
    config: Config
    capacity: Capacity


class Healing:
    """A recovery that another thread carries out."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: what it cannot take in good order."""
        self._outcome: Future[Healed] = Future()
        self._deadline = Deadline(longest_s)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over by then. Raises DeadlineError if it hangs, as one rank in this process may at its start,
        which nobody can end."""
        with suppress(TimeoutError):
            self._outcome.exception(timeout_s)
            return True
        if not self._deadline.remaining_s:
            raise DeadlineError("ranks that go on", "who heals them", self._deadline.waited_s)
        return False

    def result(self) -> Healed:
        """Of a recovery that is over. Raises what `Formation.heal` does."""
        return self._outcome.result(0.0)

    def carry_out(self, formation: Formation, error: PhalanxError) -> None:
        try:
            self._outcome.set_result(formation.heal(error))
        except BaseException as failure:
            self._outcome.set_exception(failure)


class Formation:
    """Does for a brain what an executor does, and goes on with another line when one has failed.

    What it raises then, `heals` says whether `heal` is of use, and the caller decides. Belongs to one thread, but for
    `stats`; while another one carries a recovery out (`begin_healing`) nothing else is called but `stats` and `close`.
    """

    def __init__(
        self,
        config: Config,
        line: Line,
        capacity: Capacity,
        resources: ExitStack,
        recovery: Recovery | None = None,
        resizer: Resizer | None = None,
    ) -> None:
        """Use `start_formation`. `config` is settled."""
        self.capacity = capacity
        self._line = line
        self._resources = resources
        self._recovery = recovery
        self._config = config
        self._resizer = resizer
        self._ended: PhalanxError | None = None
        self._on_failure: list[OnFailure] = []
        self._weights_changed = False
        self._called: set[str] = set()
        """Methods of ranks, which may have left something in them."""

    @property
    def config(self) -> Config:
        """Settled: of the line that computes."""
        return self._config

    # ---------------------------------------------------------------------------- as an executor

    @property
    def epoch(self) -> int:
        """Of the line that computes."""
        return self._line.epoch

    def step(self, step: Step) -> Pending[tuple[StepResult, ...]]:
        """As Executor.step."""
        return self._line.executor.step(step)

    def submit(
        self, body: CommandBody, *, ranks: Sequence[int] | None = None, deadline_s: float
    ) -> Pending[list[ReplyBody]]:
        """As Executor.submit."""
        return self._line.executor.submit(body, ranks=ranks, deadline_s=deadline_s)

    def collective_rpc(
        self,
        method: str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
        unique_reply_rank: int | None = None,
    ) -> Pending[Any]:
        """As Executor.collective_rpc with `non_block`."""
        self._called.add(method)
        return self._line.executor.collective_rpc(
            method, args, kwargs, timeout_s=timeout_s, unique_reply_rank=unique_reply_rank, non_block=True
        )

    def check_health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """As Executor.check_health."""
        self._line.executor.check_health(timeout_s)

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback` called with what ends the run, at once if something has: a fault that is healed does not."""
        if self._recovery is None:
            self._line.executor.on_failure(callback)
            return
        self._on_failure.append(callback)
        if self._ended is not None:
            callback(self._ended)

    # ---------------------------------------------------------------------------- healing

    def heals(self, error: BaseException) -> bool:
        """Whether `heal` is of use after this error: a fault of the line that computes, and not a user's mistake."""
        line_failed = error is self._line.executor.failure and not isinstance(error, UserError)
        return line_failed and self._recovery is not None

    def heal(self, error: PhalanxError) -> Healed:
        """Kill the line that has failed, and have another one go on. Blocks for heal_timeout_s at most, and for as long
        as the kernel takes to end processes, unless there are GPUs and a line stands ready.

        Raises NotHealedError if none comes up, and EngineDeadError if the formation is closed meanwhile.
        """
        assert self._recovery is not None and self.heals(error), error
        self._put_off_resizes(error)
        try:
            recovered = self._recovery.carry_out(self._line, error)
        except PhalanxError as failure:
            self._ended = failure
            for tell in self._on_failure:
                tell(failure)
            raise
        self._line = recovered.line
        self._warn_of_new_ranks()
        if self._resizer is not None:
            self._resizer.healed()
        return Healed(recovered.line.epoch, recovered.keeps_cache, recovered.endings)

    def begin_healing(self, error: PhalanxError) -> Healing:
        """Do so in another thread."""
        assert self._recovery is not None
        self._put_off_resizes(error)
        healing = Healing(self._recovery.longest_s)
        self._recovery.begin(partial(healing.carry_out, self, error))
        return healing

    def progressed(self) -> None:
        """A step was committed, or ranks that had nothing to do have answered: the line is of use."""
        if self._recovery is not None:
            self._recovery.ladder.progressed()

    def weights_changed(self) -> None:
        """From now on the checkpoint is not what ranks compute with, and lines that have read it are of no use."""
        self._weights_changed = True
        if self._recovery is not None:
            self._recovery.weights_changed()

    # ---------------------------------------------------------------------------- maintenance

    @property
    def has_weights_of_checkpoint(self) -> bool:
        """Whether what ranks compute with can be read again."""
        return not self._weights_changed

    def rest_standby(self) -> None:
        """Have no line stand ready before `renew_standby`. Blocks until there is none; raises DeadlineError."""
        if self._recovery is not None:
            self._recovery.rest_standby()

    def renew_standby(self) -> None:
        """Have one stand ready again, if there is to be one."""
        if self._recovery is not None:
            self._recovery.renew_standby()

    def begin_change(self, checkpoint: Checkpoint) -> None:
        """The weights of this checkpoint are about to come into ranks, while no line stands ready.

        A line that comes after a fault before `end_change` reads all of them: weights are never mixed.
        """
        self._weights_changed = False
        if self._recovery is not None:
            self._recovery.begin_change(checkpoint)

    def end_change(self) -> None:
        """They are in all ranks."""
        if self._recovery is not None:
            self._recovery.end_change()

    def hold(self, replies: Sequence[ReplyBody]) -> None:
        """All ranks have given memory back, or have it again, while no line stands ready: hold what they say that they
        have now (Allocated), and no more. On a CPU, whose segments stay what they are unless other engines have them,
        there is nothing to do.

        Raises PeerDiedError or FrameError if one of them has just ended, DeadlineError if it does not hand it out, and
        MaintenanceError if this process lacks descriptors. Then nothing is held: after a fault the checkpoint is read.
        """
        if self._recovery is None or (self._config.executor.device == "cpu" and not self.shares_weights):
            return
        try:
            self._recovery.follow(told_memory(replies))
        except PhalanxError:
            raise
        except OSError as error:
            raise MaintenanceError(f"what ranks have cannot be held for those after them: {error}") from error

    @property
    def shares_weights(self) -> bool:
        """Whether ranks of another engine may compute with the memory of these ranks' weights, too."""
        return self._recovery is not None and self._recovery.shares_weights

    def share_weights(self) -> SharedWeights | None:
        """What ranks of another engine on this host may compute with; None where they cannot. Not while any of it is
        under way. Raises CheckpointError.
        """
        if self._recovery is None or not may_share(self._config):
            return None
        return self._recovery.share_weights(self._config)

    def can_adopt(self, weights: SharedWeights, checkpoint: Checkpoint) -> bool:
        """Whether ranks may compute with these of another engine on this host, as they may with this checkpoint's.

        Raises CheckpointError.
        """
        may = self._recovery is not None and may_share(self._config)
        return may and weights.kind == kind_of(self._config, checkpoint)

    def adopt_weights(self, weights: SharedWeights) -> None:
        """All ranks are about to take them, after `begin_change`. Then `hold` what they say that they have."""
        assert self._recovery is not None
        self._recovery.adopt_weights(weights)

    # ---------------------------------------------------------------------------- another size

    @property
    def size(self) -> Size:
        """Of the line that computes."""
        parallel = self._config.parallel
        return Size(parallel.data_parallel_size, parallel.tensor_parallel_size)

    def begin_resize(self, asked: Size, next_work: NextWork = nothing_to_do) -> LineResize:
        """Have a line of another size prepared in the background, from the checkpoint; or one of the same size, which
        comes to where ranks are to be by now (`avoid`). Blocks for nobody. When its ranks could step, `follow_resize`
        asks `next_work` what they are to do before they take over, until that is nothing.

        What is given changes as `follow_resize` is called; when its state is `ready`, `switch` has that line go on. If
        anything goes wrong before, with any process, it is undone, and the line that computes has never noticed.
        Raises ConfigError for what cannot be, and ResizeRefusedError for what cannot be now.
        """
        if self._resizer is None or self._config.executor.launcher == "inline":
            raise _cannot_resize(self._config, self.size, asked)
        if self._weights_changed:
            raise ResizeRefusedError(
                "weights that a method has changed are in these ranks alone: others would read those of the checkpoint"
            )
        return self._resizer.begin(asked, self.capacity, self._line.pids().values(), next_work)

    def follow_resize(self, timeout_s: float = 0.0) -> None:
        """Take note of how the resize goes that is under way, if one is; waits for news for `timeout_s` at most."""
        if self._resizer is not None:
            self._resizer.follow(timeout_s)

    def cancel_resize(self) -> None:
        """Undo the resize that is under way, if one is: it is over when its state says so."""
        if self._resizer is not None:
            self._resizer.cancel()

    @property
    def resize_progress(self) -> StartProgress | None:
        """What a rank of the line that is being prepared has said last."""
        return None if self._resizer is None else self._resizer.progress

    def switch(self) -> Resized:
        """End the line that computes, and have the one go on that is ready. Blocks for no process."""
        assert self._resizer is not None and self._recovery is not None
        taken = self._resizer.commit()
        before, self._line, self._config, self.capacity = self._line, taken.line, taken.config, taken.capacity
        self._recovery.resize(taken.config, taken.capacity, taken.memory, taken.placement, before, taken.line)
        self._warn_of_new_ranks()
        log.info("ranks of epoch %d go on: %s", self._line.epoch, self.size)
        return Resized(self._line.epoch, taken.config, taken.capacity)

    def _put_off_resizes(self, error: PhalanxError) -> None:
        """While other ranks are brought up after a fault: one that is under way is undone."""
        if self._resizer is not None:
            self._resizer.fault(error)

    def _warn_of_new_ranks(self) -> None:
        if lost := self._called - OF_EVERY_WORKER:
            log.warning(
                "ranks are new: what these methods have left in the old ones is lost: %s", ", ".join(sorted(lost))
            )

    @property
    def nodes(self) -> tuple[str, ...]:
        """By rank, the node of a cluster that it is on. Empty where all are on this host."""
        return self._line.executor.nodes

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Ranks that are placed from now on are to come to other nodes of the cluster. Those that are there stay."""
        if self._recovery is not None:
            self._recovery.avoid(nodes)

    def stats(self) -> FormationStats | None:
        """None where a fault ends the run. For any thread."""
        return None if self._recovery is None else self._recovery.stats(self._line.epoch)

    def close(self) -> None:
        """End all ranks and let everything go, also while another thread heals. Takes seconds at most."""
        with self._resources:
            if self._resizer is not None:
                self._resizer.close()
            if self._recovery is not None:
                self._recovery.interrupt()
            if self._recovery is None or not self._recovery.has_retired(self._line):
                self._line.executor.close()

    def __enter__(self) -> Formation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_formation(
    config: Config, checkpoint: Checkpoint, on_progress: OnProgress, offered: SharedWeights | None = None
) -> Formation:
    """Start ranks as `start_executor` does, and be ready to start others after them.

    They compute with the weights of another engine that are `offered`, if these are those of the checkpoint. With
    `heal` off the first line is the last one, and so it is on a GPU in this process: its errors stay with that.
    """
    config = settle(config, checkpoint)
    with ExitStack() as stack:
        has_gpu_here = config.executor.launcher == "inline" and config.executor.device == "cuda"
        if not config.healing.heal or has_gpu_here:
            executor, capacity = start_executor(config, checkpoint, on_progress)
            return Formation(config, Line(FIRST_EPOCH, executor, {}), capacity, stack.pop_all())
        holder: RankHolder = Holder()
        placement = None
        if config.executor.launcher == "ray":
            placement = stack.enter_context(open_placement(config, on_progress))
            config = placement.config
            holder = placement.holder()
        presence = Presence(config)
        stack.callback(presence.close)
        # Of experts that move nobody knows, after a fault, which are where.
        memory = FormationMemory(config.parallel.world_size, holder, holds_weights=not config.parallel.enable_eplb)
        stack.callback(memory.close)
        lines = stack.enter_context(Lines(config, checkpoint, placement))
        if may_share(config):
            checkpoint.fingerprint  # noqa: B018  (now, as long as its files are what the ranks read)
        found = NO_MEMORY if offered is None else _borrow(memory, offered, config, checkpoint)
        timeout_s = config.executor.start_timeout_s
        line, capacity = start_first_line(lines, on_progress, presence.show, timeout_s, found)
        with ExitStack() as on_failure:  # later it is one line among others
            on_failure.callback(line.executor.close)
            memory.take(line.told)
            recovery = Recovery(_effective_healing(config), lines, capacity, memory, presence)
            stack.callback(recovery.close)
            on_failure.pop_all()
        resizer = Resizer(config, checkpoint, lines)
        return Formation(config, line, capacity, stack.pop_all(), recovery, resizer)


def _effective_healing(config: Config) -> HealingConfig:
    """Without what has no effect, as a warning has said."""
    is_inline = config.executor.launcher == "inline"
    return msgspec.structs.replace(config.healing, standby=0) if is_inline else config.healing


def _borrow(
    memory: FormationMemory, offered: SharedWeights, config: Config, checkpoint: Checkpoint
) -> Mapping[int, HeldMemory]:
    """What the first line finds: the weights that another engine offers, if they are the same and still there."""
    if not may_share(config):
        return NO_MEMORY
    if offered.kind != kind_of(config, checkpoint):
        log.info("another replica's weights are not those of this one's checkpoint, which is read")
        return NO_MEMORY
    try:
        memory.borrow(offered.ranks)
    except (PeerDiedError, FrameError, OSError) as error:  # OSError: no descriptors
        log.warning("another replica's weights cannot be had, and the checkpoint is read: %s", error)
        return NO_MEMORY
    log.info("the ranks compute with the weights of another replica")
    return memory.of_ranks()


def _cannot_resize(config: Config, size: Size, asked: Size) -> ConfigError:
    """Where there is no other line than the first."""
    field = "data_parallel_size" if asked.data_parallel_size != size.data_parallel_size else "tensor_parallel_size"
    is_inline = config.executor.launcher == "inline"
    reason = "launcher is inline, and must be local or ray" if is_inline else "heal is off, and must be on"
    return ConfigError(field, getattr(asked, field), f"for ranks to be replaced, {reason}")

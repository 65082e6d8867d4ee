"""Lines of one formation: how each is started, beside another one that computes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from phalanx.config import Config
from phalanx.errors import DeadlineError, StartError
from phalanx.executor.executor import Executor, OnProgress
from phalanx.executor.launcher import Killable
from phalanx.executor.line_plan import Capacity, LinePlan
from phalanx.executor.local import LocalLauncher, LocalLaunchers
from phalanx.executor.start import open_placement, start_executor
from phalanx.ledger.verdict import HOPELESS, Cause
from phalanx.ledger.watch_order import WatchOrder
from phalanx.membership.ending import Ending
from phalanx.membership.forgetting import forget_locals
from phalanx.memory.held import HeldMemory
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.worker import FIRST_EPOCH

if TYPE_CHECKING:
    from phalanx.executor.ray.placement import RayPlacement

ENDS_AFTER_S: Mapping[Cause, float] = MappingProxyType(
    dict.fromkeys(HOPELESS, 0.0) | dict.fromkeys(("stopped", "gil", "late", "behind", "hung"), 0.5)
)
"""After a verdict that stands for so long, ranks are ended. Who was stopped may go on, and who is late may come; but to
wait for it costs more than to do without. Not for one that computes (slow), or would if it had a core: its successor
would do the same; nor for one that takes long to start (overdue). These have deadlines."""

ENDS_AFTER_WITH_GPUS_S: Mapping[Cause, float] = MappingProxyType({**ENDS_AFTER_S, "gone": 0.0})
"""The kernel says that a process has ended when it has given back what that had of a GPU, a tenth of a second after its
beginning. The peers of a rank that ends need as long for their ends, and need not wait for that one's."""

END_DEADLINE_S = 30.0
_END_AGAIN_S = 0.05


class ShowLine(Protocol):
    """Lets others look at a line."""

    def __call__(self, order: WatchOrder | None, epoch: int) -> None:
        """`order` says where its journals on this host are."""


NO_MEMORY: Mapping[int, HeldMemory] = MappingProxyType({})


class Line(NamedTuple):
    """One set of ranks at one epoch, ready to step."""

    epoch: int
    executor: Executor
    told: Mapping[int, HeldMemory]
    """What its ranks have that can be held."""
    pids: Callable[[], Mapping[int, int]] = dict
    """Processes of its ranks on this host, as far as they are known."""


def end(line: Line) -> None:
    """End its ranks and let go of what they used. Raises DeadlineError."""
    line.executor.kill()
    line.executor.close()
    forget_locals(line.executor.failure)


class Interruption:
    """Lets another thread end a start that is under way. For one start at a time."""

    def __init__(self) -> None:
        self._ranks: Killable | None = None
        self.is_set = False

    def note(self, ranks: Killable) -> None:
        """Those that the start makes. Raises StartError if it has been ended before it had any."""
        self._ranks = ranks
        self.check()

    def check(self) -> None:
        """Raises StartError if the start has been ended."""
        if self.is_set:
            raise StartError("a line", "starting", "it is not needed any more")

    def begin(self) -> None:
        """Have the start fail, now or when it comes to its end."""
        self.is_set = True
        if (ranks := self._ranks) is not None:
            ranks.kill()

    def end(self, starting: threading.Thread) -> None:
        """Have the start fail; returns when its thread has ended. Raises DeadlineError."""
        expires_at = time.monotonic() + END_DEADLINE_S
        while starting.is_alive():
            self.begin()  # again and again: there may have been nothing to kill yet
            starting.join(_END_AGAIN_S)
            if time.monotonic() > expires_at:
                raise DeadlineError("the end of a start", f"thread {starting.name}", END_DEADLINE_S)


class Lines:
    """Starts lines of ranks: local ones on one fork server, Ray's on the same placement, and one in this process.

    For any thread, but in this process one line is started at a time. A context manager, which closes the placement.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint, placement: RayPlacement | None = None) -> None:
        """`config` is settled. `placement`: of ranks with Ray."""
        self._config = config
        self.checkpoint = checkpoint
        """What lines that start from now on are made from."""
        self._placement = placement
        self._launchers = LocalLaunchers()
        self._epochs = itertools.count(FIRST_EPOCH)
        self._endings: tuple[Ending, ...] = ()

    def start(
        self,
        on_progress: OnProgress,
        *,
        capacity: Capacity | None = None,
        memory: Mapping[int, HeldMemory] = NO_MEMORY,
        show: ShowLine | None = None,
        timeout_s: float | None = None,
        is_awaited: bool = False,
        interruption: Interruption | None = None,
        config: Config | None = None,
        placement: RayPlacement | None = None,
    ) -> tuple[Line, Capacity]:
        """As `start_executor`, at the next epoch. `show` is called before its ranks start; `config`, if it is not that
        of the other lines, is settled, too, and with Ray goes with a `placement` of its own. With `is_awaited` requests
        wait for it; with `interruption` it starts beside a line that computes. Those that `end` has ended are awaited
        first: a GPU has no room for three."""
        self.await_ends(interruption)
        told: dict[int, HeldMemory] = {}
        launchers: list[LocalLauncher] = []
        epoch = next(self._epochs)
        config = config or self._config
        plan = LinePlan(
            epoch=epoch,
            capacity=capacity,
            memory=memory,
            keeps_memory=True,
            tell_memory=told.update,
            ends_after_s=ENDS_AFTER_WITH_GPUS_S if _has_gpus_here(config) else ENDS_AFTER_S,
            show=partial(show or _show_nothing, epoch=epoch),
            timeout_s=timeout_s,
            is_beside=interruption is not None and placement is None,
            is_awaited=is_awaited,
            note=(interruption or Interruption()).note,
        )

        def new_launcher(environment: Mapping[str, str]) -> LocalLauncher:
            launcher = self._launchers.launcher(environment)
            launchers.append(launcher)
            return launcher

        executor, capacity = start_executor(
            config,
            self.checkpoint,
            on_progress,
            new_launcher=new_launcher,
            placement=placement or self._placement,
            line=plan,
        )
        return Line(epoch, executor, told, launchers[-1].pids if launchers else dict), capacity

    def end(self, line: Line) -> None:
        """Kill its ranks and let go of what they used, in the background."""
        self._endings = (*(ending for ending in self._endings if not ending.is_done), Ending(line.epoch, line.executor))

    @property
    def endings(self) -> tuple[Ending, ...]:
        """Of those that `end` has ended, who may still be there."""
        return tuple(ending for ending in self._endings if not ending.are_gone)

    def await_ends(self, interruption: Interruption | None = None) -> None:
        """Block until none is. Raises DeadlineError, and StartError if the start is interrupted that it is for."""
        began_at = time.monotonic()
        for ending in self.endings:
            while not ending.wait(_END_AGAIN_S):
                if interruption is not None:
                    interruption.check()
                if (waited_s := time.monotonic() - began_at) > END_DEADLINE_S:
                    raise ending.late(waited_s)

    @property
    def go_on_beside(self) -> bool:
        """Whether a line that stands ready goes on while the ranks before it still end: it takes a tenth of a second,
        and more for each further one, until a GPU has given back what they had. It must heed what they may still write.
        """
        return _has_gpus_here(self._config)

    @property
    def lacks_room(self) -> str | None:
        """What is missing on the nodes of a cluster, while a start waits for room. For any thread."""
        return None if self._placement is None else self._placement.lacks_room

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Lines that are placed from now on are to come to other nodes of the cluster."""
        if self._placement is not None:
            self._placement.avoid(nodes)

    @property
    def avoided(self) -> tuple[str, ...]:
        """The nodes of a cluster that lines are not to come to."""
        return () if self._placement is None else self._placement.avoided

    def find_placement(self, config: Config, on_progress: OnProgress, *, shares: bool) -> RayPlacement | None:
        """Places on the nodes of a cluster for a line of this configuration, beside one that computes; whoever asks
        closes them. With `shares` ranks may be where those of that line are. None without a cluster.

        Blocks for seconds. Raises PlacementError, and as `open_placement`.
        """
        if self._placement is None:
            return None
        return open_placement(config, on_progress, beside=self._placement, shares=shares)

    def resize(self, config: Config, placement: RayPlacement | None) -> RayPlacement | None:
        """Lines that are started from now on have this configuration, which is settled, and this placement; gives back
        the one that lines have had before, if they were with Ray."""
        before, self._config, self._placement = self._placement, config, placement
        if before is not None and placement is not None:
            placement.avoid(before.avoided)
        return before

    def close(self) -> None:
        """End the ranks of all lines, of those that are just starting, too. May be called more than once."""
        self._launchers.close()
        if self._placement is not None:
            self._placement.kill()
        for ending in self._endings:
            ending.join(END_DEADLINE_S)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._placement is not None:
            self._placement.close()


def _has_gpus_here(config: Config) -> bool:
    return config.executor.device == "cuda" and config.executor.launcher == "local"


def _show_nothing(order: WatchOrder | None, epoch: int) -> None:
    """It stands behind another line, which is the one to see."""

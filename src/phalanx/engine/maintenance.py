"""Other weights for a model that serves, its sleep and its wake: what is done to ranks between the steps of a brain.

Each is a script that asks all ranks for one thing after the other, while the brain goes on as far as it may. Whoever
runs the brain carries the script on between its turns; so faults are healed as those of steps are, and the script is
told that ranks are new.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.errors import CheckpointError, MaintenanceError, NotNowError, PhalanxError, RequestError, UserError
from phalanx.executor.line_plan import Capacity
from phalanx.executor.pending import Pending
from phalanx.memory.shared_weights import SharedWeights, decode_shared, encode_shared
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.models.same_model import check_same_model
from phalanx.protocol.client import (
    Maintained,
    MaintenanceOrder,
    MaintenancePhase,
    MaintenanceStats,
    Reload,
    Sleep,
    Wake,
)
from phalanx.protocol.worker import (
    Allocated,
    CommandBody,
    DropWeights,
    FallAsleep,
    ReadWeights,
    ReplyBody,
    TakeWeights,
    WakeUp,
    WeightsRead,
)

READ_POLL_S = 0.05
TURN_S = 0.005
"""Between two turns, where there are no steps to be made meanwhile."""

Script = Generator[CommandBody | None, list[ReplyBody] | None, None]
"""Yields what to ask all ranks for and gets their answers; or None, to go on in the next turn."""

log = logging.getLogger("phalanx.engine")


class MaintainedRanks(Protocol):
    """What a script needs of a formation."""

    capacity: Capacity

    @property
    def has_weights_of_checkpoint(self) -> bool:
        """Whether what ranks compute with can be read again."""

    @property
    def shares_weights(self) -> bool:
        """Whether ranks of another engine may compute with the memory of their weights, too."""

    def can_adopt(self, weights: SharedWeights, checkpoint: Checkpoint) -> bool:
        """Whether ranks may compute with these, as they may with this checkpoint's. Raises CheckpointError."""

    def adopt_weights(self, weights: SharedWeights) -> None:
        """All ranks are about to take them, after `begin_change`."""

    def submit(self, body: CommandBody, *, deadline_s: float) -> Pending[list[ReplyBody]]:
        """As Executor.submit, to all ranks."""

    def hold(self, replies: Sequence[ReplyBody]) -> None:
        """Hold what they say that they have now (Allocated), and no more. Raises PeerDiedError, FrameError,
        DeadlineError and MaintenanceError: then nothing is held.
        """

    def rest_standby(self) -> None:
        """Have no line stand ready before `renew_standby`. Blocks until there is none; raises DeadlineError."""

    def renew_standby(self) -> None:
        """Have one stand ready again, if there is to be one. Never blocks."""

    def begin_change(self, checkpoint: Checkpoint) -> None:
        """Its weights are about to come into ranks: those that come after a fault meanwhile read all of them."""

    def end_change(self) -> None:
        """They are in all ranks."""


class RanksReplacedError(MaintenanceError):
    """A fault was healed: the ranks are others, which have read the formation's checkpoint or have what was held."""


class Maintenance:
    """Of one brain and its formation. Belongs to the brain's thread."""

    def __init__(self, config: Config, checkpoint: Checkpoint, brain: Brain, ranks: MaintainedRanks) -> None:
        """`checkpoint` as it was when the ranks read it."""
        self.checkpoint = checkpoint
        """What they compute with."""
        self._config = config
        self._brain = brain
        self._ranks = ranks
        self._level = 0
        self._script: Script | None = None
        self._has_begun = False
        self._are_new = False
        """Ranks that came before what is to be done had begun: they are awake."""
        self._tells = True
        """Whether somebody waits for the end of the script."""
        self._command: CommandBody | None = None
        self._pending: Pending[list[ReplyBody]] | None = None
        self._phase: MaintenancePhase = "reading"
        self._done = self._total = 0
        self._num_readings = 0
        self._outcome = Maintained()

    @property
    def is_busy(self) -> bool:
        """Whether `turn` has something to do."""
        return self._script is not None

    @property
    def is_asleep(self) -> bool:
        """Whether no step can be made before a Wake."""
        return self._level > 0

    @property
    def is_idle(self) -> bool:
        """Whether ranks have their weights, and nothing is about to be done to them."""
        return self._script is None and not self._level

    @property
    def stats(self) -> MaintenanceStats | None:
        """What is under way, or the state that ranks are in; None while they just serve."""
        if self._script is None and not self._level:
            return None
        phase = self._phase if self._script is not None else "asleep"
        return MaintenanceStats(phase, self._level, self._done, self._total)

    def begin(self, order: MaintenanceOrder) -> None:
        """From now on `turn` carries it out. Changes nothing yet.

        Raises NotNowError beside another one, or in the wrong state, and CheckpointError that names what differs, or is
        wrong.
        """
        if self._script is not None:
            raise NotNowError(f"the engine is {self._phase}: ask again when that is over")
        self._outcome = Maintained()
        if isinstance(order, Reload):
            self._start(self._reload(self._checkpoint_for(order), order))
        elif isinstance(order, Sleep):
            self._check_sleep(order)
            self._start(self._sleep(order))
        else:
            self._start(self._wake(self._checkpoint_after(order), order.weights))

    def turn(self) -> Maintained | None:
        """Go on as far as that does not mean to wait. Gives the outcome when it is over, once.

        Raises what ends the ranks. If that is healed, `ranks_replaced` is to be called.
        """
        if self._script is None:
            return None
        replies = None
        if self._command is not None:
            if self._pending is None:
                self._pending = self._ranks.submit(self._command, deadline_s=self._config.executor.start_timeout_s)
            if not self._pending.done():
                return None
            replies, self._pending = self._pending.result(), None
        return self._advance(replies)

    def ranks_replaced(self) -> Maintained | None:
        """The ranks are new, and awake; the brain has rewound. Gives the outcome if it is over with that."""
        self._pending = None
        if self._script is not None and not self._has_begun:
            self._are_new = True
            return None
        if self._script is not None:
            return self._advance(
                RanksReplacedError("ranks were replaced after a fault, and with them what they had read")
            )
        if self._level:
            self._start(self._lie_down(), tells=False)
        return None

    def _start(self, script: Script, *, tells: bool = True) -> None:
        self._script, self._tells = script, tells
        self._has_begun = self._are_new = False
        self._command = None
        self._done = self._total = 0

    def _advance(self, news: list[ReplyBody] | RanksReplacedError | None) -> Maintained | None:
        assert self._script is not None
        self._has_begun = True
        try:
            if isinstance(news, RanksReplacedError):
                self._command = self._script.throw(news)
            else:
                self._command = self._script.send(news)
            return None
        except StopIteration:
            outcome = self._outcome
        except PhalanxError as error:
            log.warning("%s", error)
            outcome = Maintained(str(error), isinstance(error, UserError))
        self._script = self._command = None
        return outcome if self._tells else None

    # ---------------------------------------------------------------------------- what may be begun

    def _checkpoint_for(self, order: Reload) -> Checkpoint:
        if self._level:
            raise NotNowError(f"the engine is asleep (level {self._level}): wake it first")
        return self._find(order.model)

    def _checkpoint_after(self, order: Wake) -> Checkpoint:
        if self._level != 2 and order.model is not None:
            raise NotNowError(f"other weights come with a wake from level 2 only: the engine is at level {self._level}")
        return self._find(order.model) if self._level == 2 else self.checkpoint

    def _check_sleep(self, order: Sleep) -> None:
        if order.level not in (1, 2):
            raise RequestError("level", order.level, "1, or 2 to give back the weights, too")
        if self._level > order.level:
            raise NotNowError(f"the engine is asleep at level {self._level}, which has no weights: wake it first")
        if not self._ranks.capacity.gives_back:
            raise NotNowError("these GPUs' driver cannot give memory back in pieces, so there is nothing to sleep for")
        if order.level == 2:
            if not self._ranks.has_weights_of_checkpoint:
                raise NotNowError("a method has changed the weights, and the checkpoint does not have them: sleep at 1")
            self.checkpoint.fingerprint  # noqa: B018  (now, as long as its files are what the ranks have read)

    def _find(self, model: str | None) -> Checkpoint:
        """Raises CheckpointError if it cannot take the place of the one in use."""
        path = self.checkpoint.path if model is None else Path(os.path.expanduser(model))
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such directory where the engine runs")
        found = resolve(str(path))
        check_same_model(self.checkpoint, found)
        return found

    # ---------------------------------------------------------------------------- scripts

    def _reload(self, new: Checkpoint, order: Reload) -> Script:
        expires_at = time.monotonic() + order.timeout_s
        self._phase = "reading"
        try:
            shared = self._adoptable(order.weights, new)
            if shared is None:
                yield from self._read(new, expires_at, in_place=False)
            if order.when == "idle":
                yield from self._drain(expires_at)
            yield from self._to_boundary()
            self._ranks.rest_standby()
        except PhalanxError as error:
            self._brain.go_on()
            self._ranks.renew_standby()
            yield DropWeights()
            raise _failed("the weights were not replaced, and the old ones serve", error) from error
        self._phase = "switching"
        self._ranks.begin_change(new)
        try:
            yield from self._take(shared)
        except RanksReplacedError:
            log.warning("ranks failed while they took new weights: others have read these")
        self._ranks.end_change()
        self._become(new)
        self._brain.recompute()
        self._brain.go_on()
        self._ranks.renew_standby()

    def _adoptable(self, weights: bytes, new: Checkpoint) -> SharedWeights | None:
        """Those of another engine on this host, if these are what ranks would read. Raises CheckpointError."""
        shared = decode_shared(weights) if weights else None
        if shared is None or self._ranks.can_adopt(shared, new):
            return shared
        log.warning("the weights that another replica shares are of another kind: ranks read their own")
        return None

    def _take(self, shared: SharedWeights | None) -> Script:
        """Have all ranks take what they have read, or these."""
        is_shared = self._ranks.shares_weights
        if shared is not None:
            self._ranks.adopt_weights(shared)
            replies = yield TakeWeights(is_shared, encode_shared(shared))
        else:
            replies = yield TakeWeights(is_shared)
        if is_shared or shared is not None:
            try:
                self._ranks.hold(replies or ())
            except PhalanxError as error:  # they have them all the same
                log.warning("ranks that come after these read the checkpoint: %s", error)

    def _sleep(self, order: Sleep) -> Script:
        if self._level == order.level:
            if self._are_new:
                yield from self._lie_down()
            return
        self._phase = "falling asleep"
        with suppress(RanksReplacedError):  # they have no step under way either
            yield from self._to_boundary()
        try:
            self._ranks.rest_standby()
        except PhalanxError as error:
            self._ranks.renew_standby()
            if not self._level:
                self._brain.go_on()
            raise _failed("the engine is as it was before", error) from error
        self._brain.recompute()
        self._level = order.level
        yield from self._lie_down()

    def _lie_down(self) -> Script:
        """Have all ranks sleep, also those that come after a fault meanwhile."""
        self._phase = "falling asleep"
        while True:
            try:
                if self._level == 2:
                    self._ranks.begin_change(self.checkpoint)
                replies = (yield FallAsleep(self._level, self._ranks.shares_weights)) or ()
                break
            except RanksReplacedError:
                pass
        try:
            self._ranks.hold(replies)
        except PhalanxError as error:  # they sleep all the same
            log.warning("the ranks sleep, and what they still have will be lost with them: %s", error)

    def _wake(self, new: Checkpoint, weights: bytes) -> Script:
        if not self._level:
            return
        self._phase = "waking"
        try:
            if self._level == 2:
                self._ranks.begin_change(new)
                shared = self._adoptable(weights, new)
                if shared is None:
                    yield from self._read(new, None, in_place=True)
                yield from self._take(shared)
            self._take_awake((yield WakeUp()) or ())
        except RanksReplacedError:
            log.warning("ranks failed while they woke: others are awake, with the weights")
        except PhalanxError as error:
            yield from self._lie_down()
            raise _failed("the engine is still asleep", error) from error
        self._ranks.end_change()
        if self._level == 2:
            self._become(new)
        self._level = 0
        self._brain.go_on()
        self._ranks.renew_standby()

    def _take_awake(self, replies: Sequence[ReplyBody]) -> None:
        """Raises MaintenanceError if one of them lacks memory to wake up with."""
        if lack := next((reply.lack for reply in replies if isinstance(reply, Allocated) and reply.lack), None):
            raise MaintenanceError(lack)
        self._ranks.hold(replies)

    def _read(self, new: Checkpoint, expires_at: float | None, *, in_place: bool) -> Script:
        """Have all ranks read it. Raises what keeps one of them from it."""
        self._phase = "waking" if in_place else "reading"
        self._num_readings += 1
        order = ReadWeights(self._num_readings, str(new.path), new.fingerprint, in_place)
        while True:
            told = [reply for reply in (yield order) or () if isinstance(reply, WeightsRead)]
            self._done, self._total = sum(one.done for one in told), sum(one.total for one in told)
            if error := next((one.error for one in told if one.error is not None), None):
                raise CheckpointError(error)
            if lack := next((one.lack for one in told if one.lack is not None), None):
                raise MaintenanceError(lack)
            if all(one.is_whole for one in told):
                return
            if expires_at is not None:
                _check_time(expires_at, "the new weights")
            poll_at = time.monotonic() + READ_POLL_S
            while time.monotonic() < poll_at:
                yield None

    def _drain(self, expires_at: float) -> Script:
        """Let requests that have come by now run to their ends, and none that comes later begin."""
        self._phase = "waiting for requests"
        self._brain.admit_no_more()
        while self._brain.has_admitted:
            _check_time(expires_at, "the end of the requests that run")
            yield None

    def _to_boundary(self) -> Script:
        """Have steps that are under way be the last ones for now."""
        self._brain.hold()
        while not self._brain.is_between_steps:
            yield None

    def _become(self, new: Checkpoint) -> None:
        is_other = new.path != self.checkpoint.path
        has_new_weights = is_other or new.fingerprint != self.checkpoint.fingerprint or self._phase == "switching"
        self.checkpoint = new
        self._brain.have_other_weights()
        self._outcome = Maintained(has_new_weights=has_new_weights, model=str(new.path) if is_other else None)


def _check_time(expires_at: float, awaited: str) -> None:
    if time.monotonic() > expires_at:
        raise MaintenanceError(f"timeout_s has passed before {awaited}")


def _failed(outcome: str, error: PhalanxError) -> PhalanxError:
    """The same kind of error: who reads it wants to know whose mistake it was, and how things are."""
    kind = CheckpointError if isinstance(error, UserError) else MaintenanceError
    return kind(f"{error}: {outcome}")

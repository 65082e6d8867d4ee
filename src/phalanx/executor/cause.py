"""What has ended a run, of all that is heard at its end: the first word of it is seldom the cause."""

from __future__ import annotations

import time

from phalanx.errors import (
    CollectiveMismatchError,
    DeadlineError,
    DivergedError,
    FrameError,
    HungError,
    PeerDiedError,
    PhalanxError,
    UserError,
    WorkerError,
)
from phalanx.executor.channel import Channel
from phalanx.executor.launcher import Launcher
from phalanx.executor.watching import Watching
from phalanx.protocol.worker import Failure

CHANNEL_ERRORS = (PeerDiedError, DeadlineError, FrameError)
"""A rank or its node is gone, silent, or says what is no message of ours: after any of them the run is over."""

CONSEQUENCES = frozenset(kind.__name__ for kind in (PeerDiedError, DeadlineError, CollectiveMismatchError))
"""What a healthy rank raises because of a sick one: not the cause as long as another rank has something else to say."""

CAUSE_GRACE_S = 1.0
ENDING_S = 10.0
"""For the kernel to end a process that is on its way out; a GPU's memory takes the longest."""
VERDICT_GRACE_S = 2.0
"""Ranks notice a mismatch within microseconds and digests a divergence with the step, the ledger who is to blame for it
within a tenth of a second, or a good second if ranks wait in vain."""


class UserErrorOfRank(UserError):
    """A user's mistake that only a worker could see, such as a checkpoint that does not fit its configuration."""


class CauseFinder:
    """For one end of a run: it reads the channel, so that nobody hears afterwards what was still in it."""

    def __init__(self, world_size: int, launcher: Launcher, channel: Channel, watching: Watching | None) -> None:
        self._world_size = world_size
        self._launcher = launcher
        self._channel = channel
        self._watching = watching

    def cause(self, rank: int, failure: Failure) -> PhalanxError:
        """The error to report of a rank's failure.

        Blocks for CAUSE_GRACE_S at most, for a better one than what a healthy rank says of a sick one.
        """
        expires_at = time.monotonic() + CAUSE_GRACE_S
        cause_rank, cause = rank, failure
        silent = set(range(self._world_size)) - {rank}
        self._channel.forget(rank)  # it ends now, which must not pass for the cause
        while cause.kind in CONSEQUENCES and silent and (remaining_s := expires_at - time.monotonic()) > 0:
            try:
                received = self._channel.get(timeout_s=remaining_s)
            except CHANNEL_ERRORS as error:
                return error
            if received is not None and isinstance(received[1], Failure):
                silent.discard(received[0])
                self._channel.forget(received[0])
                if received[1].kind not in CONSEQUENCES:
                    cause_rank, cause = received[0], received[1]
        if cause.setting is not None:
            return cause.setting.error()
        if cause.is_user_error:
            return UserErrorOfRank(cause.message)
        return WorkerError(cause_rank, cause.node, cause.kind, cause.message, cause.traceback, cause.phase)

    def judged(self, error: PhalanxError) -> PhalanxError:
        """The verdict if it ends the run, whoever was first to say so; else `error`, with what is known beyond it.

        Blocks for VERDICT_GRACE_S at most; for ENDING_S where a rank that is gone has not ended yet.
        """
        if self._watching is not None:
            grace_s = VERDICT_GRACE_S if _is_divergence(error) else 0.0
            if not self._watching.ends_diverged:  # for it no rank is ended, but it is to be told before all are
                self._watching.await_last_word(grace_s)
                grace_s = 0.0
            verdict = self._watching.await_hopeless(grace_s)
            if verdict is not None and verdict.cause == "gone":  # its peers were killed for it, and may be gone before
                return self._explain_death(self._death_of(verdict.culprits[0]))
            if verdict is not None:  # then the ranks were killed for it
                hung = HungError(str(verdict), verdict.cause)
                hung.__cause__ = error
                return hung
        standing = self._watching.standing if self._watching is not None else None
        if standing is not None and isinstance(error, DeadlineError):
            return DeadlineError(error.awaited, f"{error.party}; the ledger's verdict: {standing}", error.waited_s)
        if standing is not None and isinstance(error, WorkerError) and error.kind == DeadlineError.__name__:
            said = f"{error.message}; the ledger's verdict: {standing}"  # its peers' deadline may come first
            return WorkerError(error.rank, error.node, error.kind, said, error.traceback, error.phase)
        return self._explain_death(error)

    def _death_of(self, rank: int) -> PhalanxError:
        """What the channel says of this one when its process is gone, whatever becomes of the others."""
        for other in range(self._world_size):
            if other != rank:
                self._channel.forget(other)
        expires_at = time.monotonic() + ENDING_S
        try:
            while (remaining_s := expires_at - time.monotonic()) > 0:
                self._channel.get(timeout_s=remaining_s)
        except CHANNEL_ERRORS as error:
            return error
        return DeadlineError("the end of its process", f"rank {rank}", ENDING_S)

    def _explain_death(self, error: PhalanxError) -> PhalanxError:
        if not isinstance(error, PeerDiedError) or error.rank is None:  # a whole node
            return error
        how = self._exit_of(error.rank)
        return PeerDiedError(error.party, error.pid, how or error.detail)

    def _exit_of(self, rank: int) -> str | None:
        # The queue sees a death before the launcher has collected it.
        expires_at = time.monotonic() + CAUSE_GRACE_S
        while (how := self._launcher.exits().get(rank)) is None and time.monotonic() < expires_at:
            time.sleep(0.005)
        return how


def _is_divergence(error: PhalanxError) -> bool:
    """Whether ranks, or who compares what they have issued, say what the ledger will say, too."""
    is_of_rank = isinstance(error, WorkerError) and error.kind == CollectiveMismatchError.__name__
    return is_of_rank or isinstance(error, DivergedError)

"""What is done to one rank between its steps: other weights take the place of its own, and memory is given back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from phalanx.errors import CheckpointError, DeadlineError
from phalanx.memory.arena import Arena
from phalanx.memory.host import free_host_bytes, trim_heap
from phalanx.memory.shared_weights import decode_shared
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.rank_weights import RankWeights
from phalanx.protocol.worker import (
    Allocated,
    Done,
    DropWeights,
    FallAsleep,
    Maintaining,
    ReadWeights,
    ReplyBody,
    TakeWeights,
    WakeUp,
    WeightsRead,
)
from phalanx.worker.error_text import message_of

END_DEADLINE_S = 60.0


class RankMaintenance:
    """Of one rank that is ready to step. For the use of its thread."""

    def __init__(
        self,
        weights: RankWeights,
        arena: Arena,
        cache: Sequence[str],
        *,
        rank: int,
        ranks_on_host: int,
        enter: Callable[[str], None],
        tell: Callable[[], Allocated],
    ) -> None:
        """`arena` has the weights and the KV cache, whose tensors are called `cache`. `enter` is told each phase;
        `tell` says what the rank has by now.
        """
        self._weights = weights
        self._arena = arena
        self._cache = tuple(cache)
        self._rank = rank
        self._ranks_on_host = ranks_on_host
        self._enter = enter
        self._tell = tell
        self._reading: WeightsReading | None = None

    def carry_out(self, body: Maintaining) -> ReplyBody:
        """Raises what a rank cannot live with: it has then weights of both kinds, or no memory."""
        if isinstance(body, ReadWeights):
            return self._read(body)
        if isinstance(body, FallAsleep):
            return self._fall_asleep(body)
        if isinstance(body, WakeUp):
            return self._wake_up()
        if isinstance(body, TakeWeights):
            return self._take(body)
        if isinstance(body, DropWeights):
            self._drop()
        return Done()

    def close(self) -> None:
        """Read no more."""
        self._drop()

    def _read(self, order: ReadWeights) -> WeightsRead:
        if self._reading is None or self._reading.number != order.number:
            self._drop()
            if order.in_place and (lack := self._restore(self._weights.names)):
                return WeightsRead(0, self._weights.plain_bytes, lack=lack)
            if not order.in_place and (error := self._lack_of_room()):
                return WeightsRead(0, self._weights.plain_bytes, error=error)
            self._reading = WeightsReading(self._weights, order)
        return self._reading.told

    def _lack_of_room(self) -> str | None:
        """Why other weights cannot be read beside those in use."""
        needed, free = self._ranks_on_host * self._weights.plain_bytes, free_host_bytes()
        if needed <= free:
            return None
        return (
            f"on {os.uname().nodename}: new weights are read beside those in use, which takes {_gib(needed)} more "
            f"memory of the host, and {_gib(free)} are free; a sleep of level 2 makes room, and wake can read others"
        )

    def _take(self, order: TakeWeights) -> ReplyBody:
        self._enter("switching weights")
        if order.weights:
            self._drop()
            self._arena.adopt(decode_shared(order.weights).ranks[self._rank])
            self._weights.find()
        else:
            self._take_read(order)
        self._enter("idle")
        return self._tell() if order.is_shared or order.weights else Done()

    def _take_read(self, order: TakeWeights) -> None:
        assert self._reading is not None, "nothing was read"
        # What was read in place lies in memory that has been the rank's own since it fell asleep, whatever the brain
        # could hold of it then.
        if order.is_shared and not self._reading.in_place:
            self._arena.detach(self._weights.places)
        self._weights.take(self._reading.result())
        self._reading = None
        trim_heap()

    def _drop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
            trim_heap()

    def _fall_asleep(self, order: FallAsleep) -> Allocated:
        self._enter("falling asleep")
        self._drop()
        self._arena.release(self._cache)
        if order.level == 2:
            if order.is_shared:
                self._arena.detach(self._weights.places)
            self._weights.let_go(self._arena.release)
        trim_heap()
        torch.cuda.empty_cache()  # what steps without a graph took; nothing where there is no GPU
        self._enter("asleep")
        return self._tell()

    def _wake_up(self) -> Allocated:
        if lack := self._restore(self._cache):
            return Allocated(lack=lack)
        self._enter("idle")
        return self._tell()

    def _restore(self, names: Sequence[str]) -> str | None:
        """Have memory where these tensors lie; or why there is none."""
        try:
            self._arena.restore(names)
        except torch.OutOfMemoryError as error:  # others have taken it meanwhile
            return f"on {os.uname().nodename}: {message_of(error)}"
        return None


class WeightsReading:
    """Weights on their way from a checkpoint into memory, by a thread of its own: steps go on meanwhile."""

    def __init__(self, weights: RankWeights, order: ReadWeights) -> None:
        self.number = order.number
        self.in_place = order.in_place
        self.told = WeightsRead(0, weights.plain_bytes)
        """How far it is."""
        self._weights = weights
        self._order = order
        self._found: dict[str, Tensor] = {}
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._run, name="phalanx-reading", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Tensor]:
        """Of a reading that has told that it is whole."""
        assert self.told.is_whole, self.told
        return self._found

    def cancel(self) -> None:
        """Read no more than the tensor that the thread is at.

        Where that goes to memory of the model's, wait for it. Raises DeadlineError if the files do not answer.
        """
        self._is_cancelled = True
        if self._order.in_place:
            self._thread.join(END_DEADLINE_S)
            if self._thread.is_alive():
                raise DeadlineError("a tensor to be read", self._order.checkpoint, END_DEADLINE_S)

    def _run(self) -> None:
        try:
            self._found = self._weights.read(self._checkpoint(), self._note, in_place=self._order.in_place)
        except _CancelledError:
            return
        except Exception as error:  # whatever it is, who asks how far it is must hear of it
            where = f"on {os.uname().nodename}: "
            self.told = WeightsRead(self.told.done, self.told.total, error=where + message_of(error))
        else:
            self.told = WeightsRead(self.told.total, self.told.total, is_whole=True)

    def _checkpoint(self) -> Checkpoint:
        """Raises CheckpointError if it is not the one that the brain has seen."""
        found = Checkpoint(Path(self._order.checkpoint), self._order.checkpoint)
        if found.fingerprint != self._order.fingerprint:
            raise CheckpointError(
                f"{found.path} has other weights here than where the engine runs, or they have changed"
            )
        return found

    def _note(self, done: int, total: int) -> None:
        if self._is_cancelled:
            raise _CancelledError
        self.told = WeightsRead(done, total)


class _CancelledError(Exception):
    """Nobody wants what is being read."""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"

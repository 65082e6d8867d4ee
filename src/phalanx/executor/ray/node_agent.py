"""The actor that stands for a node beside the driver's: the brain's links end in it, and its memory is the node's."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec

from phalanx.errors import PhalanxError
from phalanx.executor.ray.fate import end_with_raylet
from phalanx.executor.ray.messages import NodeOrder
from phalanx.executor.ray.niceness import as_nice_as_raylet
from phalanx.executor.ray.node_line import NodeLine
from phalanx.executor.ray.rank_actor import introduction
from phalanx.memory.held import decode_held, encode_held
from phalanx.memory.holder import Holder

FAREWELL_S = 0.5
"""For Ray to take the answer along before the process ends."""
MOST_CALLS = 16
"""At a time: the line that runs, one that is let go and one that comes, and what is asked of each."""
TAIL_BYTES = 4096
RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")


class NodeAgent:
    """One node's agent, while lines of ranks come and go there. It is called in several threads at a time.

    Without a line it ends, if no next one comes in time: soon, if the link has broken, as its engine may be gone.
    """

    def __init__(self) -> None:
        end_with_raylet()
        as_nice_as_raylet()
        self._lines: dict[int, NodeLine] = {}
        """By epoch: those that are linked."""
        self._changing = threading.Lock()
        self._holder = Holder()
        self._holding = threading.Lock()
        self._leaving: threading.Timer | None = None

    def introduce(self) -> bytes:
        """Who and where this is: an encoded Introduction."""
        return msgspec.msgpack.encode(introduction())

    def prepare(self, order: bytes) -> bytes:
        """Link a line's ranks on the node to the brain; an encoded NodeReady. Raises RuntimeError that says why it
        cannot be."""
        told = msgspec.msgpack.decode(order, type=NodeOrder)
        try:
            line = NodeLine(told)
            with self._changing:
                self._lines[told.epoch] = line
                self._stay()
            return msgspec.msgpack.encode(line.link())
        except PhalanxError as error:
            self._let_go(told.epoch, told.stay_s)
            raise RuntimeError(str(error)) from None  # an exception of ours does not survive Ray's way of sending it

    def run(self, epoch: int) -> str:
        """Relay until a line's link ends, then say why. If the brain has closed it, the next line is awaited for a
        while; otherwise not for long, and then this process ends."""
        line = self._lines[epoch]
        how, stay_s = "the link broke", FAREWELL_S
        try:
            line.run()
            how, stay_s = "the brain closed its link", line.stay_s
        except PhalanxError as error:
            how = str(error)
        finally:
            self._let_go(epoch, stay_s)
        return how

    def end_ranks(self, epoch: int, timeout_s: float) -> bool:
        """Kill a line's ranks; whether they are gone within `timeout_s`. If it does not run by now, it never will."""
        line = self._lines.get(epoch)
        if line is None:
            return True
        are_gone = line.end_ranks(timeout_s)
        if not line.is_running:
            self._let_go(epoch, line.stay_s)
        return are_gone

    def hold(self, rank: int, told: bytes) -> bytes:
        """Keep what a rank of this node has (an encoded HeldMemory) for those after it; as it is held here, likewise
        encoded. Raises as Holder.hold."""
        with self._holding:
            return encode_held(self._holder.hold(rank, decode_held(told)))

    def drop(self, rank: int) -> None:
        """Let go of it."""
        with self._holding:
            self._holder.drop(rank)

    def tail(self, log: str) -> str:
        """The end of a log file of this node."""
        return tail(log)

    def _let_go(self, epoch: int, stay_s: float) -> None:
        """Of a line; and of the node in `stay_s`, if no other one has come by then."""
        with self._changing:
            line = self._lines.pop(epoch, None)
        try:
            if line is not None:
                line.close()
        finally:  # what cannot be let go ends with the process
            with self._changing:
                if not self._lines:
                    self._stay()
                    self._leaving = threading.Timer(stay_s, os._exit, (0,))
                    self._leaving.daemon = True
                    self._leaving.start()

    def _stay(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None


def tail(log: str) -> str:
    """The last lines of a log, without Ray's own marks; empty if it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if not line.startswith(RAY_MARKS))

"""The ranks of one process group, each a process that runs what a test sends it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from phalanx.collectives.join import join
from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.spec import GroupSpec

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "phalanx.collectives.join", "hypothesis"])
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a task on one rank: its value or its error, and how long it took."""

    value: Any
    error: RankError | None
    took_s: float


class Crew:
    """`size` ranks of a group. Leaving it ends them, whatever state they are in."""

    def __init__(self, backend: str, size: int, timeout_s: float = 20.0, absent: Sequence[int] = ()) -> None:
        self.backend = backend
        self.size = size
        rendezvous = open_rendezvous("tp", backend, size, epoch=3, timeout_s=timeout_s)
        self.spec = rendezvous.spec
        present = [rank for rank in range(size) if rank not in absent]
        self._connections: dict[int, Connection] = {}
        self._processes = {}
        for rank in present:
            self._connections[rank], theirs = _PROCESSES.Pipe()
            self._processes[rank] = _PROCESSES.Process(target=_serve, args=(self.spec, rank, theirs), daemon=True)
            self._processes[rank].start()
            theirs.close()
        self.joining = {rank: self._answer(rank) for rank in present}
        rendezvous.close()

    def run(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The values of `task(group, *arguments)` on all ranks."""
        outcomes = self.outcomes([(task, *arguments)] * self.size)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.value for outcome in outcomes]

    def outcomes(self, tasks: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """What becomes of a task per rank: (function, *arguments)."""
        for rank, task in enumerate(tasks):
            self.send(rank, *task)
        return [self._answer(rank) for rank in range(len(tasks))]

    def send(self, rank: int, task: Callable[..., Any], *arguments: Any) -> None:
        self._connections[rank].send((task, arguments))

    def answers(self, ranks: Sequence[int]) -> list[Outcome]:
        return [self._answer(rank) for rank in ranks]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join(_ANSWER_S)
        for connection in self._connections.values():
            connection.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, rank: int) -> Outcome:
        connection = self._connections[rank]
        if not wait([connection], _ANSWER_S):
            raise AssertionError(f"rank {rank} of {self.backend} gave no answer in {_ANSWER_S} s")
        return Outcome(*connection.recv())


def _serve(spec: GroupSpec, rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if spec.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups: list[Any] = []
    connection.send(_outcome(lambda: groups.append(join(spec, rank, device))))
    if not groups:
        return
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return  # the test is gone
        connection.send(_outcome(partial(task, groups[0], *arguments)))


def _outcome(function: Callable[[], Any]) -> tuple[Any, RankError | None, float]:
    start = time.monotonic()
    try:
        return function(), None, time.monotonic() - start
    except Exception as error:
        return None, RankError(type(error).__name__, str(error)), time.monotonic() - start


class RankError(Exception):
    """An error of a rank, by its class's name and its message: not every error of ours can be pickled."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

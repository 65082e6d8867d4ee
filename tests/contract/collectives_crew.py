"""The ranks of one process group, each a process that runs what a test sends it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from phalanx.collectives.join import join
from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import PeerDiedError
from phalanx.protocol.worker import Call, Publish, Published, WorkerMessage
from phalanx.transport.queue import MessageQueue, QueueHandle, WorkerEndpoint
from phalanx.worker.exchange import BrainExchange

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "phalanx.collectives.join", "hypothesis"])
_ANSWER_S = 60.0
_EPOCH = 3
_LOOPBACK = "127.0.0.1"
# Groups that span hosts, and what carries their data. Without hosts, all ranks have the same address.
_SPANNING = {"spanning": "gloo", "spanning-nccl": "nccl"}


@dataclass(frozen=True)
class Outcome:
    """What came of a task on one rank: its value or its error, and how long it took."""

    value: Any
    error: RankError | None
    took_s: float


class Place(NamedTuple):
    """Where a rank runs: its way to the brain, its host's address, and the host if it is another than this one."""

    queue: QueueHandle
    address: str
    host: Any = None

    def exchange(self) -> BrainExchange:
        endpoint: WorkerEndpoint[Call, WorkerMessage]
        endpoint = WorkerEndpoint.attach(self.queue, command_type=Call, reply_type=WorkerMessage)

        def get(timeout_s: float | None) -> Call | None:
            received = endpoint.get(timeout_s=timeout_s)
            return None if received is None else received[0]

        return BrainExchange(_EPOCH, self.address, partial(endpoint.put, deadline_s=_ANSWER_S), get)


class _Brain:
    """Passes on what ranks publish, as an executor does."""

    def __init__(self, size: int) -> None:
        names = [f"rank {rank}" for rank in range(size)]
        self.queue: MessageQueue[Call, WorkerMessage]
        self.queue = MessageQueue(names, command_type=Call, reply_type=WorkerMessage)
        self._is_ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._is_ending = True
        self.queue.bell.ring()
        self._thread.join()
        self.queue.close()

    def _run(self) -> None:
        unsent: list[Publish] = []
        while not self._is_ending:
            try:
                while unsent:
                    self.queue.put(Call(0, Published((unsent[0],)), ()), deadline_s=_ANSWER_S)
                    del unsent[0]
                received = self.queue.get(timeout_s=None, until=lambda: self._is_ending)
            except PeerDiedError as error:
                self.queue.forget(int(error.party.removeprefix("rank ")))
                continue
            if received is not None and isinstance(received[1], Publish):
                unsent.append(received[1])


class Crew:
    """`size` ranks of a group. Leaving it ends them, whatever state they are in."""

    def __init__(
        self,
        backend: str,
        size: int,
        timeout_s: float = 20.0,
        absent: Sequence[int] = (),
        hosts: Sequence[tuple[Any, str]] = (),
        runs_ahead: bool = False,
    ) -> None:
        """`hosts`: one for each rank, and its address; without it all are on this one."""
        self.backend = backend
        self.size = size
        self._resources = ExitStack()
        places = self._spread(hosts) if backend in _SPANNING else [None] * size
        ranks = tuple(range(size))
        if backend in _SPANNING:
            times = timeout_s, timeout_s
            self.spec = GroupSpec("tp", _SPANNING[backend], ranks, _EPOCH, *times, runs_ahead=runs_ahead)
        else:
            rendezvous = self._resources.enter_context(
                open_rendezvous("tp", backend, ranks, _EPOCH, timeout_s, join_timeout_s=timeout_s)
            )
            self.spec = rendezvous.spec
        present = [rank for rank in range(size) if rank not in absent]
        self._connections: dict[int, Connection] = {}
        self._processes = {}
        for rank in present:
            self._connections[rank], theirs = _PROCESSES.Pipe()
            arguments = (self.spec, rank, places[rank], theirs)
            self._processes[rank] = _PROCESSES.Process(target=_serve, args=arguments, daemon=True)
            self._processes[rank].start()
            theirs.close()
        self.joining = {rank: self._answer(rank) for rank in present}
        if backend not in _SPANNING:
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
        self._resources.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spread(self, hosts: Sequence[Any]) -> list[Place]:
        brain = _Brain(self.size)
        self._resources.callback(brain.close)
        if not hosts:
            return [Place(brain.queue.handle(rank), _LOOPBACK) for rank in range(self.size)]
        return [Place(brain.queue.handle(rank), address, host) for rank, (host, address) in enumerate(hosts)]

    def _answer(self, rank: int) -> Outcome:
        connection = self._connections[rank]
        if not wait([connection], _ANSWER_S):
            raise AssertionError(f"rank {rank} of {self.backend} gave no answer in {_ANSWER_S} s")
        return Outcome(*connection.recv())


def _serve(spec: GroupSpec, rank: int, place: Place | None, connection: Connection) -> None:
    torch.set_num_threads(1)
    with place.host.network() if place and place.host else nullcontext():
        _obey(spec, rank, place.exchange() if place else None, connection)


def _obey(spec: GroupSpec, rank: int, exchange: BrainExchange | None, connection: Connection) -> None:
    device = torch.device("cuda", rank) if spec.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups: list[Any] = []
    connection.send(_outcome(lambda: groups.append(join(spec, rank, device, exchange))))
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

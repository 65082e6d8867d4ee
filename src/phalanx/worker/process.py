"""A rank in a process of its own: attach, load, then serve calls until Stop or until the brain is gone."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch

from phalanx.errors import PeerDiedError
from phalanx.protocol.worker import Call, Progress, Reply, WorkerMessage
from phalanx.transport.queue import WorkerEndpoint
from phalanx.worker.exchange import BrainExchange
from phalanx.worker.failure import describe
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

LOOK_AT_DEVICE_S = 0.0005
"""While a GPU computes and could be given another step, this long passes between two looks at whether it has ended: not
much beside a step, and the looks take less than a tenth of a core."""

PUT_DEADLINE_S = 30.0
"""A reply ring that stays full for this long means that the brain is stuck."""

Endpoint = WorkerEndpoint[Call, WorkerMessage]


class BrainGoneError(Exception):
    """The brain died: there is nobody left to work for."""


def run(spec: WorkerSpec) -> int:
    """Serve one rank; returns the process's exit code. Does not return while the brain lives and has not said Stop."""
    faulthandler.enable(sys.stderr)
    if spec.threads is not None and spec.threads != torch.get_num_threads():  # those of lines of another size
        torch.set_num_threads(spec.threads)
    assert spec.queue is not None
    endpoint: Endpoint = WorkerEndpoint.attach(spec.queue, command_type=Call, reply_type=WorkerMessage)
    with endpoint:

        def put(message: WorkerMessage) -> None:
            try:
                endpoint.put(message, deadline_s=PUT_DEADLINE_S)
            except PeerDiedError as error:
                raise BrainGoneError from error

        def get(timeout_s: float | None) -> Call | None:
            try:
                received = endpoint.get(timeout_s=timeout_s)
            except PeerDiedError as error:
                raise BrainGoneError from error
            return None if received is None else received[0]

        try:
            return _live(spec, BrainExchange(spec.epoch, spec.node_address, put, get), put)
        except BrainGoneError:
            return 1


def _live(spec: WorkerSpec, exchange: BrainExchange, put: Callable[[WorkerMessage], None]) -> int:
    def report(progress: Progress) -> None:
        put(progress)
        exchange.take_in()

    with ExitStack() as stack:
        worker = None
        try:
            worker = Worker(spec, report, exchange)
            stack.callback(worker.close)
            put(Reply(0, worker.load()))
            while not worker.stopped or worker.is_busy:
                _turn(exchange, worker, put)
        except BrainGoneError:
            raise
        except Exception as error:  # whatever it is, the brain must hear of it
            put(describe(worker.phase if worker else "starting", error))
            return 1
    return 0


def _turn(exchange: BrainExchange, worker: Worker, put: Callable[[WorkerMessage], None]) -> None:
    """Take in a call if there is one, send a reply if there is one; sleep only when there can be neither.

    Calls and the device cannot be awaited together. As long as the device has room for another step it is the call that
    is awaited, or the device would have nothing to do when its step ends; with enough to do, it is the device.
    """
    timeout_s = LOOK_AT_DEVICE_S if worker.is_busy else None
    if worker.has_reply or worker.is_full:
        timeout_s = 0.0
    call = exchange.next_call(timeout_s)
    if call is not None:
        worker.accept(call)
    reply = worker.next_reply(block=call is None and worker.is_full and not worker.has_reply)
    if reply is not None:
        put(reply)

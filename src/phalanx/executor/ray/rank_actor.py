"""The actor in which one rank runs. Light until its place is known: torch comes in beside what else there is to do."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import msgspec
import ray

from phalanx.executor.platform import num_cores, thread_environment
from phalanx.executor.ray.fate import end_with, end_with_raylet, raylet_pid
from phalanx.executor.ray.messages import Introduction, Preparation, RankOrder
from phalanx.executor.shared_fate import describe_exit
from phalanx.transport.interfaces import interface_addresses
from phalanx.version import __version__


class RankActor:
    """One rank. `introduce` is called before `run`, each once."""

    def __init__(self) -> None:
        end_with_raylet()

    def introduce(self, preparation: bytes) -> bytes:
        """Take over the environment and begin to import; who and where this is: an encoded Introduction."""
        told = msgspec.msgpack.decode(preparation, type=Preparation)
        for name, value in told.environment.items():
            os.environ.setdefault(name, value)
        threads = told.threads or max(1, num_cores() // told.ranks_on_host)
        os.environ.update(thread_environment(threads))  # Ray has set some of these to suit itself
        self._warm_up = threading.Thread(target=_import_early, args=(told,), name="phalanx-imports", daemon=True)
        self._warm_up.start()
        return msgspec.msgpack.encode(introduction())

    def run(self, order: bytes) -> str:
        """Serve until the brain says Stop; how it ended. Ends the process when the brain, or its node's agent, dies."""
        told = msgspec.msgpack.decode(order, type=RankOrder)
        assert told.spec.queue is not None
        end_with(told.spec.queue.brain)
        if told.visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = told.visible_devices  # Ray shows it its own device alone
        self._warm_up.join()  # transformers cannot be imported by two threads at a time
        from phalanx.worker.process import run

        return describe_exit(run(told.spec))


def introduction() -> Introduction:
    """The calling actor's."""
    context = ray.get_runtime_context()
    return Introduction(
        node_id=context.get_node_id(),
        host=os.uname().nodename,
        pid=os.getpid(),
        raylet_pid=raylet_pid(),
        log=os.readlink("/proc/self/fd/2"),
        version=__version__,
        devices=tuple(map(str, context.get_accelerator_ids().get("GPU", ()))),
        addresses=tuple(interface_addresses()),
    )


def _import_early(told: Preparation) -> None:
    """Bring in what takes seconds. Whatever is wrong shows again, and is reported, when the rank runs."""
    with suppress(Exception):
        import torch  # noqa: F401

        if told.device == "cpu":  # what comes next may look for GPUs, which Ray has not all shown yet
            from phalanx.models.model import import_definition

            import_definition(told.checkpoint)

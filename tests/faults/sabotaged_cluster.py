"""Ranks on the nodes of a Ray cluster, one of which does harm when it is told to; driven line by line.

Usage: python sabotaged_cluster.py CHECKPOINT RAY_ADDRESS FLAGS, on a node of the cluster. Commands come on stdin, and
are answered on stdout, each a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "cluster")]  # Ray has its workers look there as well

from rig import Arrival, Rig  # noqa: E402

from phalanx.errors import PhalanxError  # noqa: E402
from phalanx.ledger.attach import Attached  # noqa: E402
from phalanx.ledger.elsewhere import SHOW_S  # noqa: E402
from phalanx.ledger.instance import shown_by  # noqa: E402
from phalanx.ledger.verdict import Verdict  # noqa: E402
from phalanx.protocol.sampling import SamplingParams  # noqa: E402
from phalanx.worker.methods import remote_method  # noqa: E402

LIMITS = {"max_model_len": 1024, "kv_cache_memory": 1 << 20, "max_num_seqs": 4, "device": "cpu", "threads_per_rank": 1}


class Saboteur:
    """A worker extension: does harm at an all_reduce."""

    def __init__(self, worker: Any) -> None:
        self._rank = worker.spec.rank
        self._groups = worker.groups

    @remote_method
    def sabotage(self, rank: int, fault: str, after: int) -> None:
        """At the all_reduce of `rank` that comes after so many."""
        if rank != self._rank:
            return
        group = next(group for name, group in self._groups.items() if name.startswith("tp"))
        all_reduce, left = group.all_reduce, [after]

        def sabotaged(x: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return all_reduce(x)
            group.all_reduce = all_reduce
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                return all_reduce(x)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            assert fault == "skip the rest"
            group.all_reduce = lambda x: x
            group.all_gather = lambda x, dim=-1: x.new_zeros(*x.shape[:-1], x.shape[-1] * group.size)
            group.broadcast = lambda x, src: x
            return x

        group.all_reduce = sabotaged


class Run:
    """A rig and what it is doing."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._running: threading.Thread | None = None
        self._outcome: dict[str, Any] = {}
        self._told: Verdict | None = None

    def begin(self, num_tokens: int) -> dict[str, Any]:
        """Have tokens made, meanwhile."""
        self._running = threading.Thread(target=self._run, args=(num_tokens,))
        self._running.start()
        return {}

    def end(self) -> dict[str, Any]:
        """Wait for that; the error, if it came to one."""
        assert self._running is not None
        self._running.join()
        return self._outcome

    def sabotage(self, rank: int, fault: str, after: int) -> dict[str, Any]:
        self._rig.executor.collective_rpc("sabotage", (rank, fault, after))
        return {}

    def verdict(self, within_s: float) -> dict[str, Any]:
        """The next one."""
        watching = self._rig.executor._watching
        assert watching is not None
        expires_at = time.monotonic() + within_s
        while (found := watching.verdict) is self._told and time.monotonic() < expires_at:
            time.sleep(0.01)
        if found is None or found is self._told:
            return {}
        self._told = found
        return {"cause": found.cause, "culprits": found.culprits, "nodes": found.nodes, "text": str(found)}

    def all_is_well(self, within_s: float) -> dict[str, Any]:
        """Wait until nothing is wrong any more; `verdict` is what still is."""
        watching = self._rig.executor._watching
        assert watching is not None
        expires_at = time.monotonic() + within_s
        while watching.standing is not None and time.monotonic() < expires_at:
            time.sleep(0.01)
        return {} if watching.standing is None else {"verdict": str(watching.standing)}

    def status(self) -> dict[str, Any]:
        """What another process of this host knows of each rank: node, process, whether it is here, step."""
        time.sleep(2 * SHOW_S)
        (found,) = shown_by(os.getpid())
        assert found.instance is not None
        with Attached(found.instance) as attached:
            ranks = attached.status(None).ranks
        return {"ranks": [[one.node, one.process, one.is_here, one.step] for one in ranks]}

    def _run(self, num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        try:
            self._rig.run([Arrival(0, (1, 2, 3, 4), sampling)])
            self._outcome = {}
        except PhalanxError as error:
            self._outcome = {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    checkpoint, address, flags = sys.argv[1:]
    settings = {"launcher": "ray", "ray_address": address, "ledger": True, **LIMITS, **json.loads(flags)}
    with Rig(Path(checkpoint), worker_extension_cls=f"{Path(__file__).stem}:Saboteur", **settings) as rig:
        run = Run(rig)
        say({"nodes": [placed.node for placed in rig.executor._launcher._processes.placed]})
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            say(getattr(run, command)(*arguments))


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

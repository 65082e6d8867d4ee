"""A torch.distributed program as its Flight Recorders have it, in the form that NCCL's and Gloo's entries have."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phalanx.ledger.flight_recorder import PREFIX

START_NS = 1_700_000_000_000_000_000
Shape = Sequence[int]


class RecordedRank:
    """One rank of a program with the default group of all ranks."""

    def __init__(self, rank: int, size: int, backend: str = "nccl") -> None:
        self.rank = rank
        self.entries: list[dict[str, Any]] = []
        self.first_record = 0
        self.of_no_name: Sequence[int] = ()
        """What Gloo says of the members of a group, and not of which."""
        self._backend = backend
        self._sequences: dict[str, int] = {}
        self._p2p = 0
        ranks = str(list(range(size)))
        self.groups = {"0": {"name": "0", "desc": "default_pg", "ranks": ranks}}

    def join(self, name: str, desc: str, ranks: Sequence[int]) -> None:
        self.groups[name] = {"name": name, "desc": desc, "ranks": str(list(ranks))}

    def collective(
        self, what: str, shape: Shape, *, dtype: str = "Float", group: str = "0", state: str = "completed"
    ) -> None:
        sequence = self._sequences[group] = self._sequences.get(group, 0) + 1
        size = len(self.groups[group]["ranks"].split(","))
        made = [shape[0] * size, *shape[1:]] if what == "_all_gather_base" else list(shape)
        self._add(what, list(shape), made, dtype, state, group=group, collective_seq_id=sequence)

    def send(self, to: int, shape: Shape, state: str = "completed") -> None:
        self._p2p += 1
        self._add(
            f"send {self.rank}->{to}", list(shape), list(shape), "Float", state, is_p2p=True, p2p_seq_id=self._p2p
        )

    def receive(self, source: int, shape: Shape, state: str = "completed") -> None:
        self._p2p += 1
        what = f"recv {self.rank}<-{source}"
        self._add(what, list(shape), list(shape), "Float", state, is_p2p=True, p2p_seq_id=self._p2p)

    def _add(
        self, what: str, given: list[int], made: list[int], dtype: str, state: str, group: str = "0", **more: Any
    ) -> None:
        number = len(self.entries)
        created_ns = START_NS + number * 1_000_000 + self.rank * 1000
        is_over = state == "completed"
        self.entries.append(
            {
                "frames": [{"name": "train", "filename": "train.py", "line": 10 + number}],
                "record_id": number,
                "pg_id": int(group),
                "process_group": (group, self.groups[group]["desc"]),
                "thread_name": "python",
                "thread_id": "1",
                "collective_seq_id": 0,
                "p2p_seq_id": 0,
                "op_id": number + 1,
                "profiling_name": f"{self._backend}:{what}",
                "time_created_ns": created_ns,
                "input_sizes": [given],
                "input_dtypes": [dtype],
                "output_sizes": [made],
                "output_dtypes": [dtype],
                "state": "scheduled" if self._backend == "gloo" else state,
                "time_discovered_started_ns": created_ns if is_over else None,
                "time_discovered_completed_ns": created_ns + 1000 if is_over and self._backend == "nccl" else None,
                "retired": is_over,
                "timeout_ms": 600_000,
                "is_p2p": False,
                **more,
            }
        )

    def recording(self) -> dict[str, Any]:
        no_groups = {"": {"name": "", "desc": "", "ranks": str(list(self.of_no_name))}}
        return {
            "version": "2.10",
            "pg_config": no_groups if self._backend == "gloo" else self.groups,
            "pg_status": {},
            "comm_lib_version": "2.28.9",
            "entries": [entry for entry in self.entries if entry["record_id"] >= self.first_record],
        }


def program(size: int, backend: str = "nccl") -> list[RecordedRank]:
    """Ranks that have been through a few collectives together."""
    ranks = [RecordedRank(rank, size, backend) for rank in range(size)]
    for rank in ranks:
        for what, shape in (("all_reduce", [8, 64]), ("_all_gather_base", [8, 32]), ("broadcast", [8])):
            rank.collective(what, shape)
    return ranks


def write(directory: Path, ranks: Sequence[RecordedRank]) -> Path:
    directory.mkdir(exist_ok=True)
    for rank in ranks:
        (directory / f"{PREFIX}{rank.rank}").write_bytes(pickle.dumps(rank.recording(), protocol=2))
    return directory

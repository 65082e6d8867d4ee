"""The files of PyTorch's Flight Recorder: what each rank of a torch.distributed program noted of its collectives.

One file a rank, its name ending in the rank: a pickle (what c10d writes at a time-out) or JSON (what
`_dump_fr_trace_json` and the debug handlers give), format 2.x as torch 2.11 to 2.13 write it.

Whoever loads a pickle runs what is in it. So these are loaded by an unpickler that knows no class and no function at
all: only None, booleans, numbers, strings and containers of them come out, and a pickle that asks for more is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from phalanx.errors import DumpError

PREFIX = "nccl_trace_rank_"
"""c10d's own."""

Rank = Annotated[int, Meta(ge=0, lt=10**6)]
"""As many digits as the name of a file may end in."""

MOST_FILE_BYTES = 1 << 30
_NAME = re.compile(r"(?P<prefix>.*?)(?P<rank>\d{1,6})(\.json|\.pickle|\.pkl)?")
_FORMAT = re.compile(r"2\.\d+")
_ENDS = re.compile(r"\w+:(?P<what>send|recv) (?P<ours>\d{1,9})(->|<-)(?P<theirs>\d{1,9})")


class Frame(msgspec.Struct, frozen=True):
    """One line of a stack."""

    name: str = ""
    filename: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.filename}:{self.line} in {self.name}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A collective, a point-to-point operation, or one of several that are done as one. Times are Unix nanoseconds."""

    record_id: int
    """Counts all of the rank, from 0 on."""
    process_group: tuple[str, str]
    """Name and description."""
    collective_seq_id: int
    p2p_seq_id: int = 0
    op_id: int = 0
    profiling_name: str
    """Such as nccl:all_reduce, or nccl:send 0->1 with ranks of the group."""
    time_created_ns: int
    input_sizes: list[list[int]] = []
    output_sizes: list[list[int]] = []
    input_dtypes: list[str] = []
    output_dtypes: list[str] = []
    state: str
    """scheduled, started or completed."""
    time_discovered_started_ns: int | None = None
    time_discovered_completed_ns: int | None = None
    retired: bool = False
    """c10d looks after it no longer: it is over, or has failed."""
    timeout_ms: int = 0
    is_p2p: bool = False
    frames: list[Frame] = []
    """Innermost first."""
    pg_id: int = 0
    thread_id: str = ""
    thread_name: str = ""

    @property
    def is_bracket(self) -> bool:
        """Whether it stands for all those before it that were issued as one."""
        return self.profiling_name.endswith("coalesced") and not self.input_sizes

    @property
    def ends(self) -> tuple[int, int] | None:
        """Source and destination of a point-to-point operation, as ranks of the group; None if it names none."""
        found = _ENDS.fullmatch(self.profiling_name)
        if found is None:
            return None
        ends = int(found["ours"]), int(found["theirs"])
        return ends if found["what"] == "send" else (ends[1], ends[0])


_members = msgspec.json.Decoder(tuple[Rank, ...])


class ProcessGroup(msgspec.Struct, frozen=True):
    """Of one rank's process groups."""

    name: str
    desc: str = ""
    ranks: str = "[]"
    """The ranks of the whole program that are in it, as text."""

    @property
    def members(self) -> tuple[int, ...]:
        return _members.decode(self.ranks)


class Status(msgspec.Struct, frozen=True):
    """How far one rank has come in one group."""

    last_enqueued_collective: int
    last_started_collective: int
    last_completed_collective: int


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank has left."""

    version: str
    pg_config: dict[str, ProcessGroup] = {}
    pg_status: dict[str, Status] = {}
    comm_lib_version: str = ""
    entries: list[Entry] = []


class Recordings(NamedTuple):
    """All that was found."""

    ranks: dict[int, Recording]
    written_ns: int
    """When the first of the files was written, or copied: Unix time."""


def read(directory: Path) -> Recordings:
    """The recordings of all ranks, one at least. Raises DumpError that names the file."""
    files = _files(directory)
    if not files:
        raise DumpError(f"{directory} holds no file whose name ends in a rank")
    ranks = {rank: _read_file(path) for rank, path in sorted(files.items())}
    return Recordings(ranks, min(path.stat().st_mtime_ns for path in files.values()))


def write(directory: Path, recordings: Mapping[int, Recording]) -> None:
    """Such that torchfrtrace reads them. `directory` is made, or must be empty. Raises DumpError, OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise DumpError(f"{directory} is not empty: torchfrtrace would read all that is in it")
    for rank, recording in recordings.items():
        (directory / f"{PREFIX}{rank}").write_bytes(pickle.dumps(msgspec.to_builtins(recording), protocol=2))


def is_recording(directory: Path) -> bool:
    """Whether there are files whose names end in a rank."""
    return any(_NAME.fullmatch(path.name) for path in directory.iterdir() if path.is_file())


def _files(directory: Path) -> dict[int, Path]:
    files: dict[int, Path] = {}
    prefixes: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        found = _NAME.fullmatch(path.name)
        if found is None or not path.is_file():
            continue
        rank = int(found["rank"])
        if rank in files:
            raise DumpError(f"{files[rank]} and {path.name} are both of rank {rank}: keep the files of one run only")
        files[rank] = prefixes[found["prefix"]] = path
    if len(prefixes) > 1:
        names = " and ".join(sorted(path.name for path in prefixes.values()))
        raise DumpError(f"{directory} holds files of several kinds, such as {names}: keep those of one run only")
    return files


def _read_file(path: Path) -> Recording:
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise DumpError(f"{path} is larger than {MOST_FILE_BYTES >> 30} GiB")
        content = path.read_bytes()
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error
    try:
        is_json = content.lstrip()[:1] == b"{"
        recording = msgspec.convert(
            msgspec.json.decode(content) if is_json else _unpickled(content, path), Recording, strict=False
        )
        for group in recording.pg_config.values():
            group.members  # noqa: B018 - whether it can be read
    except (msgspec.DecodeError, RecursionError) as error:
        raise DumpError(f"{path} is torn, or is no dump of a Flight Recorder: {error}") from error
    if not _FORMAT.fullmatch(recording.version):
        raise DumpError(f"{path} is of format {recording.version!r}; 2.x is what can be read")
    for entry in recording.entries:
        if entry.is_p2p and not entry.is_bracket and entry.ends is None:
            name = f"{entry.profiling_name!r} of its entry {entry.record_id}"
            raise DumpError(f"{path}: {name} does not say between which ranks, as in nccl:send 0->1")
    return recording


def _unpickled(content: bytes, path: Path) -> object:
    try:
        return _PlainUnpickler(content).load()
    except DumpError as error:
        raise DumpError(f"{path}: {error}") from None
    except Exception as error:  # of a file that is torn it may be any
        raise DumpError(f"{path} is torn, or no pickle: {type(error).__name__}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Makes containers and scalars, and nothing else: it finds no class to make and no function to call."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False)

    def find_class(self, module: str, name: str) -> Any:
        raise DumpError(f"the pickle asks for {module}.{name}: it is not loaded, as a Flight Recorder's has plain data")

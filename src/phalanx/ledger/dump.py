"""What the journals said, in files: whole or not there, and never many.

A dump is a directory: `dump.json` (verdict, groups, facts) and `rank_N.msgpack` for each rank (all that its journal
said). It is written under another name and then renamed. Its size is bounded by that of the journals.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from phalanx.errors import ConfigError, DumpError
from phalanx.ledger.after import Trace, verdict_of
from phalanx.ledger.limits import Limits
from phalanx.ledger.look import Look, RankLook, Unheard
from phalanx.ledger.verdict import Verdict
from phalanx.version import __version__

FORMAT = 1
WHOLE = "dump.json"
MOST_DUMPS = 16
"""In one directory: the oldest go."""

MOST_FILE_BYTES = 64 << 20
DEADLINE_S = 3.0
"""For what is being written when the watcher ends."""

_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}(-[a-z0-9-]+)?")
_PARTIAL = ".partial-"
_STALE_S = 600.0

AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)
log = logging.getLogger("phalanx.ledger")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Of the instance."""

    phalanx: str
    python: str
    system: str
    node: str
    """That the dump was written on."""
    settings: dict[str, str] = {}
    """Those that are not the defaults."""


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """What is not of one rank."""

    format: int
    unix_ns: int
    now_ns: int
    """The same moment by the clock of the records."""
    ranks: tuple[int, ...]
    groups: dict[str, tuple[int, ...]]
    limits: Limits
    unheard: dict[str, Unheard]
    """Nodes of which nothing was heard."""
    unwatched: dict[str, Unheard] = {}
    """Nodes that were there, and of whose ranks nothing was known."""
    verdict: Verdict | None
    facts: Facts


class DumpOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Where dumps go, and what they are to say of the instance."""

    directory: str
    settings: dict[str, str] = {}


class Dumper:
    """Writes dumps, if it is ordered to, in a thread of its own: a disk that hangs must not blind the watcher."""

    def __init__(self, order: DumpOrder | None) -> None:
        self._order = order
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Dumper:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is being written, for DEADLINE_S at most."""
        if self._thread is None or self._order is None:
            return
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            log.warning("a dump to %s was not written within %g s", self._order.directory, DEADLINE_S)

    def take(self, look: Look, verdict: Verdict) -> None:
        """Write one. Never blocks, never raises: what goes wrong is logged."""
        if self._order is None:
            return
        if self._thread is not None and self._thread.is_alive():
            log.warning("no dump of this verdict: the last one is still being written to %s", self._order.directory)
            return
        arguments = (self._order, look, verdict)
        self._thread = threading.Thread(target=_write_or_warn, args=arguments, name="phalanx-dump", daemon=True)
        self._thread.start()


def _write_or_warn(order: DumpOrder, look: Look, verdict: Verdict) -> None:
    try:
        path = write(Path(order.directory), look, verdict, order.settings)
    except OSError as error:
        log.warning("no dump of this verdict: %s cannot be written: %s", order.directory, error.strerror)
    else:
        log.info("what the ranks did: phalanx trace %s", path)


def prepare(directory: str) -> None:
    """Raises ConfigError if no dump could be written there."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        probe = Path(directory) / f"{_PARTIAL}{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ConfigError("ledger_dump", directory, f"a directory that can be written: {error.strerror}") from error


def write(directory: Path, look: Look, verdict: Verdict | None, settings: Mapping[str, str] | None = None) -> Path:
    """A new dump in `directory`; returns its own directory. Older ones go if there are many. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    about = "" if verdict is None else "-".join(["", verdict.cause, *(f"rank-{rank}" for rank in verdict.culprits[:4])])
    path = directory / f"{now:%Y%m%dT%H%M%S.%f}{about}"
    partial = directory / f"{_PARTIAL}{secrets.token_hex(8)}"
    partial.mkdir(mode=0o700)  # texts, stacks and settings are for who runs the program
    try:
        for rank, one in look.ranks.items():
            (partial / _file_of(rank)).write_bytes(msgspec.msgpack.encode(one))
        (partial / WHOLE).write_bytes(msgspec.json.format(msgspec.json.encode(_whole(look, verdict, settings or {}))))
        partial.rename(path)
    except BaseException:  # an interrupt leaves nothing half written either
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _clear_up(directory)
    return path


def read(directory: Path) -> Trace:
    """A dump, or the newest of the dumps in a directory. Raises DumpError."""
    dumps = _dumps(directory)
    if not (directory / WHOLE).is_file() and dumps:
        others = f"the newest of {len(dumps)} dumps in {directory}: {dumps[-1].name}"
        trace = read(dumps[-1])
        return trace._replace(notes=(others, *trace.notes)) if len(dumps) > 1 else trace
    whole = _decode_whole(directory / WHOLE)
    members = {rank for ranks in whole.groups.values() for rank in ranks} | set(whole.ranks)
    found = {rank: directory / _file_of(rank) for rank in whole.ranks}
    ranks = {rank: _decode_rank(path, rank) for rank, path in found.items() if path.exists()}
    look = Look(whole.now_ns, ranks, whole.groups, whole.limits, whole.unheard, whole.unwatched)
    missing = tuple(sorted(members - set(ranks)))
    notes = [f"{found[rank].name} is missing: what rank {rank} did is not known" for rank in missing if rank in found]
    unwatched = {rank: node for node, one in whole.unwatched.items() for rank in one.ranks}
    notes += [f"rank {rank} had not begun" for rank in missing if rank not in {**found, **unwatched}]
    notes += [f"rank {rank} on {node} was not watched: what it did is not known" for rank, node in unwatched.items()]
    verdict = whole.verdict or verdict_of(look, frozenset(missing))
    return Trace("phalanx", look, whole.unix_ns - whole.now_ns, verdict, missing, tuple(notes))


def is_dump(directory: Path) -> bool:
    """Whether there are dumps of ours: the directory is one, or holds some."""
    return (directory / WHOLE).is_file() or bool(_dumps(directory))


def _file_of(rank: int) -> str:
    return f"rank_{rank}.msgpack"


def _whole(look: Look, verdict: Verdict | None, settings: Mapping[str, str]) -> Whole:
    return Whole(
        format=FORMAT,
        unix_ns=time.time_ns() - time.monotonic_ns() + look.now_ns,
        now_ns=look.now_ns,
        ranks=tuple(look.ranks),
        groups={name: tuple(ranks) for name, ranks in look.groups.items()},
        limits=look.limits,
        unheard=dict(look.unheard),
        unwatched=dict(look.unwatched),
        verdict=verdict,
        facts=Facts(
            phalanx=__version__,
            python=platform.python_version(),
            system=platform.platform(),
            node=platform.node(),
            settings=dict(settings),
        ),
    )


def _dumps(directory: Path) -> list[Path]:
    """The oldest first."""
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / WHOLE).is_file())


def _clear_up(directory: Path) -> None:
    """Old dumps, and what processes that were killed have left half written."""
    for path in _dumps(directory)[:-MOST_DUMPS]:
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f"{_PARTIAL}*"):
        if time.time() - os.lstat(path).st_mtime > _STALE_S:
            shutil.rmtree(path, ignore_errors=True)


class _Versioned(msgspec.Struct):
    format: int


def _decode_whole(path: Path) -> Whole:
    content = _content(path)
    found = _decode(path, content, _Versioned, msgspec.json.decode).format
    if found != FORMAT:
        raise DumpError(f"{path} is of format {found}; this version of phalanx ({__version__}) reads {FORMAT}")
    return _decode(path, content, Whole, msgspec.json.decode)


def _decode_rank(path: Path, rank: int) -> RankLook:
    look = _decode(path, _content(path), RankLook, msgspec.msgpack.decode)
    records, sequences = look.entries.records, look.entries.sequences
    is_sound = len(look.groups) <= len(sequences) and all(0 <= one.group < len(look.groups) for one in records)
    if look.rank != rank or not is_sound:
        raise DumpError(f"{path} is not a dump of rank {rank}")
    return look


def _decode(path: Path, content: bytes, kind: type[AnyStruct], decode: Any) -> AnyStruct:
    try:
        struct: AnyStruct = decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DumpError(f"{path} is torn, or none of ours: {error}") from error
    return struct


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise DumpError(f"{path} is larger than any dump ({MOST_FILE_BYTES >> 20} MiB)")
        return path.read_bytes()
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error

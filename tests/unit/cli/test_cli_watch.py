"""`phalanx watch`: when a signal that was passed on has verdicts withheld, and when not."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from click.testing import CliRunner

from phalanx.cli import watched_command
from phalanx.cli.commands import phalanx
from phalanx.cli.watched_command import GRACE_S, Interruption, _Process, _Watch
from phalanx.errors import ConfigError
from phalanx.ledger.events import Event, EventLines, event_of_command
from phalanx.ledger.program_watcher import Counts
from phalanx.ledger.report import utc_now
from phalanx.ledger.verdict import Verdict

LATE = Verdict(cause="late", culprits=(1,), nodes=("here",), what="does not come")
RUNNING = Counts(begun=4, ended=0)


def after(seconds: float, ranks: Counts, *, then: Counts = RUNNING) -> bool:
    """Whether the command may be ending so long after a signal."""
    interruption = Interruption()
    interruption.came(100.0, then)
    return interruption.may_end(100.0 + seconds, lambda: ranks)


def test_without_a_signal_it_is_not_ending() -> None:
    assert not Interruption().may_end(1e9, lambda: Counts(4, 4))


def test_at_first_it_may_be() -> None:
    assert after(GRACE_S / 2, RUNNING) and after(GRACE_S / 2, Counts(8, 4))


def test_it_goes_on_if_no_rank_has_ended() -> None:
    assert not after(GRACE_S + 1, RUNNING)
    assert not after(GRACE_S + 1, Counts(8, 3), then=Counts(8, 3)), "those have ended before"


def test_it_is_ending_for_as_long_as_it_takes_if_a_rank_has_ended() -> None:
    assert after(3600.0, Counts(4, 1))


def test_it_goes_on_if_others_have_begun() -> None:
    assert not after(GRACE_S + 1, Counts(8, 4))


def test_each_signal_counts_and_what_comes_after_one_is_told() -> None:
    interruption = Interruption()
    interruption.came(100.0, RUNNING)
    interruption.came(100.0 + GRACE_S, Counts(4, 1))
    assert interruption.may_end(100.0 + 3 * GRACE_S, lambda: Counts(4, 1)), "one has ended since the first"
    other = Interruption()
    other.came(100.0, RUNNING)
    assert not other.may_end(101.0 + GRACE_S, lambda: RUNNING)
    assert not other.may_end(102.0 + GRACE_S, lambda: Counts(4, 1)), "hours later a rank is killed"


class OneVerdict:
    """A watcher that finds the same at each look."""

    def counts(self) -> Counts:
        return RUNNING

    def take_news(self) -> None:
        pass

    def look(self, now_ns: int, *, is_last: bool = False) -> Iterator[Verdict]:
        yield LATE


def test_what_is_found_after_a_signal_that_ends_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, watcher, process = tmp_path / "events", OneVerdict(), _Process(["true"], os.environ, ())
    process.wait()
    with EventLines(str(file)) as events:
        watch: Any = _Watch(process, watcher, events, kill=False)  # type: ignore[arg-type]
        watch._interruption.came(watched_command.time.monotonic(), watcher.counts())
        watch._look()
        assert file.read_bytes() == b""
        monkeypatch.setattr(watched_command, "GRACE_S", 0.0)
        watch._look()
    event = msgspec.json.decode(file.read_bytes(), type=Event)
    assert event.verdict == LATE and (event.event, event.level) == ("verdict", "warning")
    assert event.message == str(LATE) and event.command_pid == process.pid and event.time.tzinfo is not None


def test_events_into_a_pipe_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(phalanx, ["watch", "--events", str(tmp_path / "pipe"), "--", "true"])
    assert isinstance(result.exception, ConfigError) and result.exception.field == "--events"


def test_a_reader_of_events_that_is_slow_holds_up_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = _Process(["true"], os.environ, ())
    process.wait()
    with EventLines(str(pipe)) as events:
        while True:
            try:
                os.write(events._fd, b"." * 4096)
            except BlockingIOError:
                break
        _Watch(process, cast(Any, OneVerdict()), events, kill=False)._look()
    os.close(reader)
    assert f"a verdict was not written to {pipe}: Resource temporarily unavailable" in capsys.readouterr().err


def test_an_event_that_was_written_in_part_is_told_of_and_the_next_has_a_line_of_its_own(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    event = event_of_command(LATE, utc_now(), 1)
    with EventLines(str(pipe)) as events:
        with pytest.raises(BlockingIOError, match="nobody takes it"):
            events.write(msgspec.structs.replace(event, message="." * 8192))
        torn = os.read(reader, 1 << 16)
        events.write(event)
    first, second = (torn + os.read(reader, 1 << 16)).splitlines()
    os.close(reader)
    assert first.endswith(b".") and msgspec.json.decode(second, type=Event) == event

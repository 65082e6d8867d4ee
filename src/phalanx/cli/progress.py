"""How far the start is: a table that changes on a terminal, a line per rank and phase elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from phalanx.protocol.client import StartProgress

REFRESHES_PER_S = 8
BAR_WIDTH = 30
COUNTED = {"capturing": "graphs"}
"""What phases count that do not count bytes."""


class _Row(NamedTuple):
    """One rank's."""

    node: str
    progress: StartProgress
    since: float


class _Stderr(Console):
    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Who has read it is gone: that ends no start, as rich would have it, and least of all stdout."""
        self.quiet = True


class StartScreen:
    """Shows `note`d progress on stderr while it is entered. Closing it again does nothing."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Stderr()
        self._rows: dict[int, _Row] = {}
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=REFRESHES_PER_S, transient=True
        )

    def __enter__(self) -> StartScreen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the table away."""
        if self._console.is_terminal:
            self._live.stop()

    def note(self, progress: StartProgress) -> None:
        """Show where a rank stands."""
        row = self._rows.get(progress.rank)
        is_new_phase = row is None or row.progress.phase != progress.phase
        since = time.monotonic() if row is None or is_new_phase else row.since
        node = progress.node or (row.node if row is not None else "")
        self._rows[progress.rank] = _Row(node, progress, since)
        if is_new_phase and not self._console.is_terminal:
            where = f" on {progress.node}" if progress.node else ""
            self._print(f"rank {progress.rank}: {progress.phase}{where}")

    def _print(self, line: str) -> None:
        """On a full disk, there is nobody to tell, and the start goes on."""
        with suppress(OSError):
            self._console.print(line, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        has_nodes = any(row.node for row in self._rows.values())
        for title in ("rank", *(("node",) if has_nodes else ()), "phase", "", "", "time"):
            table.add_column(title, justify="right" if title in ("rank", "time") else "left", no_wrap=True)
        for rank, row in sorted(self._rows.items()):
            progress = row.progress
            bar = ProgressBar(total=progress.total or 1, completed=progress.done, width=BAR_WIDTH)
            amount = _amount(progress) if progress.total else ""
            cells = [str(rank), *((row.node,) if has_nodes else ()), progress.phase]
            table.add_row(*cells, bar, amount, f"{time.monotonic() - row.since:.0f} s")
        return table


def _amount(progress: StartProgress) -> str:
    if progress.phase in COUNTED:
        return f"{progress.done} of {progress.total} {COUNTED[progress.phase]}"
    return f"{decimal(progress.done)} of {decimal(progress.total)}"

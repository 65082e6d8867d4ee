"""How far the start is: a line per rank that changes on a terminal, a line per rank and phase elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from phalanx.protocol import StartProgress


class StartScreen:
    """Shows `note`d progress on stderr while it is entered. Closing it again does nothing."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._phases: dict[int, str] = {}
        self._tasks: dict[int, TaskID] = {}
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("rank {task.fields[rank]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
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
        """Take the changing lines away."""
        if self._console.is_terminal:
            self._live.stop()

    def note(self, progress: StartProgress) -> None:
        """Show where a rank stands."""
        is_new_phase = self._phases.get(progress.rank) != progress.phase
        self._phases[progress.rank] = progress.phase
        if self._console.is_terminal:
            self._draw(progress, is_new_phase)
        elif is_new_phase:
            self._console.print(f"rank {progress.rank}: {progress.phase}", highlight=False, soft_wrap=True)

    def _draw(self, progress: StartProgress, is_new_phase: bool) -> None:
        task = self._tasks.get(progress.rank)
        if task is None:
            task = self._tasks[progress.rank] = self._live.add_task("", rank=progress.rank, amount="")
        if is_new_phase:
            self._live.reset(task)
        # A phase that counts nothing has an empty bar: for rich a total of None means the one before.
        amount = f"{decimal(progress.done)} of {decimal(progress.total)}" if progress.total else ""
        self._live.update(
            task, description=progress.phase, completed=progress.done, total=progress.total or 1, amount=amount
        )

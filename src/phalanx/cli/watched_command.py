"""A command that runs to its end while its ranks are watched."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import click

from phalanx.errors import ConfigError
from phalanx.ledger.confirmation import LOOK_S
from phalanx.ledger.environment import recorded
from phalanx.ledger.events import EventLines, event_of_command
from phalanx.ledger.program_watcher import Counts, ProgramWatcher
from phalanx.ledger.registry import Registry
from phalanx.ledger.report import utc_now
from phalanx.ledger.verdict import Verdict

GRACE_S = 10.0
"""For a command that is to end: before it is killed, or, if it was sent a signal, before it is taken to go on."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_FROM_KERNEL = 0x80
_KILLED = 128

log = logging.getLogger("phalanx.ledger")


def run_watched(command: Sequence[str], *, patience_s: float, events: EventLines | None, kill: bool) -> int:
    """Run it; the exit code, as a shell has it. Blocks until it ends. Raises ConfigError if it cannot be started."""
    with Registry() as registry, ProgramWatcher(registry, patience_s) as watcher:
        # Before the start: a signal that came between would end this process, and leave the command behind.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
        try:
            process = _Process(command, recorded(os.environ, registry.place), blocked)
            try:
                return _Watch(process, watcher, events, kill=kill).run()
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        finally:
            while _pending(_FORWARDED) is not None:  # it was for a command that has ended
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _pending(numbers: Iterable[int]) -> signal.struct_siginfo | None:
    """A signal that has come and was not taken; None if there is none."""
    return signal.sigtimedwait(numbers, 0)


class Interruption:
    """A signal of the user's: whether the command ends by it. As long as it may, what its ranks do is no finding."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._ranks_then = Counts(0, 0)

    def came(self, now_s: float, ranks: Counts) -> None:
        """There was one."""
        if self._at_s is None:
            self._ranks_then = ranks
        self._at_s = now_s

    def may_end(self, now_s: float, ranks: Callable[[], Counts]) -> bool:
        """Whether the command may be ending because of it.

        It goes on if in GRACE_S no rank has ended, or others have begun since.
        """
        if self._at_s is not None and now_s - self._at_s > GRACE_S:
            then, now = self._ranks_then, ranks()
            if now.begun > then.begun or now.ended == then.ended:
                self._at_s = None
        return self._at_s is not None


class _Process:
    """The command's. Unlike a subprocess.Popen it can be given another signal mask than this process has; and it has
    the descriptors that were meant for it, such as those of a make that shares out its jobs."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], blocked: Iterable[int]) -> None:
        """Blocks until the program runs. Raises ConfigError if it cannot be started."""
        try:
            self.pid = os.posix_spawnp(
                command[0], tuple(command), environment, setsigmask=blocked, setsigdef=_IGNORED_BY_PYTHON
            )
        except OSError as error:
            raise ConfigError("COMMAND", command[0], f"a program that can be run ({error.strerror})") from error
        self.returncode: int | None = None
        """Once it is known to have ended: its exit code, or the number of the signal that ended it, negated."""

    def poll(self) -> int | None:
        """The returncode."""
        return self._reap(os.WNOHANG)

    def wait(self) -> None:
        """Block until it has ended."""
        self._reap(0)

    def send_signal(self, number: int) -> None:
        """As long as it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class _Watch:
    """One run of a command."""

    def __init__(self, process: _Process, watcher: ProgramWatcher, events: EventLines | None, *, kill: bool) -> None:
        self._process = process
        self._watcher = watcher
        self._events = events
        self._kill = kill
        self._interruption = Interruption()
        # One that is ignored is so by the command, too: as by nohup.
        self._forwarded = [one for one in _FORWARDED if signal.getsignal(one) is not signal.SIG_IGN]
        self._is_blind = False
        self._killed_at: float | None = None

    def run(self) -> int:
        while (code := self._process.poll()) is None:
            self._take_signal()
            self._look()
            if self._killed_at is not None and time.monotonic() - self._killed_at > GRACE_S:
                self._process.send_signal(signal.SIGKILL)
        if _pending(self._forwarded) is not None:  # that is what the command ended by
            self._note_interruption()
        self._look(is_last=True)
        if self._killed_at is not None:
            self._watcher.end_ranks()
        if not self._watcher.counts().begun and not self._may_end():
            self._say("no process of the command has used torch.distributed and been watched")
        return code if code >= 0 else _KILLED - code

    def _take_signal(self) -> None:
        """Wait for one until the next look is due, and pass it on."""
        info = signal.sigtimedwait((*self._forwarded, signal.SIGCHLD), LOOK_S)
        if info is None or info.si_signo == signal.SIGCHLD:
            return
        self._note_interruption()
        if info.si_code != _FROM_KERNEL:  # the terminal's Ctrl-C goes to the command as well
            self._process.send_signal(info.si_signo)

    def _note_interruption(self) -> None:
        self._interruption.came(time.monotonic(), self._watcher.counts())

    def _look(self, *, is_last: bool = False) -> None:
        if self._is_blind:
            return
        try:
            if self._may_end():
                self._watcher.take_news()
                return
            verdicts = self._watcher.look(time.monotonic_ns(), is_last=is_last)
        except Exception:  # a fault of ours must not end the command
            log.exception("the command is not watched any more")
            self._is_blind = True
            return
        for verdict in verdicts:
            if self._killed_at is None:
                self._tell(verdict)

    def _may_end(self) -> bool:
        """Whether the command may be ending because of a signal that was passed on."""
        return self._interruption.may_end(time.monotonic(), self._watcher.counts)

    def _tell(self, verdict: Verdict) -> None:
        self._say(f"verdict: {verdict}")
        if self._events is not None:
            try:
                self._events.write(event_of_command(verdict, utc_now(), self._process.pid))
            except OSError as error:  # a full disk
                self._say(f"a verdict was not written to {self._events.path}: {error.strerror}")
        if self._kill and verdict.is_hopeless and self._process.returncode is None:
            self._say("the command is ended, since its ranks can never meet again")
            self._killed_at = time.monotonic()
            self._process.send_signal(signal.SIGTERM)

    def _say(self, what: str) -> None:
        """The command goes on also where nobody reads what is said."""
        with suppress(OSError):
            click.echo(f"phalanx watch: {what}", err=True)

"""The process that watches the ranks of this host, and what it finds."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress

import msgspec

from phalanx.errors import DeadlineError, StartError
from phalanx.executor.beats import CHECK_S, SILENT_CHECKS, Beats
from phalanx.executor.shared_fate import describe_exit
from phalanx.executor.watcher_process import END_DEADLINE_S, lines_of, reap, spawn_watcher
from phalanx.ledger.reporting import ReportOrder
from phalanx.ledger.verdict import HOPELESS, Cause, Verdict
from phalanx.ledger.watch_order import WatchOrder, stop_word

SPAWN_DEADLINE_S = 30.0

MAX_RESTARTS = 5
RESTARTS_WITHIN_S = 60.0
"""A watcher that has ended as often in this time would do so again: the next one is started when it is over."""

SOON_S = 0.02
"""Who collects a rank's end knows how it was within milliseconds of it..."""

ENDING_S = 3.0
"""... but that of a process with a GPU comes when the kernel has given back its memory."""

ENDS_WITHOUT_HOPE: Mapping[Cause, float] = dict.fromkeys(HOPELESS, 0.0)
"""Ranks that live and can never meet again are ended at once."""

_POLL_S = 0.005
_verdicts = msgspec.json.Decoder(Verdict | None)

log = logging.getLogger("phalanx.ledger")


class Watching:
    """A watcher in a process of its own, from its start to `close`. Logs its verdicts.

    One that ends unasked is replaced, MAX_RESTARTS times at once: journals and what stands are not the watcher's. One
    that hangs is killed, and so replaced.
    """

    def __init__(
        self,
        order: WatchOrder | ReportOrder,
        on_hopeless: Callable[[], None] | None,
        ending_of: Callable[[int], str | None] = lambda rank: None,
        ends_after_s: Mapping[Cause, float] = ENDS_WITHOUT_HOPE,
    ) -> None:
        """Calls `on_hopeless`, in another thread, once a verdict has stood for as long as `ends_after_s` says of its
        cause; of others it does nothing but tell, and so of ranks that may just lack a core: these have their
        deadlines. By default it is called for what ranks can never meet after. Raises StartError.

        None where nothing is done about any, such as in a watcher that reports to another node's. `ending_of` says how
        a rank has ended, as far as is known by now; it must not block.
        """
        self._ends_after_s = ends_after_s if on_hopeless is not None else {}
        self.order = None if isinstance(order, ReportOrder) else msgspec.structs.replace(order, other_nodes=None)
        """What other processes may know of it: without the key of the other nodes' watchers."""
        self._on_hopeless = on_hopeless
        self._ending_of = ending_of
        self._found: Verdict | None = None
        self._standing: Verdict | None = None
        self._ended_for: Verdict | None = None
        self._patience: threading.Timer | None = None
        self._changed = threading.Condition()
        self._is_closing = self._is_silent = False
        self._has_watcher = True
        """Whether there is a watcher, or will be in a moment."""
        self._ended_before: frozenset[int] = frozenset()
        """Ranks that had when it was silenced."""
        self._process: subprocess.Popen[bytes] | None = None
        self._hung: subprocess.Popen[bytes] | None = None
        """The last one that was killed for it."""
        self._num_restarts = 0
        self._restarted_at: deque[float] = deque(maxlen=MAX_RESTARTS)
        held = ExitStack()
        try:
            order = _with_own_listener(order, held)
            self._beats = Beats()
            held.callback(self._beats.close)
            stop_read, self._stop_write = os.pipe()
            held.callback(os.close, stop_read)
        except OSError as error:  # of too many descriptors
            held.close()
            raise StartError("the watcher", "starting", str(error)) from error
        spawned: Future[subprocess.Popen[bytes]] = Future()
        # The kernel kills the watcher when the *thread* that started it ends: it must be one that lives as long.
        self._thread = threading.Thread(
            target=self._run, args=(order, stop_read, held, spawned), name="phalanx-watching", daemon=True
        )
        try:
            self._thread.start()
            spawned.result(SPAWN_DEADLINE_S)
        except BaseException as error:  # also a KeyboardInterrupt: what has been started then ends by itself
            self._stop()
            if self._thread.ident is None:  # it has not begun
                held.close()
            if isinstance(error, OSError | RuntimeError):  # TimeoutError is one; no more threads are the other
                reason = str(error) or f"waited {SPAWN_DEADLINE_S} s"
                raise StartError("the watcher", "starting", reason) from error
            raise

    @property
    def ends_diverged(self) -> bool:
        """Whether ranks are ended that have diverged, instead of saying so themselves in the call that is wrong."""
        return "diverged" in self._ends_after_s

    @property
    def verdict(self) -> Verdict | None:
        """What was found last, whether it still stands or not."""
        return self._found

    @property
    def standing(self) -> Verdict | None:
        """What is wrong now."""
        return self._standing

    def await_verdict(self, timeout_s: float) -> Verdict | None:
        """Block until there is one, or there will be none, for `timeout_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._found is not None or not self._has_watcher, timeout_s)
            return self._found

    def await_last_word(self, timeout_s: float) -> None:
        """Block until a verdict says that the run is over, or none will, for `timeout_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_said_its_last or not self._has_watcher, timeout_s)

    def await_hopeless(self, timeout_s: float) -> Verdict | None:
        """Block until ranks were ended for one, or will be for none, for `timeout_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_settled or not self._has_watcher, timeout_s)
            return self._ended_for

    def silence(self) -> None:
        """Tell nothing from now on but of ranks that had ended before: ranks end that shall end. Returns at once;
        `close` sees to the watcher's end."""
        ranks = self.order.ranks if self.order is not None else ()
        self._ended_before = frozenset(one.rank for one in ranks if self._ending_of(one.rank) is not None)
        self._is_silent = True
        self._stop(self._ended_before)

    def close(self) -> None:
        """End the watcher; none is left when this returns. Raises DeadlineError if the kernel cannot end it."""
        self._stop()
        self._thread.join(END_DEADLINE_S)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join(END_DEADLINE_S)
            if self._thread.is_alive():
                watcher = f"the watcher (pid {self._process.pid})"
                raise DeadlineError("the end after SIGKILL", watcher, END_DEADLINE_S)

    @property
    def _has_said_its_last(self) -> bool:
        return self._found is not None and self._found.is_final

    @property
    def _is_settled(self) -> bool:
        """Whether ranks were ended, or will not be."""
        is_only_told = self._found is not None and self._found.cause not in self._ends_after_s
        return self._ended_for is not None or (self._has_said_its_last and is_only_told)

    def _patience_with(self, verdict: Verdict) -> float | None:
        """How long it has to stand before ranks are ended for it; None if they are not."""
        stands_s = self._ends_after_s.get(verdict.cause)
        return None if stands_s and verdict.is_of_a_busy_host else stands_s

    def _stop(self, ended: Collection[int] = ()) -> None:
        """Have the watcher end, whoever else has inherited the pipe; tell of these ranks before, if it has not yet."""
        with self._changed:
            self._is_closing = True
            self._be_patient(None)
            self._changed.notify_all()
        if self._stop_write >= 0:
            stop, self._stop_write = self._stop_write, -1
            with suppress(BrokenPipeError):
                os.write(stop, stop_word(ended))
            os.close(stop)

    def _run(
        self, order: WatchOrder | ReportOrder, stop: int, held: ExitStack, spawned: Future[subprocess.Popen[bytes]]
    ) -> None:
        with held:
            try:
                self._process = process = self._spawn(order, stop)
            except OSError as error:
                spawned.set_exception(error)
                return
            spawned.set_result(process)
            while self._listen(process):
                how = "hung" if process is self._hung else f"has ended, {describe_exit(process.returncode)}"
                if (another := self._start_another(order, stop, how)) is None:
                    break
                self._process = process = another
        self._note_watcher(False)

    def _note_watcher(self, is_there: bool) -> None:
        with self._changed:
            self._has_watcher = is_there
            self._changed.notify_all()

    def _listen(self, process: subprocess.Popen[bytes]) -> bool:
        """Take in what a watcher says until it ends. Whether there should be one still."""
        try:
            for line in lines_of(process, CHECK_S, lambda: self._look_after(process)):
                self._take(_verdicts.decode(line))
        except Exception:  # also of `on_hopeless`: a watcher that nobody listens to must not go on
            log.exception("what the watcher says is lost: nobody says any more who is to blame")
            process.kill()
            return False
        finally:
            reap(process)
        return not self._is_closing and not self._has_said_its_last

    def _look_after(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a watcher that does not look any more: it is the ledger's silence."""
        if not self._is_closing and self._beats.have_stopped():
            silent_s = SILENT_CHECKS * CHECK_S
            log.warning("the watcher (pid %d) has not looked for %.0f s, and is killed", process.pid, silent_s)
            self._hung = process
            process.kill()  # which one in a call that cannot be interrupted does not notice before that is over

    def _start_another(self, order: WatchOrder | ReportOrder, stop: int, how: str) -> subprocess.Popen[bytes] | None:
        """In place of one that has ended; blocks if that has happened too often. None if there is to be none."""
        while self._may_start_another(how):
            self._num_restarts += 1
            log.warning("the watcher %s: another one is started", how)
            try:
                return self._spawn(self._order_after(order), stop)
            except OSError as error:
                how = f"could not be started: {error}"
        return None

    def _may_start_another(self, how: str) -> bool:
        """At once, or when there have not been too many any more. False if it is to be closed before."""
        if len(self._restarted_at) == MAX_RESTARTS:
            wait_s = self._restarted_at[0] + RESTARTS_WITHIN_S - time.monotonic()
            if wait_s > 0:
                log.warning(
                    "the watcher %s, as have %d in %.0f s before it: the next one is started in %.0f s, and until then "
                    "nobody says who hangs",
                    *(how, MAX_RESTARTS, RESTARTS_WITHIN_S, wait_s),
                )
                self._note_watcher(False)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closing, wait_s)
        self._restarted_at.append(time.monotonic())
        self._note_watcher(not self._is_closing)
        return not self._is_closing

    def _order_after(self, order: WatchOrder | ReportOrder) -> WatchOrder | ReportOrder:
        """For one that takes the place of another one."""
        if isinstance(order, WatchOrder):
            return msgspec.structs.replace(order, standing=self._standing, num_restarts=self._num_restarts)
        watch = msgspec.structs.replace(order.watch, num_restarts=self._num_restarts)  # the judge counts them
        return msgspec.structs.replace(order, watch=watch)

    def _spawn(self, order: WatchOrder | ReportOrder, stop: int) -> subprocess.Popen[bytes]:
        """Start a watcher. Raises OSError; nothing is left of it then."""
        self._beats.begin()
        return spawn_watcher(order, stop, self._beats.descriptor)

    def _take(self, verdict: Verdict | None) -> None:
        ends_now = verdict is not None and self._patience_with(verdict) == 0.0
        how = None
        if verdict is not None and verdict.cause == "gone" and not ends_now:
            how = self._ending(verdict.culprits[0], SOON_S)
        if verdict is not None and how is not None:
            verdict = _with_ending(verdict, how)
        if self._is_silent:
            if verdict is not None and verdict.cause == "gone" and verdict.culprits[0] in self._ended_before:
                _log(verdict)
            return
        if verdict is not None:
            _log(verdict)
        elif self._standing is not None:
            log.info("over: %s", str(self._standing).partition("\n")[0])
        with self._changed:
            self._standing = verdict
            self._found = verdict or self._found
            self._be_patient(verdict)
            self._changed.notify_all()
        if verdict is not None and ends_now:
            self._end_ranks(verdict)
        if verdict is not None and verdict.cause == "gone" and how is None:
            self._add_ending(verdict)

    def _be_patient(self, verdict: Verdict | None) -> None:
        """From now on this one stands: ranks are to be ended for it, and for none before it."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        stands_s = self._patience_with(verdict) if verdict is not None else None
        if not stands_s or self._is_closing:
            return
        self._patience = threading.Timer(stands_s, self._end_ranks, (verdict,))
        self._patience.daemon = True
        self._patience.start()

    def _end_ranks(self, verdict: Verdict) -> None:
        with self._changed:
            if self._is_closing or self._standing is not verdict:
                return
            self._ended_for = verdict
            self._changed.notify_all()
        assert self._on_hopeless is not None
        self._on_hopeless()

    def _add_ending(self, verdict: Verdict) -> None:
        """What was told of a rank that is gone did not wait for how it ended."""
        how = self._ending(verdict.culprits[0], ENDING_S)
        if how is None or self._is_silent:
            return
        log.error("how rank %d on %s ended: %s", verdict.culprits[0], verdict.nodes[0], how)
        with self._changed:
            self._found = self._standing = _with_ending(verdict, how)

    def _ending(self, rank: int, timeout_s: float) -> str | None:
        """How a rank's process ended, which only its parent is told; None if not in time."""
        expires_at = time.monotonic() + timeout_s
        while (how := self._ending_of(rank)) is None and time.monotonic() < expires_at and not self._is_closing:
            time.sleep(_POLL_S)
        return how


def _log(verdict: Verdict) -> None:
    log.log(logging.ERROR if verdict.is_final else logging.WARNING, "verdict: %s", verdict)


def _with_ending(verdict: Verdict, how: str) -> Verdict:
    return msgspec.structs.replace(verdict, what=f"is gone: {how}")


def start_watching(
    order: WatchOrder | ReportOrder,
    on_hopeless: Callable[[], None] | None = None,
    ending_of: Callable[[int], str | None] = lambda rank: None,
    ends_after_s: Mapping[Cause, float] = ENDS_WITHOUT_HOPE,
) -> Watching | None:
    """A watcher, or none, with a warning, if it cannot be started: the ranks do without."""
    try:
        return Watching(order, on_hopeless, ending_of, ends_after_s)
    except StartError as error:
        log.warning("no ledger: %s", error)
        return None


def _with_own_listener(order: WatchOrder | ReportOrder, held: ExitStack) -> WatchOrder | ReportOrder:
    """The same, with a descriptor that whoever made it does not close, but this stack: each watcher needs it."""
    if isinstance(order, ReportOrder) or order.other_nodes is None:
        return order
    listener = os.dup(order.other_nodes.listener)
    held.callback(os.close, listener)
    others = msgspec.structs.replace(order.other_nodes, listener=listener)
    return msgspec.structs.replace(order, other_nodes=others)

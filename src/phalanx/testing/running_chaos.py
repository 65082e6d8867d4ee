"""One fault in an instance that runs already, under whatever load it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import msgspec

from phalanx.errors import FrameError, PeerDiedError, UserError
from phalanx.ledger.attach import Attached
from phalanx.ledger.instance import Instance, running, shown_by
from phalanx.ledger.verdict import Verdict
from phalanx.testing.chaos import Outcome
from phalanx.testing.faults import Fault, Injected
from phalanx.testing.mailbox import Mailbox
from phalanx.testing.oracle import NOTHING, assess
from phalanx.transport.liveness import is_running

LOOK_S = 0.002
AGAIN_S = 10.0
"""An instance is well again so long after a fault at the latest, or never."""


def find_instance(pid: int) -> Instance:
    """The instance of this engine's process, or of the server in front of it. Raises UserError."""
    for found in running():
        one = found.instance
        if one is not None and pid in (one.pid, one.parent_pid):
            if one.order is None:
                raise UserError(f"process {pid} keeps no ledger: there would be no verdict")
            return one
    raise UserError(f"process {pid} is no instance of this user and version: phalanx doctor --running shows them")


def try_faults(instance: Instance, faults: tuple[Fault, ...], *, patience_s: float = 20.0) -> Iterator[Outcome]:
    """One after the other, as long as the instance lives, in the ranks that it has by then; waits `patience_s` for each
    to happen, and for its verdict.

    Raises UserError if the instance does not allow it.
    """
    for fault in faults:
        with ExitStack() as stack:
            attached = _well(instance, stack)
            if attached is None:
                return
            pids = {rank.rank: rank.pid for rank in attached.status(None).ranks if rank.is_here}
            mailbox = stack.enter_context(Mailbox(pids.get(fault.rank) or instance.pid))
            yield _try(attached, mailbox, fault, patience_s)


def _try(attached: Attached, mailbox: Mailbox, fault: Fault, patience_s: float) -> Outcome:
    before = attached.notice().counts
    began_at = time.monotonic()
    mailbox.send(fault)
    injected: list[Injected] = []
    while not injected and mailbox.refusal() is None and time.monotonic() < began_at + patience_s:
        time.sleep(LOOK_S)
        injected = mailbox.injected()
    told_ns, verdict = 0, None
    expires_at = time.monotonic() + patience_s
    while injected and verdict is None and time.monotonic() < expires_at:
        time.sleep(LOOK_S)
        notice = attached.notice()
        if notice.counts != before:
            told_ns, verdict = time.monotonic_ns(), notice.verdict
    outcome = _outcome(fault, mailbox.injected(), verdict, told_ns, time.monotonic() - began_at)
    return msgspec.structs.replace(outcome, error=mailbox.refusal() or "")


def _outcome(fault: Fault, injected: list[Injected], verdict: Verdict | None, told_ns: int, took_s: float) -> Outcome:
    last = msgspec.structs.replace(injected[-1], at_ns=injected[0].at_ns) if injected else None
    is_told = last is not None and verdict is not None
    return Outcome(
        fault=fault,
        injected=last,
        verdict=verdict,
        error="",
        told_after_s=(told_ns - last.at_ns) / 1e9 if last is not None and is_told else None,
        rightness=assess(fault, last, verdict) if verdict is not None and last is not None else NOTHING,
        took_s=took_s,
    )


def _well(instance: Instance, stack: ExitStack) -> Attached | None:
    """Attached to the ranks that it has now, when no verdict stands any more and all are there; None if that never is.

    After a fault that is healed these are others than before.
    """
    expires_at = time.monotonic() + AGAIN_S
    while time.monotonic() < expires_at and is_running(instance.pid):
        with ExitStack() as attaching, suppress(PeerDiedError, FrameError):
            for found in shown_by(instance.pid):
                if found.instance is not None and found.instance.order is not None:
                    attached = attaching.enter_context(Attached(found.instance))
                    ranks = attached.status(None).ranks
                    if attached.standing() is None and all(rank.phase in ("idle", "stepping") for rank in ranks):
                        stack.push(attaching.pop_all())
                        return attached
        time.sleep(LOOK_S)
    return None

"""The exceptions by which Phalanx says what is wrong.

    PhalanxError
    ├── UserError (ValueError)          the user's mistake: exit code 2, HTTP 400, never a traceback
    │   ├── ConfigError                 a setting: names the field, the value and what is allowed
    │   ├── CheckpointError             the model's files cannot be found or read
    │   ├── UnsupportedModelError       an architecture or quantisation that Phalanx does not run
    │   ├── DumpError                   a dump cannot be read: says which file, and why
    │   ├── PlacementError              the nodes cannot hold the ranks: says what is asked for, there, and missing
    │   ├── ResizeRefusedError          the size cannot be changed now: says what has to end first
    │   │   └── ResizeUnderWayError     it is being changed already: says from what to what
    │   ├── NotNowError                 the engine is at something that this cannot be done beside: says at what
    │   └── RequestError                a request: names the parameter, the value and what is allowed
    ├── StartError                      a rank or process did not come up: says which, in which phase, and why
    ├── DeadlineError (TimeoutError)    a wait ended: says what was awaited, from whom and for how long
    ├── PeerDiedError                   a process that was needed is gone: says which, with its pid
    ├── WorkerError                     an exception in a worker: its type, message, traceback, rank and node
    ├── CollectiveMismatchError         two ranks met in different collectives: says which, in which
    ├── DivergedError                   ranks of one group issued different collectives in a step: says which
    ├── HungError                       ranks can never meet again: the ledger's verdict says who is to blame
    ├── NotHealedError                  after a fault no ranks came up that compute: says what was tried
    ├── ResizeError                     a resize has failed and was undone: says why
    ├── MaintenanceError                weights could not be replaced, or the engine be put to sleep or woken: says why
    ├── FrameError                      bytes that are not a message of ours
    ├── DriverError                     CUDA's driver refused something: its call, name and words for it
    ├── DeviceRefusedError              CUDA's driver refused a whole process: no rank can be in it
    └── EngineDeadError                 the engine has stopped: says why

`assert` is for our own mistakes and never for a user's.
"""

from __future__ import annotations

import re


class PhalanxError(Exception):
    """Anything that Phalanx raises on purpose."""


class UserError(PhalanxError, ValueError):
    """The user's mistake. Shown as one line, without a traceback."""


MAY_HOLD_SECRETS = frozenset({"ray_runtime_env"})
"""Settings of which logs, errors and dumps tell no value: its `env_vars` are where tokens are."""


def as_told(field: str, value: object) -> object:
    """What of a field's value may be told to whoever reads logs: of one that may hold secrets its keys at most."""
    if field not in MAY_HOLD_SECRETS or value is None:
        return value
    return dict.fromkeys(value, "...") if isinstance(value, dict) else "..."


class _FieldError(UserError):
    """A named field holds a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: {as_told(field, value)!r} is not possible: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class ConfigError(_FieldError):
    """A setting is wrong. `allowed` says what would be right."""


class RequestError(_FieldError):
    """A request is wrong. The server answers 400 and goes on."""


class CheckpointError(UserError):
    """The model's files cannot be found or read."""


class UnsupportedModelError(UserError):
    """An architecture or a quantisation that Phalanx does not run. The message lists what it does run."""


class DumpError(UserError):
    """What a ledger or a Flight Recorder has left behind cannot be read. The message names the file."""


class PlacementError(UserError):
    """The nodes cannot hold the ranks as asked for. `table` has a line for each node; its lines are indented."""

    def __init__(self, complaint: str, table: str) -> None:
        super().__init__(f"{complaint}\n{table}")
        self.complaint = complaint
        self.table = table


class ResizeRefusedError(UserError):
    """The size cannot be changed now; the message says what has to end first."""


class ResizeUnderWayError(ResizeRefusedError):
    """Another change of the size must end first."""

    def __init__(self, before: str, asked_for: str) -> None:
        super().__init__(f"a resize from {before} to {asked_for} is under way: wait, or cancel it")


class NotNowError(UserError):
    """What is asked for cannot be done beside what is under way, or in the state that the engine is in."""


class _ProcessError(PhalanxError):
    """Of the process that is called `party`."""

    party: str

    @property
    def rank(self) -> int | None:
        """That the process is; None if it is another one."""
        found = _RANK.fullmatch(self.party)
        return int(found[1]) if found is not None else None


_RANK = re.compile(r"rank (\d+)(?: on .+)?")
"""What everybody calls one."""


class StartError(_ProcessError):
    """A process did not come up."""

    def __init__(self, party: str, phase: str, cause: str) -> None:
        reason, newline, details = cause.partition("\n")
        doing = "" if f", {phase}: " in reason else f" (while {phase})"  # a WorkerError says it by itself
        super().__init__(f"{party} did not start: {reason}{doing}{newline}{details}")
        self.party = party
        self.phase = phase
        self.cause = cause


class DeadlineError(PhalanxError, TimeoutError):
    """A wait came to its deadline."""

    def __init__(self, awaited: str, party: str, waited_s: float) -> None:
        super().__init__(f"waited {waited_s:.3g} s for {awaited} from {party}")
        self.awaited = awaited
        self.party = party
        self.waited_s = waited_s


class PeerDiedError(_ProcessError):
    """A process that was needed is gone."""

    def __init__(self, party: str, pid: int, detail: str = "") -> None:
        super().__init__(f"{party} (pid {pid}) died{': ' + detail if detail else ''}")
        self.party = party
        self.pid = pid
        self.detail = detail


class WorkerError(PhalanxError):
    """An exception in a worker, told to the brain. `phase`: what the worker did; empty for a step or a call."""

    def __init__(self, rank: int, node: str, kind: str, message: str, traceback: str, phase: str = "") -> None:
        doing = f", {phase}" if phase else ""
        super().__init__(f"rank {rank} on {node}{doing}: {kind}: {message}")
        self.rank = rank
        self.node = node
        self.kind = kind
        self.message = message
        self.traceback = traceback
        self.phase = phase


class CollectiveMismatchError(PhalanxError):
    """Ranks of one group met at one sequence number with different operations, dtypes or shapes."""


class DivergedError(PhalanxError):
    """Ranks of one group have issued different collectives in one step, though nobody had to wait for it.

    `ranks` are those to blame: several where they did different things, or where it cannot be told which.
    """

    def __init__(self, message: str, step: int, group: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.group = group
        self.ranks = ranks


class HungError(PhalanxError):
    """Ranks can never meet again. The message is the verdict: which rank, in which step, did what its peers did not.

    `cause` is the verdict's (ledger/verdict.py); empty if it is not known.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class DriverError(PhalanxError):
    """A call of CUDA's driver failed. `name` is what it calls the error, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, name: str, explanation: str) -> None:
        super().__init__(f"{call}: {name}: {explanation}")
        self.call = call
        self.name = name


class DeviceRefusedError(PhalanxError):
    """CUDA's driver does not let this process use a GPU, and will not do so any more. It may let another one."""


class NotHealedError(PhalanxError):
    """A fault ended the ranks, and none came up that go on. The message says which, and what was tried."""


class ResizeError(PhalanxError):
    """The number of replicas could not be changed: there are as many as before, and the message says why."""


class MaintenanceError(PhalanxError):
    """Weights could not be replaced, or the engine be put to sleep or woken. The message says why, and what serves."""


class FrameError(PhalanxError):
    """Bytes that are not a message of ours."""


class EngineDeadError(PhalanxError):
    """The engine has stopped and takes no more requests; the message says why."""

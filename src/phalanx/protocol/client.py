"""What the server's process and the engine's tell each other."""

from __future__ import annotations

from typing import Literal

import msgspec

from phalanx.config import Config
from phalanx.protocol.columns import Ints, LogprobColumns, Message, WrongSetting
from phalanx.protocol.sampling import FinishReason, SamplingParams


class Submit(Message, frozen=True):
    """A checked request. `request_id` is unique among the client's running requests and grows with arrival.

    `output_token_ids` is what another engine has made of it before: this one goes on with the next token. A client that
    may have to do so chooses the seed itself.

    `is_rehearsal`: it asks for one token, which nobody wants, so that the prompt comes to be in the prefix cache. It
    counts for no token.
    """

    request_id: int
    prompt_token_ids: Ints
    sampling: SamplingParams
    output_token_ids: Ints = b""
    is_rehearsal: bool = False


class Cancel(Message, frozen=True):
    """The client no longer wants these requests."""

    request_ids: tuple[int, ...]


FIRST_WEIGHTS_VERSION = 1
"""Of the weights that an engine starts with; each that comes after them has the next number."""

When = Literal["now", "idle"]
"""now: requests that run go on with the new weights. idle: they end with the old ones first."""

SleepLevel = Literal[1, 2]
"""1 gives the KV cache's memory back, 2 that of the weights as well."""


class Reload(Message, frozen=True):
    """Compute with the weights of another checkpoint of the same model, or with what is in the same files by now.

    Answered by Maintained, as Sleep and Wake are. If the new weights are not there, or requests have not ended, within
    `timeout_s`, it has failed; the switch itself has a deadline of its own.
    """

    model: str | None
    """A directory; None for the one in use."""
    when: When
    timeout_s: float
    weights: bytes = b""
    """Of another engine on this host that has them by now, as in Begin: then they need not be read."""


class Sleep(Message, frozen=True):
    """Give memory back until Wake. Requests wait meanwhile."""

    level: SleepLevel


class Wake(Message, frozen=True):
    """Go on after Sleep. At level 2 the weights are read, those of another checkpoint if `model` names one."""

    model: str | None
    weights: bytes = b""
    """As in Reload."""


class Shutdown(Message, frozen=True):
    """End in good order: nothing more is awaited from the brain."""


MaintenanceOrder = Reload | Sleep | Wake


class Resize(Message, frozen=True):
    """Go on with ranks of another grid, or of the same one where they may be by now (AvoidNodes). Answered by
    ResizeBegun, then ResizeEnded; or by that at once."""

    number: int
    """The client's, of this resize."""
    data_parallel_size: int
    tensor_parallel_size: int


class CancelResize(Message, frozen=True):
    """Undo it, if it is not done yet. ResizeEnded tells."""

    number: int


class AvoidNodes(Message, frozen=True):
    """From now on place ranks on other nodes of the cluster than these. Those that are there stay."""

    nodes: tuple[str, ...]


class ShareWeights(Message, frozen=True):
    """Have the ranks' weights be for those of another engine on this host, too. Answered by WeightsShared."""

    number: int
    """The client's, of this question."""


class Begin(Message, frozen=True):
    """The first message: what engine to be."""

    config: Config
    weights: bytes = b""
    """Of another engine on this host, for its ranks to compute with if they are those of the checkpoint: SharedWeights
    as msgpack (memory/shared_weights.py)."""


ClientMessage = Submit | Cancel | Shutdown | Resize | CancelResize | MaintenanceOrder | AvoidNodes | ShareWeights


class StartProgress(Message, frozen=True):
    """Where a rank stands while the engine starts. `done` of `total` bytes, when the phase counts any; graphs while it
    is `capturing`.

    `node` is said once, when it is known; empty for ranks on the engine's own host.
    """

    rank: int
    phase: str
    done: int = 0
    total: int = 0
    node: str = ""


class EngineReady(Message, frozen=True):
    """The engine serves."""

    max_model_len: int
    num_blocks: int
    block_size: int
    world_size: int
    device: str
    dtype: str
    num_replicas: int = 1
    tensor_parallel_size: int = 1
    checkpoint: str = ""
    """The directory that the weights are from, links resolved. Empty after a resize, which does not change it."""


class EngineFailed(Message, frozen=True):
    """The engine did not start, or cannot go on. `is_user_error` tells the user's mistake from a fault.

    `setting` is the one that is wrong, if one is.
    """

    reason: str
    is_user_error: bool
    setting: WrongSetting | None = None
    lacks_room: bool = False
    """Whether it is that the nodes of a cluster cannot hold the ranks."""


class ResizeBegun(Message, frozen=True):
    """There is room: ranks are being started. Until the resize has ended, StartProgress is of these."""

    number: int


class ResizeEnded(Message, frozen=True):
    """A resize is over. If it is not done, the engine is as it was before.

    One that is done or has failed had begun, one that was refused had not; one that is cancelled may have.
    """

    number: int
    ending: Literal["done", "failed", "cancelled", "refused"]
    reason: str = ""
    """Of one that has failed or was refused."""
    setting: WrongSetting | None = None
    """The one that is wrong, if one is."""
    ready: EngineReady | None = None
    """How the engine is now, if it is done."""


class TokenBatch(Message, frozen=True):
    """What one committed step made: one token for each id in `request_ids`, and the requests that have ended.

    A request may end without a token in this batch (cancelled, or an error). `errors` says why for `ERROR`.
    `cached` says once for a request, with its first token, how many prompt tokens came from the prefix cache.
    """

    request_ids: bytes  # int64
    tokens: Ints
    finished: tuple[tuple[int, FinishReason], ...] = ()
    logprobs: LogprobColumns | None = None
    errors: tuple[tuple[int, str], ...] = ()
    cached: tuple[tuple[int, int], ...] = ()


class ReplicaStats(msgspec.Struct, frozen=True, array_like=True):
    """One replica's state, and its counts since the start."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int


class BalanceStats(msgspec.Struct, frozen=True, array_like=True):
    """How even the load of experts is: tokens of the busiest rank over those of the mean one, summed over the layers.

    1.0 is even. Between measurements it stays as it is.
    """

    measured: float
    """Since the measurement before."""
    expected: float
    """Of the same tokens, with experts where they are since then."""
    num_moves: int
    """Layers whose experts have moved since the start, each time counted."""


class FormationStats(msgspec.Struct, frozen=True):
    """The lines of an engine that heals, and its counts since the start."""

    epoch: int
    """Of the line that computes, or did before the fault that is being healed."""
    is_healing: bool
    standby: Literal["none", "preparing", "ready"]
    num_faults: int
    """That ended a line."""
    healed: dict[str, int]
    """Times that a rung brought ranks that compute again."""
    failed: dict[str, int]
    """Times that it did not."""
    num_standby_faults: int
    """Standby lines that did not come up, or did not last."""
    last_pause_s: float
    """From the last fault to a line that takes steps; 0 before the first."""
    last_fault: str = ""
    """What ended a line last, in words that begin with who is to blame, if anybody is; empty before the first."""
    lacks_room: str | None = None
    """What is missing on the nodes of a cluster, while ranks of a lost node wait for room."""
    shares_weights: bool = False
    """Whether the ranks' weights are memory that those of another engine on this host have had from them, or they from
    it."""


MaintenancePhase = Literal["reading", "waiting for requests", "switching", "falling asleep", "asleep", "waking"]


class MaintenanceStats(msgspec.Struct, frozen=True):
    """What is being done to the ranks of an engine, or the state that they were put into."""

    phase: MaintenancePhase
    level: int = 0
    """Of the sleep, if it is one."""
    done: int = 0
    """Of `total` bytes, while weights are read."""
    total: int = 0


class Maintained(Message, frozen=True):
    """A Reload, Sleep or Wake is over.

    With an error weights and state are what they were before. TokenBatches before it were computed with the old weights
    and those after it with the new ones. `model` is the checkpoint in use, if that has become another one.
    """

    error: str | None = None
    is_user_error: bool = False
    is_not_now: bool = False
    """It is another state of the engine that is in the way."""
    has_new_weights: bool = False
    model: str | None = None


class WeightsShared(Message, frozen=True):
    """The answer to ShareWeights."""

    number: int
    weights: bytes
    """As in Begin; empty if there are none to share."""


class EngineStats(Message, frozen=True):
    """The engine's state, sent a few times a second: also a sign of life."""

    replicas: tuple[ReplicaStats, ...]
    balance: BalanceStats | None = None
    """None where experts do not move, and before the first measurement."""
    formation: FormationStats | None = None
    """None where a fault ends the engine."""
    maintenance: MaintenanceStats | None = None
    """None while nothing of it is under way."""
    nodes: tuple[str, ...] = ()
    """By rank, the name of the node of a cluster that it is on. Empty where all are on this host."""
    avoided: tuple[str, ...] = ()
    """Nodes that no rank comes to any more (AvoidNodes): where none is now, none will be. Empty while ranks are being
    replaced, as these may have got their places before."""


EngineMessage = (
    StartProgress
    | EngineReady
    | EngineFailed
    | TokenBatch
    | EngineStats
    | ResizeBegun
    | ResizeEnded
    | Maintained
    | WeightsShared
)

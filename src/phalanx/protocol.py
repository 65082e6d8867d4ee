"""Every message between processes: typed structs, encoded by msgspec, never pickled.

Three conversations use them:

    client  → brain     Submit, Cancel, Resize, Reload, Shutdown, ...      (server process to engine process)
    brain   → client    EngineReady, TokenBatch, EngineStats, ...
    brain   → workers   Call(Step | AllocateCache | ...)       (one frame for all workers)
    worker  → brain     Reply(StepResult | ...), StepIssued, Failure, Progress, Publish

What grows with the number of requests travels as columns: the bytes of an int32 or float32 array, in the machine's own
order (every supported machine is little-endian). See `ints` and `as_ints`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.config import Config
from phalanx.errors import ConfigError, RequestError

Ints = bytes
"""Column of int32."""

Floats = bytes
"""Column of float32."""


def ints(values: Sequence[int] | NDArray[np.int32]) -> Ints:
    return np.asarray(values, dtype=np.int32).tobytes()


def as_ints(column: Ints) -> NDArray[np.int32]:
    """The column's numbers, read-only and without a copy."""
    return np.frombuffer(column, dtype=np.int32)


def as_floats(column: Floats) -> NDArray[np.float32]:
    """The column's numbers, read-only and without a copy."""
    return np.frombuffer(column, dtype=np.float32)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Anything that goes from one process to another. Field order is the wire format."""


# -------------------------------------------------------------------------------- requests


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop. Immutable; `check()` is called on every request that comes in."""

    temperature: float = 1.0
    """0 is greedy. Above 0, logits are divided by it."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output already has."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the output already has the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    seed: int | None = None
    """Makes sampling reproducible, whatever else is in the batch."""
    max_tokens: int | None = 16
    """Most tokens to generate; None goes on to the model's length limit."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of this many of the most likely ones; None for none."""

    def check(self) -> None:
        """Raises RequestError for the first value out of range."""
        for field, is_right, allowed in (
            ("temperature", 0.0 <= self.temperature <= 100.0, "from 0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", -1 <= self.top_k < 2**31, "from 1 to 2**31 - 1, or 0 (or -1) for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits"),
            ("max_tokens", self.max_tokens is None or 1 <= self.max_tokens < 2**31, "from 1 to 2**31 - 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (2**31 if self.max_tokens is None else self.max_tokens),
                "from 0 to max_tokens",
            ),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= 64 and all(0 <= token < 2**31 for token in self.stop_token_ids),
                "at most 64 ids, each from 0 to 2**31 - 1",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"from 0 to {MAX_LOGPROBS}",
            ),
        ):
            if not is_right:
                raise RequestError(field, getattr(self, field), f"it must be {allowed}")


MAX_LOGPROBS = 20


class FinishReason(enum.IntEnum):
    """Why a request ended. A stop string is found by the client, which then cancels: it is `STOP` to the user."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


# -------------------------------------------------------------------------------- client → brain


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
"""Requests that run get new weights on the way, or end with the ones before."""

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


# -------------------------------------------------------------------------------- brain → client


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


class WrongSetting(Message, frozen=True):
    """A ConfigError: an exception cannot travel itself, and its text does not know how the user calls the setting."""

    field: str
    value: bool | int | float | str | None
    allowed: str

    @classmethod
    def of(cls, error: Exception) -> Self | None:
        """None if the error is another one."""
        if not isinstance(error, ConfigError):
            return None
        value = error.value if isinstance(error.value, bool | int | float | str | None) else repr(error.value)
        return cls(error.field, value, error.allowed)

    def error(self) -> ConfigError:
        return ConfigError(self.field, self.value, self.allowed)


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


class LogprobColumns(Message, frozen=True):
    """Log-probabilities for some entries of a batch of tokens.

    `entries` are indices into the batch; `chosen` has one number an entry; `top_ids` and `top_logprobs` have `width`
    numbers an entry, most likely first. An entry that asked for fewer than `width` uses the first ones.
    """

    entries: Ints
    chosen: Floats
    width: int
    top_ids: Ints
    top_logprobs: Floats


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


# -------------------------------------------------------------------------------- brain → workers


FIRST_EPOCH = 1
"""The epoch of the membership that a run starts with."""


class StepShape(Message, frozen=True):
    """Of one replica. Those of all replicas are all that the sequence of collectives in a step may depend on, besides
    the Config (invariant 1)."""

    num_tokens: int
    num_rows: int
    num_samples: int


class NewRequest(Message, frozen=True):
    """A request that the workers do not hold: just admitted, or back from preemption.

    `token_ids` is all that is known: the prompt and, after a preemption, the output so far. The first `num_computed` of
    them have their keys and values in `blocks` already (prefix cache).
    """

    slot: int
    token_ids: Ints
    num_prompt: int
    num_computed: int
    blocks: Ints
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]


class StepPlan(Message, frozen=True):
    """One step of a replica, as the difference to what its workers know.

    In this order a worker: forgets the slots in `dropped`, takes in `new`, appends each of `block_ids` to the block
    table of the slot at the same place in `block_slots`, then computes the next `num_tokens[i]` tokens of slot
    `slots[i]` for each row i. Rows with one token come first. A row whose last token is the last one known to the slot
    (prompt, or sampled by an earlier step) samples one more token; the worker appends it to the slot itself, so that
    the next plan need not wait for it.

    In a pipeline the stage that embeds tokens is not the one that samples them. There `tokens` has, for each row that
    computes a token which an earlier step sampled, that token; `token_slots` are these rows' slots, in row order.
    """

    epoch: int
    step: int
    shape: StepShape
    slots: Ints
    num_tokens: Ints
    block_slots: Ints = b""
    block_ids: Ints = b""
    dropped: Ints = b""
    new: tuple[NewRequest, ...] = ()
    token_slots: Ints = b""
    tokens: Ints = b""


class Step(Message, frozen=True):
    """One step of all replicas: the plan of each. All have the same epoch and step.

    A replica without a token to compute computes one of padding, for nobody, if another replica has one: its ranks are
    in the same collectives as their peers.
    """

    plans: tuple[StepPlan, ...]

    @property
    def epoch(self) -> int:
        return self.plans[0].epoch

    @property
    def number(self) -> int:
        return self.plans[0].step


class MeasureMemory(Message, frozen=True):
    """Find out what is left for the KV cache. On GPUs the ranks of a stage run the largest step together, so it comes
    after all have loaded. Stages do not wait for each other, and on a CPU nothing is run.

    Without `sizes_cache` it is known how much there is to be, and all that is found out is whether a GPU's steps can be
    captured; the ranks then run a small step together.
    """

    sizes_cache: bool = True


class AllocateCache(Message, frozen=True):
    """Allocate the KV cache, or take over the one that is held, and get ready to step. Answered by Allocated."""

    num_blocks: int
    max_model_len: int
    captures_later: bool = False
    """Make most graphs when a step needs them for the first time, as requests wait for this rank."""


class Ping(Message, frozen=True):
    """Answer with Done. Shows that the worker's loop turns."""


class Stop(Message, frozen=True):
    """Finish what is under way and leave."""


class Publish(Message, frozen=True):
    """From a rank to all of them: what ranks of one group that share no memory need to know of each other."""

    epoch: int
    group: str
    key: str
    value: bytes


class Published(Message, frozen=True):
    """What ranks have published since the last of these. Nobody answers it."""

    entries: tuple[Publish, ...]


class CallMethod(Message, frozen=True):
    """Call a method that the worker or its extension declares; every rank answers, with MethodResult or MethodError.

    `arguments` is msgpack: [[positional, ...], {name: value, ...}].
    """

    method: str
    arguments: bytes


class MeasureExperts(Message, frozen=True):
    """Answer with ExpertLoads."""


class MoveExperts(Message, frozen=True):
    """Exchange the experts of one layer between the ranks that share them out; every rank answers with Done.

    It is carried out between the steps before and after it, which are computed with the experts where they were and
    where they then are. `number` counts the placements of the layer from 1 on; 0 is the one that it begins with.
    """

    epoch: int
    layer: str
    number: int
    placement: Ints
    """The logical expert of each physical one."""


class ReadWeights(Message, frozen=True):
    """Begin to read a checkpoint's weights; or, if this reading has begun, tell how far it is. Answered by WeightsRead.

    They are read beside those in use, while steps are computed; with `in_place`, where those are that were given back.
    """

    number: int
    """Tells one reading from another. A new one takes the place of the one before."""
    checkpoint: str
    """A directory, on every node."""
    fingerprint: bytes
    """Of the checkpoint that the brain has seen there."""
    in_place: bool


class TakeWeights(Message, frozen=True):
    """Compute with the weights that were read from the next step on. Who fails in it has weights of both kinds.

    With `is_shared` ranks of other engines compute with the memory of those before: it stays theirs, and this is
    answered with what there is instead (Allocated). So it is with `weights`, those of another engine on this host,
    which are taken as they lie there, and nothing was read for them.
    """

    is_shared: bool = False
    weights: bytes = b""
    """SharedWeights as msgpack (memory/shared_weights.py)."""


class DropWeights(Message, frozen=True):
    """Let go of what was read, or is being read."""


class FallAsleep(Message, frozen=True):
    """Give the KV cache's memory back, and at level 2 that of the weights. No step is under way, and none comes.

    Answered with what is left (Allocated); a GPU's memory is free when nobody holds it any more, and so are weights
    that are shared (TakeWeights).
    """

    level: int
    is_shared: bool = False


class WakeUp(Message, frozen=True):
    """Be ready to step. The KV cache may hold anything. Answered with what there is (Allocated); who lacks memory
    sleeps on.
    """


class BlockCopies(Message, frozen=True):
    """Of one replica: the block at each place of `targets` is to hold what the one there in `sources` holds."""

    sources: Ints
    targets: Ints


class CopyBlocks(Message, frozen=True):
    """Copy blocks of the KV cache, before the steps that come after this.

    The ranks of a replica copy what `copies` has at its place.
    """

    copies: tuple[BlockCopies, ...]


Maintaining = ReadWeights | TakeWeights | DropWeights | FallAsleep | WakeUp
"""Between two steps, by all ranks."""

CommandBody = (
    Step
    | MeasureMemory
    | AllocateCache
    | Ping
    | Stop
    | Published
    | CallMethod
    | MeasureExperts
    | MoveExperts
    | CopyBlocks
    | Maintaining
)


class Call(Message, frozen=True):
    """A command to all workers. Those in `reply_ranks` answer; any rank answers with Failure when it fails."""

    call_id: int
    body: CommandBody
    reply_ranks: tuple[int, ...]


# -------------------------------------------------------------------------------- worker → brain


class CheckpointFound(Message, frozen=True):
    """Where a rank has found the checkpoint, and what tells its weights from others. Goes in a Publish."""

    node: str
    path: str
    fingerprint: bytes


class Loaded(Message, frozen=True):
    """The worker has its weights."""

    weight_bytes: int
    device: str
    dtype: str
    gives_back: bool = True
    """Whether it can give its memory back in a sleep."""


class Measured(Message, frozen=True):
    """What the worker may use for its KV cache, and what one block of it takes.

    `num_padding` blocks are for no request: rows that are nobody's write to them.
    """

    cache_bytes: int
    block_bytes: int
    num_padding: int = 0


class Allocated(Message, frozen=True):
    """What the worker has by now: it is ready to step, or asleep.

    `held` says what a Holder can keep from now on for the worker after it: HeldMemory as msgpack (memory/held.py,
    `decode_held`). It is empty unless the WorkerSpec says `keeps_memory`, and on a GPU whose memory ends with the
    process, as the driver cannot share it. Where experts move (`enable_eplb`) it is the KV cache alone: which experts
    these weights were is forgotten. Of a GPU nothing is in it that was given back.
    """

    held: bytes = b""
    lack: str | None = None
    """Why there is no memory to wake up with."""


NO_TOKEN = -1
"""In a StepResult: the row's logits were NaN, or -inf for every token that may be chosen."""


class StepResult(Message, frozen=True):
    """Tokens of the rows that sampled, in row order; NO_TOKEN for a row that none could be chosen for."""

    step: int
    tokens: Ints
    logprobs: LogprobColumns | None = None


class Done(Message, frozen=True):
    """The call is carried out and has nothing to say."""


class MethodResult(Message, frozen=True):
    """What a method returned, as msgpack."""

    value: bytes


class MethodError(Message, frozen=True):
    """What a method raised. The worker goes on."""

    node: str
    kind: str
    message: str
    traceback: str
    is_user_error: bool


class LayerLoad(Message, frozen=True):
    """How many tokens a rank has computed for each logical expert of a layer since the start."""

    layer: str
    num_tokens: bytes  # int64


class ExpertLoads(Message, frozen=True):
    """Of the layers of this rank that have experts to share out."""

    layers: tuple[LayerLoad, ...]


class WeightsRead(Message, frozen=True):
    """How far a rank is with ReadWeights: `done` of `total` bytes. `error` says why they cannot be read, `lack` of what
    memory there is too little for them."""

    done: int
    total: int
    is_whole: bool = False
    error: str | None = None
    lack: str | None = None


ReplyBody = Loaded | Measured | Allocated | StepResult | Done | MethodResult | MethodError | ExpertLoads | WeightsRead


class Reply(Message, frozen=True):
    """The answer to a Call. Call 0 is the start itself: it is answered by Loaded.

    `issued`, with the answer to a step, says what the rank has issued in it (ledger/step_digests.py).
    """

    call_id: int
    body: ReplyBody
    issued: bytes = b""


class StepIssued(Message, frozen=True):
    """The same from a rank that does not answer, and shares no memory with the brain."""

    issued: bytes


class Failure(Message, frozen=True):
    """A worker's exception. The worker can do no more for this run."""

    call_id: int
    node: str
    phase: str
    kind: str
    message: str
    traceback: str
    is_user_error: bool
    setting: WrongSetting | None = None


class Progress(Message, frozen=True):
    """Where the worker stands in its start."""

    phase: str
    done: int
    total: int


WorkerMessage = Reply | StepIssued | Failure | Progress | Publish

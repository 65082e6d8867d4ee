"""What the brain and the ranks' workers tell each other."""

from __future__ import annotations

from phalanx.protocol.columns import Ints, LogprobColumns, Message, WrongSetting
from phalanx.protocol.sampling import SamplingParams

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

    node: str
    phase: str
    """In which it was raised; empty for a step."""
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

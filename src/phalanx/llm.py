"""A model in the calling process: `with LLM("path/to/model") as llm: llm.generate("The capital of France is")`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import msgspec

from phalanx.config import Config, ExecutorConfig
from phalanx.engine.admission import check_request, fitted, refusal
from phalanx.engine.arguments import Prompt, Turn, is_list, listed_conversations, listed_prompts, listed_samplings
from phalanx.engine.blame import came_from_outside
from phalanx.engine.brain import Brain
from phalanx.engine.core import EngineCore, start_core
from phalanx.engine.generation_config import GenerationConfig
from phalanx.engine.interrupt import interrupt_between_steps
from phalanx.engine.maintenance import TURN_S
from phalanx.engine.resizing import switch
from phalanx.engine.restarts import Restarts
from phalanx.engine.stream import FinishName, OutputDelta, PositionLogprobs, RequestStream
from phalanx.engine.tokenizer import Tokenizer
from phalanx.engine.work import Work
from phalanx.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    MaintenanceError,
    NotNowError,
    PhalanxError,
    RequestError,
    ResizeError,
    UserError,
)
from phalanx.executor.executor import HEALTH_TIMEOUT_S, RPC_TIMEOUT_S, OnFailure
from phalanx.membership.forgetting import forget_locals
from phalanx.membership.formation import OF_EVERY_WORKER
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import (
    FIRST_WEIGHTS_VERSION,
    Maintained,
    MaintenanceOrder,
    Reload,
    Sleep,
    SleepLevel,
    TokenBatch,
    Wake,
)
from phalanx.protocol.sampling import SamplingParams

RESIZE_LOOK_S = 0.05
"""How often Ctrl-C gets through while other ranks are prepared."""

log = logging.getLogger("phalanx.llm")


OnProgress = Callable[[int, str, int, int], None]
"""Called while the model loads, with rank, phase, bytes done and bytes in all."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's whole output."""

    prompt: Prompt
    """As it was given; of a chat, the text that the template made."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishName
    stop_reason: str | int | None
    logprobs: tuple[PositionLogprobs, ...] | None
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str | None
    """Why, when `finish_reason` is `error`."""


class LLM:
    """A model that runs in the calling thread; ranks beyond the first run in processes that end with this thread.

    When they fail while something is generated, they are started again as often as `engine_restarts` says, and the
    outputs go on where they were; not with a `worker_extension_cls`, whose workers may know what nobody else does.
    Settings are those of `Config.build`, named like the flags of `phalanx serve`. Loading blocks for seconds or more.
    Raises UserError (such as ConfigError, CheckpointError) for the user's mistakes, StartError and others otherwise.
    """

    def __init__(self, model: str, *, on_progress: OnProgress | None = None, **settings: Any) -> None:
        self.config = Config.build(model=model, **settings)
        _check_one_engine(self.config)
        self._report = on_progress or _say_nothing
        self._checkpoint = resolve(model, revision=self.config.model.revision, progress=partial(self._report, 0))
        self._tokenizer_source = self.config.model.tokenizer or self._checkpoint.path
        self.tokenizer = Tokenizer.load(self._tokenizer_source)
        self.default_sampling = GenerationConfig.read(self._checkpoint.path).default_sampling()
        """What is used when no sampling is given: the checkpoint's advice (generation_config.json) over ours."""
        self._vocab_size = min(self.tokenizer.vocab_size, self._checkpoint.vocab_size)  # either may have ids of its own
        self._request_ids = itertools.count()
        self._ended: str | None = None
        self._failure: PhalanxError | None = None
        self._on_failure: list[OnFailure] = []
        self._restarts = Restarts(_num_restarts(self.config))
        self._weights_version = FIRST_WEIGHTS_VERSION
        self._core: EngineCore | None = self._begin()
        """None once it could not be loaded again."""

    def _begin(self) -> EngineCore:
        """Load the model into new workers."""
        core = start_core(
            self.config,
            self._checkpoint,
            lambda told: self._report(told.rank, told.phase, told.done, told.total),
            tokenizer_source=self._tokenizer_source,  # also after a reload of another checkpoint
        )
        with ExitStack() as undo:
            undo.enter_context(core)
            self.max_model_len = core.formation.capacity.max_model_len
            self._weight_changing: frozenset[str] = frozenset()
            if self.config.executor.worker_extension_cls is not None:
                names = core.formation.collective_rpc("methods_that_change_weights", unique_reply_rank=0).result()
                self._weight_changing = frozenset(names)
            if not self._restarts.most:
                core.formation.on_failure(self._fail)  # at once, also when nothing is generated
            undo.pop_all()
        return core

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete every prompt; the list is in the order of the prompts. Blocks until all are done.

        `sampling` is for all prompts or one for each; without it, `default_sampling` is used, and gives way where the
        length limit is near. Raises RequestError before anything is computed, and EngineDeadError if a fault ended the
        model before. Ctrl-C lets the current step end, cancels the requests and raises KeyboardInterrupt; the LLM can
        be used again.
        """
        listed = listed_prompts(prompts)
        token_ids = [self._token_ids(prompt) for prompt in listed]
        if sampling is None:
            sampling = [fitted(self.default_sampling, len(ids), self.max_model_len) for ids in token_ids]
        return self._complete(listed, token_ids, sampling, progress)

    def chat(
        self,
        messages: Sequence[Turn] | Sequence[Sequence[Turn]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer a conversation, or each of several, through the model's chat template. Otherwise like `generate`.

        Without `sampling`, an answer goes on until the model ends it.
        """
        conversations = listed_conversations(messages)
        token_ids = [self.tokenizer.apply_chat(conversation, tools=tools) for conversation in conversations]
        prompts = [self.tokenizer.decode(ids, skip_special_tokens=False) for ids in token_ids]
        if sampling is None:
            sampling = msgspec.structs.replace(self.default_sampling, max_tokens=None)
        return self._complete(prompts, token_ids, sampling, progress)

    def collective_rpc(
        self,
        method: str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
        unique_reply_rank: int | None = None,
        non_block: bool = False,
    ) -> Any:
        """Have every rank call a method that `worker_extension_cls` declares (`remote_method`).

        Gives the list of what the ranks returned, in rank order, or with `unique_reply_rank` what that rank returned;
        with `non_block` an object whose `result()` gives it. A method that is declared with `changes_weights` resets
        the prefix cache, also when it fails. Only for the thread that made this object.

        Where the method raised, the error of the lowest such rank is raised here, as a UserError (wrong name or
        arguments) or a WorkerError, and the LLM can be used again. Raises DeadlineError after `timeout_s`, which ends
        the ranks, as a dead rank (PeerDiedError) does: `generate` then begins by healing where it can, or the model has
        ended. Raises EngineDeadError if it had ended before, NotNowError while it is asleep.
        """
        core = self._living()
        if core.maintenance.is_asleep and method not in OF_EVERY_WORKER:
            raise NotNowError(f"{method} may want what a sleep has given back: call wake()")
        if method in self._weight_changing:
            core.formation.weights_changed()
            core.brain.reset_prefix_cache()
        pending = core.formation.collective_rpc(
            method, args, kwargs, timeout_s=timeout_s, unique_reply_rank=unique_reply_rank
        )
        return pending if non_block else pending.result()

    def resize(self, *, data_parallel_size: int | None = None, tensor_parallel_size: int | None = None) -> None:
        """Go on with ranks of another grid; what is None stays. Blocks until they are ready; only for the thread that
        made this object.

        They are started beside those that there are, and load the checkpoint. If anything goes wrong, ResizeError is
        raised and everything is as it was; so it is after Ctrl-C. Raises ConfigError for what cannot be: several
        replicas need `enable_expert_parallel`, and ranks processes of their own (launcher local or ray) that are healed
        (`heal`). Raises ResizeRefusedError when a method has changed the weights, and EngineDeadError if this LLM can
        run no more. A worker extension is made anew with the ranks: docs/worker-extensions.md.
        """
        core = self._awake()
        formation = core.formation
        asked = formation.size.changed(data_parallel_size, tensor_parallel_size)
        if asked == formation.size:
            return
        resize = formation.begin_resize(asked)
        try:
            while not resize.is_over and resize.state != "ready":
                formation.follow_resize(RESIZE_LOOK_S)
        except BaseException:
            formation.cancel_resize()
            while not resize.is_over:
                formation.follow_resize(RESIZE_LOOK_S)
            raise
        if resize.state != "ready":
            if isinstance(resize.error, UserError):
                raise resize.error
            why = str(resize.error).partition("\n")[0]  # less the stacks, which the log has
            raise ResizeError(f"from {resize.before} to {resize.asked}: {why}") from resize.error
        resized = switch(formation, core.brain)
        self.config = msgspec.structs.replace(self.config, parallel=resized.config.parallel)
        self.max_model_len = resized.capacity.max_model_len

    def reset_prefix_cache(self) -> None:
        """Have prompts computed anew from now on. Never blocks. Raises EngineDeadError if this LLM can run no more.

        Call it when weights were changed by other means than a method that is declared to change them. From then on the
        model is not loaded again after a fault, as the checkpoint has other weights: it is healed if its weights have
        outlived the ranks (docs/healing.md), or has ended.
        """
        core = self._living()
        core.formation.weights_changed()
        if self._restarts.most:
            self._restarts = Restarts(0)
            core.formation.on_failure(self._fail)
        core.brain.reset_prefix_cache()

    def reload(self, model: str | None = None) -> None:
        """Compute with the weights of another checkpoint directory of the same model from now on.

        Without one, with what is in the files of the one in use by now. Blocks until all ranks have them; the prefix
        cache is empty then. They are read beside the weights in use, which takes as much memory of the host again. Only
        for the thread that made this object. Raises CheckpointError that names what differs, or cannot be read: then
        the old ones are in use. EngineDeadError if this LLM can run no more.
        """
        self._maintain(Reload(model, "now", self.config.executor.start_timeout_s))

    def sleep(self, level: SleepLevel = 1) -> None:
        """Give memory back to the system, or the GPU, until `wake`: that of the KV cache, and at level 2 that of the
        weights too.

        Raises as `reload` does, and NotNowError for what cannot be had again. What is generated before `wake` raises
        NotNowError.
        """
        self._maintain(Sleep(level))

    def wake(self, model: str | None = None) -> None:
        """Go on after `sleep`. At level 2 the weights are read again, or those of another checkpoint of the same model.

        Raises as `reload` does, and MaintenanceError if others have taken a GPU's memory meanwhile: then it is still
        asleep.
        """
        self._maintain(Wake(model))

    @property
    def weights_version(self) -> int:
        """Of the weights in use: 1, and one more with each time that they were replaced."""
        return self._weights_version

    def check_health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """Return when every rank has given a sign of life; only for the thread that made this object.

        Raises DeadlineError naming the ranks that gave none for `timeout_s`, EngineDeadError if this LLM can run no
        more, and otherwise what ended the run.
        """
        self._living().formation.check_health(timeout_s)

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback` called with the error that ends the model, at once if one has. It must not raise.

        With `engine_restarts` that is one after which the model could not be loaded again.
        """
        self._on_failure.append(callback)
        if self._failure is not None:
            callback(self._failure)

    def close(self) -> None:
        """End the workers and let memory go. May be called more than once."""
        self._ended = self._ended or "it was closed"
        if self._core is not None:
            self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(
        self,
        prompts: Sequence[Prompt],
        token_ids: Sequence[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        progress: bool,
    ) -> list[Completion]:
        self._awake()
        requests = list(zip(token_ids, listed_samplings(sampling, len(prompts)), strict=True))
        for ids, params in requests:
            check_request(ids, params, max_model_len=self.max_model_len, vocab_size=self._vocab_size)
        outputs = [RequestStream(self.tokenizer, ids, params) for ids, params in requests]
        with _progress_bar(len(prompts), progress) as report:
            self._run(outputs, report)
        return [
            _completion(prompt, len(ids), output.take())
            for prompt, ids, output in zip(prompts, token_ids, outputs, strict=True)
        ]

    def _living(self) -> EngineCore:
        if self._ended is not None:
            raise EngineDeadError(f"this LLM can run no more: {self._ended}")
        assert self._core is not None
        return self._core

    def _awake(self) -> EngineCore:
        core = self._living()
        if core.maintenance.is_asleep:
            raise NotNowError("this LLM is asleep: call wake()")
        return core

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not is_list(prompt):
            raise RequestError("prompt", prompt, "it must be text or a list of token ids")
        return list(prompt)

    def _run(self, outputs: Sequence[RequestStream], report: Callable[[int], None]) -> None:
        """Step until every request has ended and the brain has nothing left to do."""
        work = Work()
        for output in outputs:
            work.add(next(self._request_ids), output)
        try:
            with interrupt_between_steps() as is_interrupted:
                while (error := self._work_off(work, report, is_interrupted)) is not None:
                    self._come_back(error, work)
        except BaseException as error:
            # A step was torn apart: nobody knows what the workers hold now.
            self._ended = str(error) or type(error).__name__
            if isinstance(error, PhalanxError):
                self._fail(error)
            raise
        assert not len(work), "the brain forgot requests"
        if is_interrupted():
            raise KeyboardInterrupt

    def _work_off(
        self, work: Work, report: Callable[[int], None], is_interrupted: Callable[[], bool]
    ) -> Exception | None:
        """Have the brain do what there is to do. Gives the error that ended its workers, if one did."""
        core = self._living()
        try:
            _submit_next(core.brain, work)
            while core.brain.has_work():
                batch = _step(core)
                if batch is not None:
                    _, to_cancel = work.take(batch)
                    core.brain.cancel(to_cancel)
                    report(len(work))
                if is_interrupted():
                    _, to_cancel = work.cancel_all()
                    core.brain.cancel(to_cancel)
                _submit_next(core.brain, work)
        except UserError:
            raise
        except Exception as error:
            return error
        return None

    def _maintain(self, order: MaintenanceOrder) -> None:
        """Carry it out, with no request under way."""
        core = self._living()
        core.maintenance.begin(order)
        try:
            while (outcome := _maintenance_turn(core)) is None:
                time.sleep(TURN_S)
        except BaseException as error:
            self._ended = _said(error)
            if isinstance(error, PhalanxError):
                self._fail(error)
            raise
        if outcome.error is not None:
            raise (CheckpointError if outcome.is_user_error else MaintenanceError)(outcome.error)
        self._weights_version += outcome.has_new_weights
        self._checkpoint = core.maintenance.checkpoint

    def _come_back(self, error: Exception, work: Work) -> None:
        """Load the model again, for the requests to go on. Raises the last error if it cannot be."""
        is_from_outside = isinstance(error, PhalanxError) and came_from_outside(error)
        work.engine_ended(_said(error), is_from_outside=is_from_outside)
        while (delay_s := self._restarts.next_delay_s(time.monotonic())) is not None:
            log.error("%s; the model is loaded again, for %d requests", _said(error), len(work))
            if self._core is not None:
                self._core.close()
                self._core = None
            forget_locals(error)  # such as the workers, and their memory
            time.sleep(delay_s)
            try:
                self._core = self._begin()
                return
            except Exception as failure:
                error = failure
        raise error

    def _fail(self, error: PhalanxError) -> None:
        if self._failure is None:
            self._failure = error
            for callback in self._on_failure:
                callback(error)


def _step(core: EngineCore) -> TokenBatch | None:
    """One turn of the brain, or a recovery of what it computes with. Raises what cannot be healed."""
    core.succession.look()
    try:
        return core.step()
    except PhalanxError as error:
        _heal(core, error)
        return None


def _maintenance_turn(core: EngineCore) -> Maintained | None:
    """As `_step`."""
    try:
        return core.maintenance.turn()
    except PhalanxError as error:
        _heal(core, error)
        return core.maintenance.ranks_replaced()


def _heal(core: EngineCore, error: PhalanxError) -> None:
    """Have other ranks go on from what is committed. Raises what cannot be healed."""
    if not core.formation.heals(error):
        raise error
    core.succession.go_on(core.formation.heal(error), error)


def _submit_next(brain: Brain, work: Work) -> None:
    for submit in work.take_next():
        try:
            brain.submit(submit)
        except RequestError as error:
            work.take(refusal(submit.request_id, error))


def _check_one_engine(config: Config) -> None:
    parallel = config.parallel
    if parallel.engine_size < parallel.world_size:
        raise ConfigError(
            "data_parallel_size",
            parallel.data_parallel_size,
            "1 without enable_expert_parallel: such replicas run apart; make an LLM for each",
        )


def _num_restarts(config: Config) -> int:
    """What an extension's workers have been told is known to nobody else: they are not started again."""
    asked = config.executor.engine_restarts
    if config.executor.worker_extension_cls is None:
        return asked
    if asked not in (0, ExecutorConfig().engine_restarts):
        config.warn_without_effect("engine_restarts", "workers with an extension may know what no others can")
    return 0


def _completion(prompt: Prompt, num_prompt_tokens: int, output: OutputDelta | None) -> Completion:
    assert output is not None
    assert output.finish_reason is not None
    return Completion(
        prompt=prompt,
        text=output.text,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        logprobs=output.logprobs,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=output.num_cached_tokens or 0,
        error=output.error,
    )


@contextmanager
def _progress_bar(num_requests: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the number of requests which still run."""
    if not is_shown:
        yield lambda num_running: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=num_requests)
        yield lambda num_running: bar.update(task, completed=num_requests - num_running)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, PhalanxError) else f"{type(error).__name__}: {error}"


def _say_nothing(rank: int, phase: str, done: int, total: int) -> None:
    """Progress that nobody asked to see."""

"""An engine that says what a test tells it to say, with EngineClient's interface and a token for every character."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from phalanx.engine.admission import check_request
from phalanx.engine.condition import Condition
from phalanx.engine.engine import ReplicaState, Strength
from phalanx.engine.stream import Origin, OutputDelta, PositionLogprobs, TokenLogprob
from phalanx.errors import EngineDeadError, RequestError
from phalanx.ledger.report import VerdictReport
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol.client import EngineReady, EngineStats, MaintenanceOrder, MaintenanceStats, Reload, Sleep
from phalanx.protocol.sampling import SamplingParams


class CharacterTokenizer:
    vocab_size = 0x110000

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids)).replace("\x01", "" if skip_special_tokens else "<s>")

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if template_variables and "refuse" in template_variables:
            raise RequestError("messages", messages, "the model's chat template says: no")
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        tail = ["assistant:"] if add_generation_prompt else []
        return self.encode("\n".join(lines + tail), add_special_tokens=False)


class FakeEngine:
    """Answers `reply`, one character a delta. With `pauses` it stops after the first character until `go` is set."""

    def __init__(self, reply: str = "Hello", *, max_model_len: int = 200) -> None:
        self.info = EngineReady(max_model_len, 100, 16, 1, "cpu", "float32")
        self.stats: EngineStats | None = None
        self.tokenizer = CharacterTokenizer()
        self.default_sampling = SamplingParams(temperature=0.6, top_k=50)
        self.dead: str | None = None
        self.down: str | None = None
        self.asleep = 0
        self.weights_version = 1
        self.orders: list[MaintenanceOrder] = []
        self.maintained = asyncio.Event()
        self.order_fails: Exception | None = None
        self.trouble: VerdictReport | None = None
        self.instances: tuple[InstanceStatus, ...] = ()
        self.replica_states = (ReplicaState(replica=0, state="serving", num_requests=0),)
        self.strength = Strength(wanted=1)
        self.drains: list[tuple[str, float]] = []
        self.undone_drains: list[str] = []
        self.resizes: list[tuple[int | None, list[int], float]] = []
        self.tensor_parallel_sizes: list[int] = []
        self.resized = asyncio.Event()
        self.refuses_resize: Exception | None = None
        self.resize_fails: Exception | None = None
        self.reply = reply
        self.last: dict[str, Any] = {"finish_reason": "stop"}
        self.num_cached_tokens = 0
        self.pauses = False
        self.go = asyncio.Event()
        self.first_token_out = asyncio.Event()
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.is_closed = False

    def conditions(self) -> tuple[Condition, ...]:
        return (
            Condition(
                pid=42,
                dead=self.dead,
                down=self.down,
                trouble=self.trouble,
                since_step_s=2.5,
                num_watched=2,
                verdicts={"late": 3},
                weights_version=self.weights_version,
                maintenance=MaintenanceStats("asleep", self.asleep) if self.asleep else None,
            ),
        )

    def replicas(self) -> tuple[ReplicaState, ...]:
        return self.replica_states

    async def begin_resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = 30.0,
    ) -> asyncio.Task[None]:
        if self.refuses_resize is not None:
            raise self.refuses_resize
        if tensor_parallel_size is not None:
            self.tensor_parallel_sizes.append(tensor_parallel_size)
        self.resizes.append((data_parallel_size, list(leaving), drain_timeout_s))

        async def resize() -> None:
            await self.resized.wait()
            if self.resize_fails is not None:
                raise self.resize_fails

        return asyncio.create_task(resize())

    async def begin_drain(self, node: str, *, drain_timeout_s: float = 30.0) -> asyncio.Task[None]:
        self.drains.append((node, drain_timeout_s))
        resizing = await self.begin_resize(drain_timeout_s=drain_timeout_s)
        self.resizes.pop()
        return resizing

    async def undo_drain(self, node: str) -> None:
        self.undone_drains.append(node)

    async def until_settled(self) -> None:
        while self.down is not None or self.asleep:
            await asyncio.sleep(0)

    async def maintain(self, order: MaintenanceOrder) -> None:
        self.orders.append(order)
        await self.maintained.wait()
        if self.order_fails is not None:
            raise self.order_fails
        self.weights_version += isinstance(order, Reload)
        self.asleep = order.level if isinstance(order, Sleep) else 0

    def statuses(self) -> tuple[InstanceStatus, ...]:
        return self.instances

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        check_request(
            prompt_token_ids, sampling, max_model_len=self.info.max_model_len, vocab_size=self.tokenizer.vocab_size
        )
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        return self._deltas(list(prompt_token_ids), sampling)

    async def _deltas(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        self.asked.append((prompt, sampling))
        self.num_running += 1
        has_ended = False
        try:
            for i, character in enumerate(self.reply):
                if i == 1 and self.pauses:
                    self.first_token_out.set()
                    await self.go.wait()
                if self.dead is not None:
                    raise EngineDeadError(self.dead)
                await asyncio.sleep(0)
                is_last = i == len(self.reply) - 1
                yield OutputDelta(
                    text=character,
                    token_ids=(ord(character),),
                    logprobs=_logprobs(character, sampling.logprobs),
                    num_cached_tokens=self.num_cached_tokens if i == 0 else None,
                    origins=(Origin(self.weights_version, 1),),
                    **(self.last if is_last else {}),
                )
            has_ended = True
        finally:
            self.num_running -= 1
            self.num_cancelled += not has_ended

    def die(self, reason: str) -> None:
        self.dead = reason
        self.go.set()

    async def close(self, grace_s: float = 0.0) -> None:
        self.is_closed = True


def _logprobs(character: str, width: int | None) -> tuple[PositionLogprobs, ...] | None:
    if width is None:
        return None
    chosen = TokenLogprob(ord(character), -0.25, character, character.encode())
    part = TokenLogprob(200, float("-inf"), "\ufffd", b"\xe2\x82")
    return (PositionLogprobs(chosen, (chosen, part)[:width]),)

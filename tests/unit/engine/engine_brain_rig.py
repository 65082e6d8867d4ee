"""A brain over a simulated worker, and the checks that hold after each of its turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.engine.prefix_cache import extend_digests
from phalanx.protocol import FinishReason, ReplicaStats, SamplingParams, StepPlan, Submit, TokenBatch, as_ints, ints
from phalanx.testing.simulated_worker import SimulatedExecutor, SimulatedWorker, expected_output, token_hashes

EOS = (3, 7)
VOCAB_SIZE = 50


@dataclass
class Client:
    """One request as its client sees it."""

    prompt: list[int]
    sampling: SamplingParams
    output: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    num_cached: int | None = None


class Rig:
    """`step` checks what must hold after every turn; `finish` what must hold at the end."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 64,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        async_scheduling: bool = True,
        enable_prefix_caching: bool = True,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
    ) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        limits = {
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
        self.workers = [
            SimulatedWorker(
                **limits,
                max_model_len=max_model_len,
                num_blocks=num_blocks,
                vocab_size=VOCAB_SIZE,
                num_stages=pipeline_parallel_size,
            )
            for _ in range(data_parallel_size)
        ]
        self.executor = SimulatedExecutor(*self.workers)
        config = Config.build(
            model="simulated",
            **limits,
            async_scheduling=async_scheduling,
            enable_prefix_caching=enable_prefix_caching,
            pipeline_parallel_size=pipeline_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_expert_parallel=data_parallel_size > 1,
        )
        self.brain = Brain(config, self.executor, num_blocks=num_blocks, max_model_len=max_model_len, eos_token_ids=EOS)
        self.clients: dict[int, Client] = {}
        self._num_followed = 0
        self._clean_slots: set[tuple[int, int]] = set()
        """Of requests that came in after the last reset of the prefix cache."""
        self._clean_blocks: set[tuple[int, int]] = set()
        """Blocks that only these have written to since then."""

    def submit(self, prompt: Sequence[int], **sampling: object) -> int:
        request_id = len(self.clients)
        client = Client(list(prompt), SamplingParams(**sampling))  # type: ignore[arg-type]
        self.brain.submit(Submit(request_id, ints(client.prompt), client.sampling))
        self.clients[request_id] = client
        return request_id

    def step(self) -> TokenBatch | None:
        batch = self.brain.step()
        if batch is not None:
            self._take(batch)
        self._follow_plans()
        self.check_cache()
        return batch

    def reset_prefix_cache(self) -> None:
        self.brain.reset_prefix_cache()
        self._clean_slots.clear()
        self._clean_blocks.clear()
        self.check_cache()

    def finish(self) -> None:
        """Run until nothing is left; every request must have ended as it would have alone, and the pool be whole."""
        for _ in range(10_000):
            if not self.brain.has_work():
                break
            self.step()
        assert not self.brain.has_work(), "livelock"
        for client in self.clients.values():
            self._check_output(client)
        replicas = self.brain.stats().replicas
        for stats in replicas:
            assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        num_tokens = sum(len(client.output) for client in self.clients.values())
        assert sum(stats.num_generated_tokens for stats in replicas) == num_tokens

    @property
    def stats(self) -> ReplicaStats:
        """Of the one replica."""
        (stats,) = self.brain.stats().replicas
        return stats

    @property
    def plans(self) -> list[StepPlan]:
        """Those that the one replica was sent."""
        return [plan for step in self.executor.steps for plan in step.plans]

    def check_cache(self) -> None:
        """Every block that can be found holds what its digest claims."""
        claims: dict[bytes, int] = {}
        for client in self.clients.values():
            tokens = client.prompt + client.output
            digests: list[bytes] = []
            num_full = len(tokens) // self.block_size
            extend_digests(digests, np.array(tokens, dtype=np.int32), self.block_size, num_full)
            hashes = token_hashes(tokens)[self.block_size - 1 :: self.block_size]
            claims.update(zip(digests, hashes, strict=True))
        for replica, worker in enumerate(self.workers):
            for digest, block in self.brain._scheduler.replicas[replica].cache.entries().items():
                assert worker.cells_BO[block, -1] == claims[digest], f"block {block} holds something else"
                is_clean = (replica, block) in self._clean_blocks
                assert is_clean, f"block {block} of replica {replica} holds what is from before the reset"

    def _follow_plans(self) -> None:
        for step in self.executor.steps[self._num_followed :]:
            for replica, plan in enumerate(step.plans):
                self._follow(replica, plan)
        self._num_followed = len(self.executor.steps)

    def _follow(self, replica: int, plan: StepPlan) -> None:
        self._clean_slots.difference_update((replica, slot) for slot in as_ints(plan.dropped).tolist())
        for new in plan.new:
            blocks = [(replica, block) for block in as_ints(new.blocks).tolist()]
            found = set(blocks[: new.num_computed // self.block_size])
            assert found <= self._clean_blocks, f"slot {new.slot} is given what is from before the reset"
            self._clean_slots.add((replica, new.slot))
            self._clean_blocks.update(blocks)
        for slot, block in zip(as_ints(plan.block_slots).tolist(), as_ints(plan.block_ids).tolist(), strict=True):
            if (replica, slot) in self._clean_slots:
                self._clean_blocks.add((replica, block))
            else:
                self._clean_blocks.discard((replica, block))

    def _take(self, batch: TokenBatch) -> None:
        request_ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
        assert len(set(request_ids)) == len(request_ids)
        for request_id, token in zip(request_ids, as_ints(batch.tokens).tolist(), strict=True):
            assert self.clients[request_id].reason is None, "a token after the end"
            self.clients[request_id].output.append(token)
        for request_id, num_cached in batch.cached:
            assert len(self.clients[request_id].output) == 1
            self.clients[request_id].num_cached = num_cached
        for request_id, reason in batch.finished:
            assert self.clients[request_id].reason is None, "ended twice"
            self.clients[request_id].reason = reason

    def _check_output(self, client: Client) -> None:
        expected, reason = expected_output(
            client.prompt,
            client.sampling,
            eos_token_ids=EOS,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
        )
        if client.reason is FinishReason.CANCELLED:
            assert client.output == expected[: len(client.output)]
        else:
            assert (client.output, client.reason) == (expected, reason)
        assert (client.num_cached is None) == (client.output == [])

"""A brain over a simulated worker, and the checks that hold after each of its turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from engine_mortal_executor import MortalExecutor

from phalanx.config import Config
from phalanx.engine.ahead import Ahead
from phalanx.engine.brain import Brain
from phalanx.engine.prefix_cache import ROOT, block_digest, extend_digests
from phalanx.errors import PeerDiedError
from phalanx.protocol.client import ReplicaStats, Submit, TokenBatch
from phalanx.protocol.columns import as_floats, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH, CopyBlocks, StepPlan
from phalanx.testing.simulated_worker import (
    Hashes,
    Places,
    SimulatedExecutor,
    SimulatedWorker,
    expected_logprob,
    expected_output,
    token_hashes,
)

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
        self.num_blocks = num_blocks
        self.config = Config.build(
            model="simulated",
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            async_scheduling=async_scheduling,
            enable_prefix_caching=enable_prefix_caching,
            pipeline_parallel_size=pipeline_parallel_size,
            data_parallel_size=data_parallel_size,
            enable_expert_parallel=data_parallel_size > 1,
        )
        self.epoch = FIRST_EPOCH
        self.executor = MortalExecutor(self._make_workers())
        self.brain = Brain(
            self.config, self.executor, num_blocks=num_blocks, max_model_len=max_model_len, eos_token_ids=EOS
        )
        self.clients: dict[int, Client] = {}
        self.errors: dict[int, str] = {}
        self.is_from_outside = False
        """Whether failures seem to be."""
        self.keeps_cache = True
        """Whether workers find the KV cache of those that were killed."""
        self.lingers = False
        """Whether those that were killed go on for a while, until `end_lingering`."""
        self._lingering: list[tuple[Hashes, Places, Places]] = []
        self._late_copies: list[tuple[Sequence[SimulatedWorker], tuple[CopyBlocks, ...]]] = []
        """What was sent to some of them, and they have not done before they were killed."""
        self._not_copied: tuple[CopyBlocks, ...] = ()
        """The same of those who are just being killed."""
        self._num_generated: dict[int, int] = {}
        """By replica; of those that are gone, when they were last there."""
        self._num_followed = 0
        self._told_epoch = FIRST_EPOCH
        self._carried: dict[tuple[int, int], list[int]] = {}
        """The tokens of those in unclean slots whom the first plan of an epoch is to bring."""
        self._unclean_slots: dict[tuple[int, int], int] = {}
        """Replica and slot of requests that ran at the last reset of the prefix cache, and the ticket that each had."""
        self._clean_blocks: set[tuple[int, int]] = set()
        """Blocks that only others have written to since then."""

    def submit(self, prompt: Sequence[int], **sampling: object) -> int:
        request_id = len(self.clients)
        client = Client(list(prompt), SamplingParams(**sampling))  # type: ignore[arg-type]
        self.brain.submit(Submit(request_id, ints(client.prompt), client.sampling))
        self.clients[request_id] = client
        return request_id

    def step(self) -> TokenBatch | None:
        self._write_late()
        try:
            batch = self.brain.step()
        except PeerDiedError as error:
            self._follow_plans()
            self.rewind(failure=str(error) if self.executor.is_blamed else None)
            return None
        if batch is not None:
            self._take(batch)
        self._follow_plans()
        self.check_cache()
        return batch

    def rewind(self, failure: str | None = None) -> None:
        """Go on with other workers."""
        self.epoch += 1
        lingers = self.lingers and self.keeps_cache
        lingering = self.executor.lingering() if lingers else []
        late_copies = [(self.workers, self._not_copied)] if lingers and self._not_copied else []
        self._not_copied = ()
        self.executor.replace(self._make_workers(self.workers if self.keeps_cache else ()))
        may_go_on = self.brain.rewind(
            self.epoch,
            keeps_cache=self.keeps_cache,
            failure=failure,
            is_from_outside=self.is_from_outside,
            sets_aside=lingers,
        )
        self._lingering = self._lingering + lingering if lingers and may_go_on else []
        self._late_copies = self._late_copies + late_copies if lingers and may_go_on else []
        self._write_late()
        if self.lingers and self.executor.random.random() < 0.2:  # these are killed before they have copied anything
            self.executor.kill(num_answered=0, is_blamed=False)
            self._not_copied = self.brain.copies
        else:
            self._copy()
        self._carry()
        if not self.keeps_cache:
            self._clean_blocks.clear()
        self.check_cache()

    def end_lingering(self) -> None:
        """Those who were killed are gone, for good."""
        self._lingering, self._late_copies = [], []
        self.brain.restore_blocks()

    def _write_late(self) -> None:
        random = self.executor.random
        for cells_BO, blocks_T, offsets_T in self._lingering:
            rubbish = [random.random() < 0.3 for _ in blocks_T]
            cells_BO[blocks_T[rubbish], offsets_T[rubbish]] = random.getrandbits(64)
        for sent in [sent for sent in self._late_copies if random.random() < 0.3]:
            self._late_copies.remove(sent)
            for command in sent[1]:
                for worker, copies in zip(sent[0], command.copies, strict=True):
                    worker.copy_blocks(copies)

    def _copy(self) -> None:
        for command in self.brain.copies:
            for replica, (worker, copies) in enumerate(zip(self.workers, command.copies, strict=True)):
                worker.copy_blocks(copies)
                for source, target in zip(
                    as_ints(copies.sources).tolist(), as_ints(copies.targets).tolist(), strict=True
                ):
                    if (replica, source) in self._clean_blocks:
                        self._clean_blocks.add((replica, target))
                    else:
                        self._clean_blocks.discard((replica, target))

    def resize(
        self,
        *,
        data_parallel_size: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        max_model_len: int | None = None,
        num_passes: int = 0,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Go on with workers of another number or with other limits, which compute ahead in so many passes; after each
        of them comes `meanwhile`."""
        self.epoch += 1
        self._note_generated()
        self.num_blocks = num_blocks or self.num_blocks
        self.max_model_len = max_model_len or self.max_model_len
        parallel, cache = self.config.parallel, self.config.cache
        size = data_parallel_size or parallel.data_parallel_size
        parallel = msgspec.structs.replace(parallel, data_parallel_size=size, enable_expert_parallel=size > 1)
        cache = msgspec.structs.replace(cache, block_size=block_size or cache.block_size)
        self.config = msgspec.structs.replace(self.config, parallel=parallel, cache=cache)
        following = SimulatedExecutor(*self._make_workers())
        sizes = {"num_blocks": self.num_blocks, "max_model_len": self.max_model_len}
        ahead = Ahead(self.brain.scheduler_for(self.config, self.epoch, **sizes))
        for _ in range(num_passes):
            ahead.add(self.brain.tokens_of_running())
            ahead.run(following)
            meanwhile()
        self.executor.replace(following.workers)
        self.brain.restructure(self.config, self.epoch, **sizes, scheduler=ahead.scheduler)
        self._unclean_slots.clear()  # all is computed anew, by a scheduler with tickets of its own
        self._carry()
        self._clean_blocks.clear()
        for step in following.steps:
            for replica, plan in enumerate(step.plans):
                self._clean_blocks.update((replica, block) for block in _blocks_of(plan))
        self.check_cache()

    @property
    def workers(self) -> Sequence[SimulatedWorker]:
        """One of each replica."""
        return self.executor.workers

    def reset_prefix_cache(self) -> None:
        self.brain.reset_prefix_cache()
        self._unclean_slots = self._tickets()
        self._clean_blocks.clear()
        self._carry()
        self.check_cache()

    def finish(self) -> None:
        """Run until nothing is left; every request must have ended as it would have alone, and the pool be whole."""
        for _ in range(10_000):
            if not self.brain.has_work():
                break
            self.end_lingering()
            self.step()
        assert not self.brain.has_work(), "livelock"
        self.end_lingering()
        for client in self.clients.values():
            self._check_output(client)
        replicas = self.brain.stats().replicas
        for stats in replicas:
            assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        self._note_generated()
        assert sum(self._num_generated.values()) == sum(len(client.output) for client in self.clients.values())

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
        has_tails = any(replica.cache._tails for replica in self.brain._scheduler.replicas)
        claims: dict[bytes, tuple[int, int]] = {}
        """By digest: the last token's place in the block, and what is to be there."""
        for client in self.clients.values():
            tokens = client.prompt + client.output
            digests: list[bytes] = []
            num_full = len(tokens) // self.block_size
            extend_digests(digests, np.array(tokens, dtype=np.int32), self.block_size, num_full)
            hashes = token_hashes(tokens)
            full = zip(digests, hashes[self.block_size - 1 :: self.block_size], strict=True)
            claims.update((digest, (-1, value)) for digest, value in full)
            for end in range(1, len(tokens) + 1) if has_tails else ():
                num_before, place = divmod(end - 1, self.block_size)
                content = np.array(tokens[end - 1 - place : end], dtype=np.int32).tobytes()
                parent = digests[num_before - 1] if num_before else ROOT
                claims[block_digest(parent, content)] = place, hashes[end - 1]
        for replica, worker in enumerate(self.workers):
            for digest, block in self.brain._scheduler.replicas[replica].cache.entries().items():
                place, value = claims[digest]
                assert worker.cells_BO[block, place] == value, f"block {block} holds something else"
                is_clean = (replica, block) in self._clean_blocks
                assert is_clean, f"block {block} of replica {replica} holds what is from before the reset"

    def _follow_plans(self) -> None:
        for step in self.executor.steps[self._num_followed :]:
            for replica, plan in enumerate(step.plans):
                self._follow(replica, plan)
            self._carried = {}
            self._told_epoch = step.epoch
        self._num_followed = len(self.executor.steps)

    def _follow(self, replica: int, plan: StepPlan) -> None:
        for new in plan.new:
            blocks = [(replica, block) for block in as_ints(new.blocks).tolist()]
            if self._carried.pop((replica, new.slot), None) == as_ints(new.token_ids).tolist():
                self._clean_blocks.difference_update(blocks)
                continue
            found = set(blocks[: -(-new.num_computed // self.block_size)])
            assert found <= self._clean_blocks, f"slot {new.slot} is given what is from before the reset"
            self._unclean_slots.pop((replica, new.slot), None)
            self._clean_blocks.update(blocks)
        for slot, block in zip(as_ints(plan.block_slots).tolist(), as_ints(plan.block_ids).tolist(), strict=True):
            if (replica, slot) in self._unclean_slots:
                self._clean_blocks.discard((replica, block))
            else:
                self._clean_blocks.add((replica, block))

    @property
    def block_size(self) -> int:
        return self.config.cache.block_size

    def _make_workers(self, before: Sequence[SimulatedWorker] = ()) -> list[SimulatedWorker]:
        """With the KV cache of those before them, if there is one."""
        config = self.config
        return [
            SimulatedWorker(
                max_num_seqs=config.scheduler.max_num_seqs,
                max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                vocab_size=VOCAB_SIZE,
                num_stages=config.parallel.pipeline_parallel_size,
                epoch=self.epoch,
                cells_BO=before[replica].cells_BO if before else None,
            )
            for replica in range(config.parallel.data_parallel_size)
        ]

    def _note_generated(self) -> None:
        for replica, stats in enumerate(self.brain.stats().replicas):
            self._num_generated[replica] = stats.num_generated_tokens

    def _carry(self) -> None:
        if self._told_epoch != self.epoch:
            tokens, tickets = self._tokens_by_slot(), self._tickets()
            # Somebody else may have a slot by now, of whom no plan has told: the workers died before they heard it.
            self._unclean_slots = dict(self._unclean_slots.items() & tickets.items())
            self._carried = {place: tokens[place] for place in self._unclean_slots}

    def _tokens_by_slot(self) -> dict[tuple[int, int], list[int]]:
        """Of those who run, by replica and slot."""
        running = self.brain._scheduler.running
        return {
            place: running.token_ids_SL[slot, : running.num_committed_S[slot]].tolist()
            for place, slot in self._places().items()
        }

    def _tickets(self) -> dict[tuple[int, int], int]:
        """Of those who run: who comes in has another one."""
        running = self.brain._scheduler.running
        return {place: int(running.ticket_S[slot]) for place, slot in self._places().items()}

    def _places(self) -> dict[tuple[int, int], int]:
        """Slots of those who run, by replica and slot there."""
        running = self.brain._scheduler.running
        return {(int(running.replica_S[slot]), int(running.worker_slot_S[slot])): slot for slot in running.occupied()}

    def _take(self, batch: TokenBatch) -> None:
        request_ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
        assert len(set(request_ids)) == len(request_ids)
        for request_id, token in zip(request_ids, as_ints(batch.tokens).tolist(), strict=True):
            assert self.clients[request_id].reason is None, "a token after the end"
            self.clients[request_id].output.append(token)
        if batch.logprobs is not None:
            chosen = as_ints(batch.tokens)[as_ints(batch.logprobs.entries)]
            assert (as_floats(batch.logprobs.chosen) == expected_logprob(chosen)).all()
        for request_id, num_cached in batch.cached:
            assert len(self.clients[request_id].output) == 1
            self.clients[request_id].num_cached = num_cached
        for request_id, reason in batch.finished:
            assert self.clients[request_id].reason is None, "ended twice"
            self.clients[request_id].reason = reason
        self.errors.update(batch.errors)

    def _check_output(self, client: Client) -> None:
        expected, reason = expected_output(
            client.prompt,
            client.sampling,
            eos_token_ids=EOS,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
        )
        num_computed, kills_at = len(client.prompt) + len(expected) - 1, client.sampling.top_k or self.max_model_len + 1
        if client.reason is FinishReason.ERROR:  # its last token may have been computed while it was not known as such
            assert num_computed + 1 >= kills_at, "it has killed nobody"
        else:
            assert num_computed < kills_at or client.reason is FinishReason.CANCELLED, "who has computed it?"
        if client.reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            assert client.output == expected[: len(client.output)]
        else:
            assert (client.output, client.reason) == (expected, reason)
        assert (client.num_cached is None) == (client.output == [])


def _blocks_of(plan: StepPlan) -> set[int]:
    """Those that requests are given."""
    return {
        block for column in (*(new.blocks for new in plan.new), plan.block_ids) for block in as_ints(column).tolist()
    }

"""Runs the plans of one rank: inputs, model, sampler.

Shape suffixes: T tokens of a step, R rows, N rows that compute a sampled token, S rows that sample, B blocks of a
request, D hidden size, V vocabulary, Q all slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phalanx.models.attention_batch import AttentionBatch
from phalanx.protocol.columns import LogprobColumns, as_ints, ints
from phalanx.protocol.worker import NO_TOKEN, Step, StepPlan, StepResult
from phalanx.worker.graph_sizes import size_for
from phalanx.worker.inputs import StepInputs
from phalanx.worker.sampler import Logprobs, Sampled, Sampler
from phalanx.worker.slots import Rows, SlotTable
from phalanx.worker.staging import to_device, to_host

if TYPE_CHECKING:
    from phalanx.models.model import CausalLM
    from phalanx.worker.decode_graphs import DecodeGraphs
    from phalanx.worker.stage import Stage


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched. Its tensors are in host memory; from a GPU they are there once `arrived` says so."""

    step: int
    tokens_S: Tensor
    logprobs: Logprobs | None
    arrived: torch.Event | None

    def is_ready(self) -> bool:
        """Whether `Runner.finish` would return at once."""
        return self.arrived is None or self.arrived.query()


class Runner:
    """One rank's steps, in the order of the plans. For the use of one thread.

    The sequence of collectives in a step depends on the rank's stage and the StepShapes alone (invariant 1). If any
    replica has tokens: hidden states from the stage before, the model's collectives, hidden states to the stage after;
    those of a token of padding where a replica has none. If this one has `num_samples`, on the last stage: those of
    `logits`, and unless there are other stages one broadcast of the tokens. Rank 0 of the last stage's group chooses
    them for all. Where the step is replayed from a graph (graph_sizes.py), the model's collectives and those of
    `logits` are the graph's, with as many rows as that has; they are the same, one by one, in the step that makes it,
    which is the same step for all ranks of a line, as all have seen the same ones.
    """

    def __init__(
        self,
        model: CausalLM,
        stage: Stage,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
        replica: int = 0,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`num_blocks` can be planned with. With other replicas or graphs the cache has one more, for padding."""
        self._model = model
        self._replica = replica
        self._stage = stage
        self._graphs = graphs
        self._device = device
        self._slots = SlotTable(
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size, num_blocks=num_blocks
        )
        self._sampler = Sampler(self._slots, model.vocab_size, device) if stage.is_output else None
        # A slot's newest token stays on the device, so that the next step can be launched before this one has finished.
        # Not so in a pipeline, where plans tell the tokens.
        self._newest_Q = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, step: Step) -> InFlight:
        """Apply the plan, run the model and choose tokens. On a CPU this is all of the work; a GPU is not waited for.

        Steps come in order, and one may be launched before earlier ones are finished. Raises what the group's
        collectives raise.
        """
        plan = step.plans[self._replica]
        self._take_in(plan)
        rows = self._slots.advance(plan)
        if not any(other.shape.num_tokens for other in step.plans):
            return InFlight(plan.step, torch.empty(0, dtype=torch.int64), None, None)
        inputs = StepInputs.of(plan, rows, self._slots) if len(rows.slots_R) else StepInputs.padding(self._slots)
        shapes = [other.shape for other in step.plans]
        size = None if self._graphs is None else size_for(shapes, self._graphs.sizes)
        if self._graphs is None or size is None:
            hidden_TD, logits_TV = self._forward(inputs, [max(shape.num_tokens, 1) for shape in shapes]), None
        else:
            hidden_TD = logits_TV = self._replay(self._graphs, inputs, size)
        sampled = Sampled(torch.empty(0, dtype=torch.int64, device=self._device))
        if self._stage.downstream is not None:
            self._stage.send(hidden_TD)
        elif plan.shape.num_samples:
            sampled = self._sample(rows, hidden_TD, logits_TV)
        return self._send_home(plan.step, sampled)

    @torch.inference_mode()
    def warm_up(self, num_replicas: int) -> None:
        """Compute a token that is nobody's, and in each graph that there is: a process's first step takes several times
        as long as others.

        All ranks do it together, before the first step. The cache must have a block for padding.
        """
        hidden_TD = self._forward(StepInputs.padding(self._slots), [1] * num_replicas)
        if self._stage.downstream is not None:
            self._stage.send(hidden_TD)
        else:
            self._model.logits(hidden_TD)
        if self._graphs is not None:
            self._graphs.rehearse()

    def finish(self, flight: InFlight) -> StepResult:
        """The outcome of a step; waits for a GPU to come to its end. Only the output rank's is complete.

        The wait itself has no deadline: a brain in another process has one for it, and who is in this one asks
        `InFlight.is_ready` before.
        """
        if flight.arrived is not None:
            flight.arrived.synchronize()
        return StepResult(flight.step, ints(flight.tokens_S.numpy().astype(np.int32)), _columns(flight.logprobs))

    def close(self) -> None:
        """Let go of what groups cannot be left before. Blocks on nobody."""
        if self._graphs is not None:
            self._graphs.close()

    def _take_in(self, plan: StepPlan) -> None:
        self._slots.apply(plan)
        if self._sampler is None:
            return
        for slot in as_ints(plan.dropped).tolist():
            self._sampler.drop(slot)
        for request in plan.new:
            self._sampler.admit(request)

    def _forward(self, inputs: StepInputs, num_tokens: Sequence[int]) -> Tensor:
        """Hidden states of this replica's tokens; `num_tokens` are those of all replicas, padding included."""
        token_ids_T, positions_T, query_starts_R1, context_lens_R, block_tables_RB, cache_slots_T = self._upload(inputs)
        batch = AttentionBatch(
            query_starts_R1=query_starts_R1,
            context_lens_R=context_lens_R,
            block_tables_RB=block_tables_RB,
            slots_T=cache_slots_T,
            max_query_len=inputs.max_query_len,
            max_context_len=inputs.max_context_len,
            num_decodes=inputs.num_decodes,
            block_size=self._slots.block_size,
        )
        if self._stage.upstream is None:
            return self._model.hidden_states(token_ids_T, positions_T, batch, num_tokens)
        shape_TD = (len(token_ids_T), self._model.hidden_size)
        received_TD = self._stage.receive(torch.empty(shape_TD, dtype=self._model.dtype, device=self._device))
        return self._model.hidden_states(received_TD, positions_T, batch, num_tokens)

    def _replay(self, graphs: DecodeGraphs, inputs: StepInputs, size: int) -> Tensor:
        """Logits of this replica's rows, of one token each; or hidden states, if the model goes on elsewhere."""
        num_rows = len(inputs.token_ids_T)
        if self._stage.upstream is not None:
            self._stage.receive(graphs.hidden_in(num_rows))
        token_ids_G, positions_G, _, context_lens_G, block_tables_GB, cache_slots_G = self._upload(
            inputs.padded_to(size, self._slots)
        )
        out_GX = graphs.replay(
            token_ids_G if self._stage.upstream is None else None,
            positions_G,
            context_lens_G,
            block_tables_GB,
            cache_slots_G,
        )
        return out_GX[:num_rows]

    def _upload(self, inputs: StepInputs) -> Sequence[Tensor]:
        """The inputs on the device, in the order of `arrays`, and with the token ids that only the device knows."""
        *tensors, sampled_at_N, sampled_slots_N = to_device(inputs.arrays, self._device)
        if len(sampled_at_N):
            assert not self._stage.is_pipelined, "the plan does not tell the tokens of all its rows"
            tensors[0][sampled_at_N] = self._newest_Q[sampled_slots_N]
        return tensors

    def _sample(self, rows: Rows, hidden_TD: Tensor, logits_TV: Tensor | None) -> Sampled:
        """Tokens of the rows that sample. Without a pipeline all ranks get them and remember each slot's newest.

        Overwrites the logits, if these are there already.
        """
        slots_S = rows.slots_R[rows.samples_R]
        ends_S = np.cumsum(rows.num_tokens_R)[rows.samples_R]
        positions_S = (rows.num_computed_R + rows.num_tokens_R)[rows.samples_R]
        last_S, slots_on_device_S = to_device([ends_S - 1, slots_S], self._device)
        if logits_TV is None:
            logits_SV = self._model.logits(hidden_TD[last_S])
        else:
            logits_SV = logits_TV if len(slots_S) == len(logits_TV) else logits_TV[last_S]
        if self._sampler is not None:
            sampled = self._sampler.sample(logits_SV, slots_S, positions_S)
        else:
            sampled = Sampled(torch.full((len(slots_S),), NO_TOKEN, device=self._device))
        if self._stage.is_pipelined:
            return sampled
        self._stage.shared.broadcast(sampled.tokens_R, src=0)
        # An impossible token must not get into the embedding of the step that may already follow.
        self._newest_Q[slots_on_device_S] = sampled.tokens_R.clamp(min=0)
        return sampled

    def _send_home(self, step: int, sampled: Sampled) -> InFlight:
        tokens_S, logprobs = to_host(sampled.tokens_R), sampled.logprobs
        if logprobs is not None:
            logprobs = Logprobs(
                logprobs.entries_E,
                to_host(logprobs.chosen_E),
                to_host(logprobs.top_ids_EK),
                to_host(logprobs.top_EK),
            )
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.Event(
                self._device, blocking=True
            )  # `synchronize` then sleeps instead of spinning on a core
            arrived.record()
        return InFlight(step, tokens_S, logprobs, arrived)


def _columns(logprobs: Logprobs | None) -> LogprobColumns | None:
    if logprobs is None:
        return None
    return LogprobColumns(
        entries=ints(logprobs.entries_E.astype(np.int32)),
        chosen=logprobs.chosen_E.numpy().tobytes(),
        width=logprobs.top_ids_EK.shape[1],
        top_ids=ints(logprobs.top_ids_EK.numpy().astype(np.int32)),
        top_logprobs=logprobs.top_EK.numpy().tobytes(),
    )

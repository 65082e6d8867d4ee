"""Steps in which every row computes one token, given to the device as one graph instead of hundreds of kernels.

For each of some numbers of rows there is a graph, captured when the worker starts, or, if requests wait for it then, in
the first step of so many. Its inputs lie where they lay then; a step with fewer rows is padded with rows that are
nobody's, whose keys and values go into a block that is nobody's.

Shape suffixes: R rows of a step, G rows of a graph, W blocks of the longest row, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from phalanx.collectives.journaled import CapturedCollectives, JournaledGroup
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.model import CausalLM

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of some work, which has run before, what repeats it on the same memory."""


class DecodeGraphs:
    """The graphs of one rank: from token ids, or hidden states of the stage before, to logits or hidden states.

    For the use of one thread. All ranks that meet in the model's collectives call the same methods.
    """

    def __init__(
        self,
        model: CausalLM,
        capture: Capture,
        groups: Sequence[JournaledGroup],
        *,
        sizes: Sequence[int],
        max_model_len: int,
        block_size: int,
        null_block: int,
        num_replicas: int,
    ) -> None:
        """Makes no graph. `sizes` ascend; `null_block` of the cache is nobody's; `groups` are in the rank's journal."""
        self.sizes = tuple(sizes)
        self._model = model
        self._capture = capture
        self._groups = groups
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._num_replicas = num_replicas
        self._replays: dict[int, tuple[Callable[[], None], CapturedCollectives]] = {}
        most, device = self.sizes[-1], model.device
        self._inputs = torch.zeros(most, dtype=torch.int64, device=device)
        if not model.is_first:
            self._inputs = torch.zeros(most, model.hidden_size, dtype=model.dtype, device=device)
        self._positions_G = torch.zeros(most, dtype=torch.int64, device=device)
        self._query_starts_G1 = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._context_lens_G = torch.ones(most, dtype=torch.int32, device=device)
        widest = -(-max_model_len // block_size)
        self._block_tables_GW = torch.full((most, widest), null_block, dtype=torch.int32, device=device)
        self._slots_G = torch.full((most,), null_block * block_size, dtype=torch.int64, device=device)
        if model.is_last:
            self._out = torch.zeros(most, model.vocab_size, dtype=torch.float32, device=device)
        else:
            self._out = torch.zeros(most, model.hidden_size, dtype=model.dtype, device=device)

    @property
    def static_bytes(self) -> int:
        """What inputs and outputs take."""
        lasting = (self._inputs, self._positions_G, self._block_tables_GW, self._slots_G, self._out)
        return sum(tensor.nbytes for tensor in lasting)

    @torch.inference_mode()
    def run(self, size: int) -> None:
        """Compute the rows that are in place, without a graph."""
        batch = AttentionBatch(
            query_starts_R1=self._query_starts_G1[: size + 1],
            context_lens_R=self._context_lens_G[:size],
            block_tables_RB=self._block_tables_GW[:size],
            slots_T=self._slots_G[:size],
            max_query_len=1,
            max_context_len=self._max_model_len,
            num_decodes=size,
            block_size=self._block_size,
        )
        num_tokens = [size] * self._num_replicas
        out = self._model.hidden_states(self._inputs[:size], self._positions_G[:size], batch, num_tokens)
        self._out[:size].copy_(self._model.logits(out) if self._model.is_last else out)

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Make the graph of `size` rows. Those of the most rows come first: the others then use their memory."""
        self.run(size)  # compiles kernels, and has libraries choose theirs
        collectives = CapturedCollectives(self._groups)
        with collectives.capturing():
            replay = self._capture(partial(self.run, size))
        self._replays[size] = (replay, collectives)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Replay each once, of rows that are nobody's: the first time takes some milliseconds more. Before any step."""
        for size in sorted(self._replays):
            self._run_graph(size)

    def hidden_in(self, num_rows: int) -> Tensor:
        """Where the hidden states of the stage before are to be before `replay`: [R, D]."""
        return self._inputs[:num_rows]

    def replay(
        self,
        token_ids_G: Tensor | None,
        positions_G: Tensor,
        context_lens_G: Tensor,
        block_tables_GB: Tensor,
        slots_G: Tensor,
    ) -> Tensor:
        """Logits [G, V] or hidden states [G, D] of as many rows as a graph has; the next replay overwrites them.

        `token_ids_G` is None where the model does not begin. Waits for nothing.
        """
        size, num_blocks = block_tables_GB.shape
        if token_ids_G is not None:
            self._inputs[:size].copy_(token_ids_G)
        self._positions_G[:size].copy_(positions_G)
        self._context_lens_G[:size].copy_(context_lens_G)
        self._block_tables_GW[:size, :num_blocks].copy_(block_tables_GB)
        self._slots_G[:size].copy_(slots_G)
        self._run_graph(size)
        return self._out[:size]

    def _run_graph(self, size: int) -> None:
        if size not in self._replays:
            torch.cuda.empty_cache()  # a graph takes memory from the driver, of which torch may have taken all by now
            self.capture(size)  # which computes the rows first
            return
        replay, collectives = self._replays[size]
        with collectives.replaying():
            replay()

    def close(self) -> None:
        """Let go of the graphs. NCCL cannot leave a group before."""
        self._replays.clear()

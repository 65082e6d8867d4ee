"""What a rank does between its load and its first step: it measures what steps take, and captures them in graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch

from phalanx.collectives.journaled import JournaledGroup
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.memory.sizing import LINE_BYTES, cache_bytes
from phalanx.models.model import CausalLM
from phalanx.protocol.worker import Measured
from phalanx.worker.cuda_capture import CudaCapture, WaitsForGpuError
from phalanx.worker.decode_graphs import DecodeGraphs
from phalanx.worker.error_text import message_of
from phalanx.worker.graph_sizes import can_have_graphs, graph_sizes
from phalanx.worker.kv_cache import block_bytes
from phalanx.worker.profile import compute_little, graph_bytes, peak_activation_bytes
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.worker")

Enter = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


class Preparation:
    """Of one rank that has its weights. All ranks of a stage call the same methods: they meet in collectives."""

    def __init__(
        self, spec: WorkerSpec, device: torch.device, model: CausalLM, groups: Sequence[JournaledGroup], enter: Enter
    ) -> None:
        """`groups` are those in the rank's journal."""
        self._spec = spec
        self._device = device
        self._model = model
        self._groups = groups
        self._enter = enter
        self._has_graphs = can_have_graphs(spec.config, device.type)

    @property
    def block_bytes(self) -> int:
        """What a block of KV cache takes here."""
        return block_bytes(self._model.cache_layers, self._config.cache.block_size, self._model.dtype)

    @property
    def num_padding_blocks(self) -> int:
        """Blocks of KV cache that no request gets: one where rows of padding can occur."""
        return int(self._has_graphs or self._config.parallel.data_parallel_size > 1 or self.warms_up)

    @property
    def warms_up(self) -> bool:
        """Whether the first step is to take no longer than others: it may come after a fault, when all wait for it.

        Not on a CPU where an extension may write to the weights, which are packed: a line that stands ready looks at
        them in its first step, and is to do so when no other one computes.
        """
        looks_later = self._device.type == "cpu" and self._config.executor.worker_extension_cls is not None
        return self._config.healing.standby > 0 and not looks_later

    def measure(self, max_model_len: int, *, sizes_cache: bool) -> Measured:
        """What the KV cache may take, unless that is known; then only what steps need is loaded.

        `max_model_len` is the longest that a request may be.
        """
        self._enter("sizing", 0, 0)
        if sizes_cache:
            found_bytes = self._measure_cache(max_model_len)
        else:
            found_bytes = 0
            num_replicas = self._config.parallel.data_parallel_size
            compute_little(self._model, self._config.scheduler, self._config.cache.block_size, num_replicas)
            self._measure_graphs(max_model_len, makes_some=False)
        for experts in self._model.experts.values():
            experts.load.reset()  # what it was measured with were no tokens of anybody
        return Measured(cache_bytes=found_bytes, block_bytes=self.block_bytes, num_padding=self.num_padding_blocks)

    def capture(self, max_model_len: int, null_block: int, *, later: bool) -> DecodeGraphs | None:
        """Graphs of steps over the model's cache, whose block `null_block` is nobody's; None if there are to be none.
        With `later` there is only the largest of them yet, in whose memory the others will compute.

        Raises ConfigError if a step cannot be captured.
        """
        if not self._has_graphs:
            return None
        graphs = self._new_graphs(max_model_len, null_block)
        sizes = graphs.sizes[-1:] if later else graphs.sizes[::-1]
        for i, size in enumerate(sizes):
            self._enter("capturing", i, len(sizes))
            try:
                graphs.capture(size)
            except RuntimeError as error:  # torch's; what a peer does has errors of ours
                raise _not_captured(f"a step of {size} rows", error) from error
        torch.cuda.empty_cache()  # what steps without a graph took
        return graphs

    @property
    def _config(self) -> Config:
        return self._spec.config

    def _measure_cache(self, max_model_len: int) -> int:
        """Bytes that there are for the KV cache, beside all that steps take."""
        config = self._config
        peak_bytes = peak_activation_bytes(
            self._model, config.scheduler, config.cache.block_size, config.parallel.data_parallel_size
        )
        num_behind = config.healing.standby if self._spec.keeps_memory else 0
        peak_bytes += (1 + num_behind) * self._measure_graphs(max_model_len, makes_some=True)
        blocks_per_request = -(-max_model_len // config.cache.block_size)
        return cache_bytes(
            config.cache,
            self._device,
            useful_bytes=config.scheduler.max_num_seqs * blocks_per_request * self.block_bytes,
            peak_activation_bytes=peak_bytes + num_behind * LINE_BYTES,
            ranks_on_host=self._spec.ranks_on_host,
        )

    def _measure_graphs(self, max_model_len: int, *, makes_some: bool) -> int:
        """Bytes that graphs take; 0 unless it `makes_some`, or if, as is found out, the model cannot be captured."""
        if not self._has_graphs:
            return 0
        new_graphs = partial(self._new_graphs, max_model_len)
        try:
            return graph_bytes(self._model, new_graphs, self._config.cache.block_size, makes_some=makes_some)
        except WaitsForGpuError as error:
            self._has_graphs = False
            log.warning("decode steps are not captured in CUDA graphs, as this model waits for the GPU: %s", error)
            return 0
        except RuntimeError as error:  # torch's; what a peer does has errors of ours
            raise _not_captured("a step", error) from error

    def _new_graphs(self, max_model_len: int, null_block: int) -> DecodeGraphs:
        return DecodeGraphs(
            self._model,
            CudaCapture(self._device),
            self._groups,
            sizes=graph_sizes(self._config.scheduler.max_num_seqs),
            max_model_len=max_model_len,
            block_size=self._config.cache.block_size,
            null_block=null_block,
            num_replicas=self._config.parallel.data_parallel_size,
        )


def _not_captured(what: str, error: RuntimeError) -> ConfigError:
    return ConfigError("cuda_graphs", True, f"False would do, as {what} could not be captured: {message_of(error)}")

"""vLLM's asynchronous scheduler over simulated workers. A contestant of brain.py (vLLM's Python).

Takes orders on the descriptor that its first argument names: each line is a number of decode steps, answered by one
line, the microseconds that `schedule` and `update_from_output` took together in each. The other arguments: how many
requests run, the length limit, the tokens of a prompt, the tokens of a block.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig  # type: ignore[import-not-found]
from vllm.sampling_params import SamplingParams  # type: ignore[import-not-found]
from vllm.utils.hashing import sha256  # type: ignore[import-not-found]
from vllm.v1.core.kv_cache_utils import (  # type: ignore[import-not-found]
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # type: ignore[import-not-found]
from vllm.v1.core.sched.output import SchedulerOutput  # type: ignore[import-not-found]
from vllm.v1.kv_cache_interface import (  # type: ignore[import-not-found]
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found]
from vllm.v1.request import Request  # type: ignore[import-not-found]
from vllm.v1.structured_output import StructuredOutputManager  # type: ignore[import-not-found]

VOCAB_SIZE = 32_000
DEPTH = 2
WARM_UP_STEPS = 20
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB_SIZE,
}


def make_scheduler(num_running: int, max_model_len: int, block_size: int) -> AsyncScheduler:
    """With prefix caching and room for every request at its longest."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps({**MODEL, "max_position_embeddings": max_model_len}))
        model = ModelConfig(model=directory, skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len)
    scheduling = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=max(2048, 2 * num_running),
        max_model_len=max_model_len,
        enable_chunked_prefill=True,
        async_scheduling=True,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=True)
    config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    cache.num_gpu_blocks = num_running * -(-max_model_len // block_size) + 1  # one of them is vLLM's own
    layer = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
    return AsyncScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=cache.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
    )


class Steps:
    """Requests that all decode, and the steps under way for them."""

    def __init__(self, num_running: int, max_model_len: int, prompt_len: int, block_size: int) -> None:
        self._random = random.Random(0)
        self._scheduler = make_scheduler(num_running, max_model_len, block_size)
        self._in_flight: deque[SchedulerOutput] = deque()
        init_none_hash(sha256)
        hasher = get_request_block_hasher(block_size, sha256)
        for number in range(num_running):
            length = prompt_len + self._random.randrange(block_size)
            request = Request(
                request_id=f"cmpl-{number:032x}-0",
                prompt_token_ids=[self._random.randrange(VOCAB_SIZE) for _ in range(length)],
                sampling_params=SamplingParams(max_tokens=max_model_len, ignore_eos=True),
                pooling_params=None,
                block_hasher=hasher,
            )
            self._scheduler.add_request(request)
        while len(self._scheduler.waiting):
            self.step()
        for _ in range(WARM_UP_STEPS):
            self.step()

    def step(self) -> float:
        """Microseconds of one turn: schedule as far as one may run ahead, then commit the oldest step."""
        started_at = time.perf_counter()
        while len(self._in_flight) < DEPTH:
            self._in_flight.append(self._scheduler.schedule())
        scheduled_at = time.perf_counter()
        output = self._in_flight.popleft()
        answer = self._answer(output)
        answered_at = time.perf_counter()
        self._scheduler.update_from_output(output, answer)
        return (scheduled_at - started_at + time.perf_counter() - answered_at) * 1e6

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        request_ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=[
                [] if self._scheduler.requests[request_id].is_prefill_chunk else [self._random.randrange(VOCAB_SIZE)]
                for request_id in request_ids
            ],
        )


def main() -> None:
    """Carry out orders until there are no more."""
    descriptor, *sizes = map(int, sys.argv[1:])
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as orders:
        steps = Steps(*sizes)
        print("ready", file=orders, flush=True)
        for line in orders:
            print(json.dumps([steps.step() for _ in range(int(line))]), file=orders, flush=True)


if __name__ == "__main__":
    main()

"""What one process makes of a checkpoint: the tokens that any number of nodes must make too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from phalanx import LLM
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.logprobs import token_name


class Tokens(NamedTuple):
    """Greedy tokens of one prompt, and what the API calls them."""

    ids: tuple[int, ...]
    names: list[str]


def tokens_of_one_process(checkpoint: Path, prompts: list[list[int]], num_tokens: int) -> list[Tokens]:
    """The first `num_tokens` of each prompt."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    with LLM(str(checkpoint), launcher="inline", device="cpu", max_num_seqs=8, kv_cache_memory=1 << 20) as llm:
        completions = llm.generate(prompts, sampling)
    return [
        Tokens(completion.token_ids, [token_name(row.chosen) for row in completion.logprobs or ()])
        for completion in completions
    ]

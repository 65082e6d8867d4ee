"""What a request must satisfy before the brain takes it."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.errors import RequestError
from phalanx.protocol import FinishReason, SamplingParams, TokenBatch


def check_request(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, *, max_model_len: int, vocab_size: int
) -> None:
    """Raises RequestError naming the parameter that is wrong."""
    sampling.check()
    num_prompt = len(prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("prompt", [], "it must have at least one token")
    if num_prompt >= max_model_len:
        raise RequestError(
            "prompt", f"{num_prompt} tokens", f"at most {max_model_len - 1}: prompt and output share {max_model_len}"
        )
    lowest, highest = min(prompt_token_ids), max(prompt_token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError("prompt", f"token id {wrong}", f"this model's go from 0 to {vocab_size - 1}")
    room = max_model_len - num_prompt
    for field, asked in (("max_tokens", sampling.max_tokens), ("min_tokens", sampling.min_tokens)):
        if asked is not None and asked > room:
            raise RequestError(
                field, asked, f"after a prompt of {num_prompt} tokens at most {room} fit into {max_model_len}"
            )


def refusal(request_id: int, error: RequestError) -> TokenBatch:
    """What a request's client gets that the brain would not take: the end, and why."""
    return TokenBatch(b"", b"", finished=((request_id, FinishReason.ERROR),), errors=((request_id, str(error)),))

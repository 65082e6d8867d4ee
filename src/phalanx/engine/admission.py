"""What a request must satisfy before the brain takes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral

import msgspec
import numpy as np

from phalanx.errors import RequestError
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.sampling import FinishReason, SamplingParams


def check_request(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, *, max_model_len: int, vocab_size: int
) -> None:
    """Raises RequestError naming the parameter that is wrong."""
    sampling.check()
    num_prompt = len(prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("prompt", [], "it must have at least one token")
    given: Sequence[object] = prompt_token_ids
    if not all(issubclass(kind, Integral) for kind in set(map(type, given))):
        not_a_token = next(found for found in given if not isinstance(found, Integral))
        raise RequestError("prompt", not_a_token, "token ids are whole numbers")
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


def typed(sampling: SamplingParams) -> SamplingParams:
    """The same with the types that its fields state: a tuple for a list, a number of Python's for one of numpy's.

    Nothing looks at them when Python code makes one, and one that cannot be encoded would end more than its request.
    Raises RequestError naming the field.
    """
    if not isinstance(sampling, SamplingParams):
        raise RequestError("sampling", sampling, "it must be SamplingParams")
    values = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in msgspec.structs.asdict(sampling).items()
    }
    try:
        found = msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:
        complaint, _, where = str(error).partition(" - at `$.")
        field = re.sub(r"\W.*", "", where)
        raise RequestError(field, values[field], complaint.replace("`", "").lower()) from None
    for stop in found.stop:
        check_unicode("stop", stop)
    return found


def check_unicode(field: str, text: str) -> None:
    """Raises RequestError if `text` has a lone surrogate, for which there are no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, text[error.start], "half of a surrogate pair is no character") from None


def refusal(request_id: int, error: RequestError) -> TokenBatch:
    """What a request's client gets that the brain would not take: the end, and why."""
    return TokenBatch(b"", b"", finished=((request_id, FinishReason.ERROR),), errors=((request_id, str(error)),))


def fitted(default: SamplingParams, num_prompt: int, max_model_len: int) -> SamplingParams:
    """A default gives way where the model's length limit is near. What somebody asked for does not: it is refused."""
    room = max_model_len - num_prompt
    if default.max_tokens is None or default.max_tokens <= room:
        return default
    return msgspec.structs.replace(default, max_tokens=max(room, 1))

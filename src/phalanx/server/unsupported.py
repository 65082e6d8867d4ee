"""Parameters of OpenAI's and vLLM's APIs that Phalanx does not have: refused by name, unless they ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from phalanx.errors import RequestError

LABELS = frozenset({"user", "metadata", "prompt_cache_key", "safety_identifier"})
"""They tell who asks, and change nothing in the answer."""

# Each with the values that ask for nothing, and what to do instead of any other.
_NO_TOOLS = "calls of tools are not supported; describe the tools in a message and read the call from the answer's text"
_TEXT_ONLY = "only text is supported"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "tool_calls": (([],), _NO_TOOLS),
    "tool_call_id": ((), _NO_TOOLS),
    "response_format": (({"type": "text"},), 'constrained output is not supported; leave it out or {"type": "text"}'),
    "structured_outputs": (({},), "constrained output is not supported; leave it out"),
    "guided_json": ((), "constrained output is not supported; leave it out"),
    "guided_regex": ((), "constrained output is not supported; leave it out"),
    "guided_choice": ((), "constrained output is not supported; leave it out"),
    "logit_bias": (({},), "biases are not supported; penalties, top_k, top_p and min_p are"),
    "bad_words": (([],), "banned words are not supported; stop strings are"),
    "allowed_token_ids": ((), "a restricted vocabulary is not supported; top_k, top_p and min_p are"),
    "best_of": ((1,), "choosing among answers is not supported; take n of them"),
    "use_beam_search": ((False,), "beam search is not supported; sampling and temperature 0 are"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is not supported"),
    "suffix": (("",), "filling in before a suffix is not supported"),
    "prompt_logprobs": ((), "log-probabilities are given for output tokens only; see logprobs"),
    "truncate_prompt_tokens": ((), "prompts are not cut; send a shorter one"),
    "include_stop_str_in_output": ((False,), "stop strings are never part of the output"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": ((True,), "special tokens are never part of the text"),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "prediction": ((), "predicted output is not supported; leave it out"),
    "reasoning_effort": ((), "set what the model's chat template offers in chat_template_kwargs"),
    "verbosity": ((), "ask for a short or long answer in a message, and limit it with max_tokens"),
    "web_search_options": ((), "there is no web search"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "priority": ((0,), "requests are served in order of arrival"),
    "refusal": ((), _TEXT_ONLY),
    "annotations": (([],), _TEXT_ONLY),
    "reasoning_content": ((), "reasoning of earlier turns is not sent to the model; leave it out"),
}


def drop_harmless(values: Mapping[str, Any], kind: type[msgspec.Struct], at: str = "") -> dict[str, Any]:
    """`values` without labels and without parameters that ask for nothing.

    Raises RequestError for what would be ignored otherwise.
    """
    known = msgspec.structs.fields(kind)
    names = {field.encode_name for field in known}
    kept = {}
    for name, value in values.items():
        if name in names:
            kept[name] = value
        elif name not in LABELS:
            harmless, instead = UNSUPPORTED.get(name, ((), f"there is no such parameter; known are {_listed(names)}"))
            # 0 == False, and a boolean is no number
            if not any(value == nothing and type(value) is type(nothing) for nothing in harmless):
                raise RequestError(f"{at}.{name}".lstrip("."), value, instead)
    return kept


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))

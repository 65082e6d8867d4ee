"""The names that users of the package rely on. A change here is a change of the interface: say so in CHANGELOG.md."""

import inspect

import phalanx
from phalanx.protocol.sampling import SamplingParams


def test_names_of_the_package() -> None:
    assert sorted(phalanx.__all__) == ["LLM", "SamplingParams", "__version__"]
    assert all(getattr(phalanx, name) is not None for name in phalanx.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(phalanx, "Phalanx")


def test_llm() -> None:
    public = {name for name, _ in inspect.getmembers(phalanx.LLM) if not name.startswith("_")}
    assert public == {
        "chat", "check_health", "close", "collective_rpc", "generate", "on_failure", "reload",
        "reset_prefix_cache", "resize", "sleep", "wake", "weights_version",
    }  # fmt: skip
    assert list(inspect.signature(phalanx.LLM).parameters) == ["model", "on_progress", "settings"]
    for method, first in ((phalanx.LLM.generate, "prompts"), (phalanx.LLM.chat, "messages")):
        assert {first, "sampling", "progress"} <= set(inspect.signature(method).parameters)


def test_sampling_params() -> None:
    assert sorted(SamplingParams.__struct_fields__) == [
        "frequency_penalty", "ignore_eos", "logprobs", "max_tokens", "min_p", "min_tokens", "presence_penalty",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "temperature", "top_k", "top_p",
    ]  # fmt: skip

"""Phalanx: a large language model over many processes that never hangs in silence.

from phalanx import LLM, SamplingParams

with LLM("path/to/model") as llm:
    print(llm.generate("The capital of France is")[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.version import __version__

if TYPE_CHECKING:
    from phalanx.llm import LLM
    from phalanx.protocol.sampling import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # `LLM` brings in the tokenizer and the model code; a worker or `phalanx --help` must not pay for that. And whoever
    # presses Ctrl-C while numpy is imported must find the command line there to answer.
    if name == "LLM":
        from phalanx.llm import LLM

        return LLM
    if name == "SamplingParams":
        from phalanx.protocol.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'phalanx' has no attribute {name!r}")

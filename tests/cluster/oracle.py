"""What transformers makes of a checkpoint: the tokens and log-probabilities that Phalanx must reproduce."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Oracle:
    """Hugging Face's own model, one prompt at a time, in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._known: dict[tuple[int, ...], list[int]] = {}

    @cached_property
    def eos_token_id(self) -> int:
        return int(self._model.config.eos_token_id)

    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        """The first tokens that greedy decoding makes, end-of-sequence included if it comes."""
        known = self._known.get(prompt, [])
        if len(known) < num_tokens and self.eos_token_id not in known:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
                )
            known = self._known[prompt] = out[0, len(prompt) :].tolist()
        return known[:num_tokens]

    def choices(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        """What greedy decoding chooses in the place of each output token, after the prompt and those before.

        It is `output` if, and only if, that is what greedy decoding makes. One pass tells, instead of one a token; but
        where two tokens are equally likely to the last bit, it may choose the other one.
        """
        chosen: list[int] = self._logits(prompt, output).argmax(-1).tolist()
        return output if chosen == output else self.greedy(prompt, len(output))

    def logprobs(self, prompt: tuple[int, ...], output: list[int]) -> torch.Tensor:
        """Log-probabilities of the whole vocabulary before each output token, [tokens, vocabulary]."""
        return torch.log_softmax(self._logits(prompt, output), dim=-1)

    def _logits(self, prompt: tuple[int, ...], output: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output]])).logits[0].float()
        return logits[len(prompt) - 1 : -1]

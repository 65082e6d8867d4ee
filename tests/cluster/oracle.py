"""What transformers makes of a checkpoint: the tokens and log-probabilities that Phalanx must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
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

    def greedy(self, prompt: tuple[int, ...], num_tokens: int, guess: Sequence[int] = ()) -> list[int]:
        """The first tokens that greedy decoding makes, end-of-sequence included if it comes.

        One pass tells whether `guess` begins with them, instead of one a token; but where two tokens are equally likely
        to the last bit, that pass may choose the other one.
        """
        known = self._known.get(prompt, [])
        if len(known) < num_tokens and self.eos_token_id not in known:
            guessed = self._to_the_end(guess)[:num_tokens]
            is_whole = len(guessed) == num_tokens or self.eos_token_id in guessed
            is_right = is_whole and self._likeliest(prompt, guessed) == guessed
            known = self._known[prompt] = guessed if is_right else self._generate(prompt, num_tokens)
        return known[:num_tokens]

    def choices(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        """What greedy decoding chooses in the place of each output token, after the prompt and those before.

        It is `output` if, and only if, that is what greedy decoding makes.
        """
        chosen = self._likeliest(prompt, output)
        return output if chosen == output else self.greedy(prompt, len(output))

    def logprobs(self, prompt: tuple[int, ...], output: list[int]) -> torch.Tensor:
        """Log-probabilities of the whole vocabulary before each output token, [tokens, vocabulary]."""
        return torch.log_softmax(self._logits(prompt, output), dim=-1)

    def _to_the_end(self, output: Sequence[int]) -> list[int]:
        """Without what comes after the end of sequence."""
        tokens = list(output)
        return tokens[: tokens.index(self.eos_token_id) + 1] if self.eos_token_id in tokens else tokens

    def _generate(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
            )
        made: list[int] = out[0, len(prompt) :].tolist()
        return made

    def _likeliest(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        likeliest: list[int] = self._logits(prompt, output).argmax(-1).tolist()
        return likeliest

    def _logits(self, prompt: tuple[int, ...], output: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output]])).logits[0].float()
        return logits[len(prompt) - 1 : -1]

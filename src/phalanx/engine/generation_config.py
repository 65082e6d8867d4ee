"""What a checkpoint's own files say about generating with it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from phalanx.errors import CheckpointError, RequestError
from phalanx.protocol.sampling import SamplingParams


class GenerationConfig(msgspec.Struct, frozen=True):
    """The parts of `generation_config.json` that Phalanx follows. Unset ones are None.

    `do_sample` is not followed: as in vLLM and the OpenAI API, a request samples unless its temperature is 0.
    """

    eos_token_id: int | tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def read(cls, directory: Path) -> GenerationConfig:
        """Read `generation_config.json`; an older checkpoint has the end-of-sequence ids in `config.json` instead.

        Raises CheckpointError if a file is not JSON or a value is of a wrong type or out of range.
        """
        for name in ("generation_config.json", "config.json"):
            path = directory / name
            if path.is_file():
                try:
                    found = msgspec.json.decode(path.read_bytes(), type=cls)
                    found.default_sampling().check()
                except (msgspec.DecodeError, RequestError) as error:
                    raise CheckpointError(f"{path}: {error}") from error
                return found
        return cls()

    def default_sampling(self) -> SamplingParams:
        """What a request gets that names no sampling of its own: the checkpoint's advice over our defaults."""
        advice = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(**advice)

    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

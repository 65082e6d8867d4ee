"""What a dense model's experts are to be. No torch here: the command line is made from it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from phalanx.config import Index, Positive, Section
from phalanx.errors import ConfigError

ArchitectureName = Literal["mixtral", "qwen3_moe"]


class Mixture(Section, frozen=True, kw_only=True):
    """Raises ConfigError if a token is to go to more experts than there are."""

    num_experts: Positive
    """Experts of each layer."""

    num_experts_per_tok: Positive
    """How many of them compute a token."""

    architecture: ArchitectureName | None = None
    """What to make; by default the one whose attention is the model's: qwen3_moe of Qwen3, mixtral of others."""

    noise: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Noise on the experts' weights, so that they differ: its standard deviation as a share of the root mean square
    of each matrix. Without noise the mixture computes what the dense model does."""

    seed: Index = 0
    """Of the routers' random weights and of the noise."""

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            allowed = f"at most {self.num_experts}, the number of experts"
            raise ConfigError("num_experts_per_tok", self.num_experts_per_tok, allowed)

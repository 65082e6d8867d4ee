"""What computes: the brain, the ranks that it plans for, and what changes them. For who feeds it with requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.engine.brain import Brain, Pending, StepExecutor
from phalanx.engine.maintenance import Maintenance
from phalanx.engine.succession import Succession
from phalanx.engine.tokenizer import eos_token_ids
from phalanx.executor.executor import OnProgress
from phalanx.membership.formation import Formation, start_formation
from phalanx.memory.shared_weights import SharedWeights
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.worker import Step, StepResult


class EngineCore:
    """For one thread. A context manager: the ranks end with it."""

    def __init__(self, formation: Formation, brain: Brain, maintenance: Maintenance) -> None:
        self.formation = formation
        self.brain = brain
        self.maintenance = maintenance
        self.succession = Succession(brain, formation)
        self._resources = ExitStack()
        self._resources.push(formation)

    def __enter__(self) -> EngineCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called more than once."""
        self._resources.close()

    def step(self) -> TokenBatch | None:
        """One turn of the brain. Raises what has ended its ranks: whether that can be healed the formation knows."""
        num_before = self.brain.num_steps
        batch = self.brain.step()
        if self.brain.num_steps > num_before:  # it may only have told of requests that have ended
            self.formation.progressed()
        return batch


def start_core(
    config: Config,
    checkpoint: Checkpoint,
    on_progress: OnProgress,
    offered: SharedWeights | None = None,
    *,
    tokenizer_source: str | Path | None = None,
    before_step: Callable[[], None] | None = None,
) -> EngineCore:
    """Start the ranks and load the model into them. Blocks until they are ready to step; raises as `start_formation`.

    What tokens end a text is read from `tokenizer_source`, by default what the configuration names, or the checkpoint.
    `before_step` is called before each step, from within `EngineCore.step`: an inline rank computes a step while it is
    sent, and the brain may send several in one turn.
    """
    with ExitStack() as undo:
        formation = undo.enter_context(start_formation(config, checkpoint, on_progress, offered))
        capacity = formation.capacity
        source = tokenizer_source or config.model.tokenizer or checkpoint.path
        brain = Brain(
            formation.config,
            formation if before_step is None else _Announced(formation, before_step),
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=eos_token_ids(checkpoint.path, source),
            balancing=Balancing(config, formation) if config.parallel.enable_eplb else None,
        )
        core = EngineCore(formation, brain, Maintenance(config, checkpoint, brain, formation))
        undo.pop_all()
    return core


class _Announced:
    """The executor as the brain has it."""

    def __init__(self, executor: StepExecutor, before_step: Callable[[], None]) -> None:
        self._executor = executor
        self._before_step = before_step

    def step(self, step: Step) -> Pending[tuple[StepResult, ...]]:
        self._before_step()
        return self._executor.step(step)

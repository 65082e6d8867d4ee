"""`phalanx chaos --check`: hurt an engine that heals while it serves, and see that its clients see nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from phalanx.cli.exit_codes import FAILURE
from phalanx.cli.options import given
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.testing.blows import Blow, BlowKind, Moment, blow_of_seed
from phalanx.testing.faults import World

if TYPE_CHECKING:
    from phalanx.testing.checker import Round

ENGINE_RESTARTS = 100
"""As many as the engine's process may be killed."""


class Check(NamedTuple):
    """What is to be done."""

    model: str
    settings: dict[str, Any]
    seed: int
    rounds: Sequence[int]
    """Their numbers: a round is the same for the same seed and number."""
    kinds: Sequence[BlowKind]
    states: Sequence[Moment]
    num_streams: int
    log: Path | None

    def config(self) -> Config:
        """Of the engine. Raises ConfigError for one that does not heal."""
        config = Config.build(
            model=self.model,
            launcher="local",
            ledger=True,
            allow_chaos=True,
            engine_restarts=ENGINE_RESTARTS,
            **given(self.settings),
        )
        if not config.healing.heal:
            raise ConfigError("heal", False, "with --check it must heal")
        if config.parallel.engine_size < config.parallel.world_size:
            size = config.parallel.data_parallel_size
            raise ConfigError("data_parallel_size", size, "with --check all ranks must work together")
        return config

    def blows(self, config: Config) -> list[tuple[int, Blow]]:
        """With the numbers of their rounds. Raises ConfigError if none is possible."""
        from phalanx.testing.strike import why_no_way_back

        world = World.of(config)
        if world.can_shrink and "kill-resize" in self.kinds and (why_not := why_no_way_back(config)) is not None:
            click.echo(f"kill-resize is left out, since ranks could not come back: {why_not}", err=True)
            world = world._replace(can_shrink=False)
        draw = partial(blow_of_seed, kinds=self.kinds, states=self.states, has_standby=bool(config.healing.standby))
        return [(index, draw(self.seed, index, world)) for index in self.rounds]


def run_check(check: Check, *, as_json: bool) -> None:
    """Print a line for each round, and a table at the end. Ends with exit code 1 if anything did not hold."""
    from phalanx.testing.rounds import rungs, table

    config = check.config()
    blows = check.blows(config)
    rounds, left = asyncio.run(_run(check, config, blows, as_json=as_json))
    if not as_json:
        click.echo("\n" + table(rounds, lambda one: one.blow.kind, "blow"))
        click.echo(f"\nhealed by: {rungs(rounds)}")
    for complaint in left:
        click.echo(complaint, err=True)
    wrong = [one.index for one in rounds if one.violations]
    for index in wrong:
        click.echo(f"to run it again: the same command with --seed {check.seed} --only {index}", err=True)
    if len(rounds) < len(blows):
        click.echo(f"{len(blows) - len(rounds)} rounds were not run: the engine is dead", err=True)
    if not any(one.has_happened for one in rounds):
        click.echo("nothing has happened: nothing was tried", err=True)
    if wrong or left or len(rounds) < len(blows) or not any(one.has_happened for one in rounds):
        click.get_current_context().exit(FAILURE)


async def _run(
    check: Check, config: Config, blows: Sequence[tuple[int, Blow]], *, as_json: bool
) -> tuple[list[Round], list[str]]:
    """The rounds, each printed as it ends, and what the engine has left at its end."""
    from phalanx.testing.checker import Checker
    from phalanx.testing.rounds import heading, row

    rounds: list[Round] = []
    with _bar(len(blows)) as advance:
        checker = await Checker.start(config, num_streams=check.num_streams, seed=check.seed, log=check.log)
        try:
            if not as_json:
                click.echo(heading())
            for index, blow in blows:
                if not checker.is_alive:
                    break
                found = await checker.round(index, blow)
                rounds.append(found)
                click.echo(msgspec.json.encode(found).decode() if as_json else row(found))
                advance()
        finally:
            left = await checker.close()
    return rounds, left


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """How many rounds are done, on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("rounds", total=total)
        yield lambda: progress.advance(task)

"""`phalanx chaos`: hurt an engine on purpose, and see whether the ledger says who it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import msgspec

from phalanx.cli.chaos_check import Check, run_check
from phalanx.cli.exit_codes import FAILURE
from phalanx.cli.options import SectionedCommand, engine_options, given, given_of
from phalanx.cli.setting_types import type_for
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.testing.blows import BLOW_KINDS, ENDS, MOMENTS
from phalanx.testing.faults import KINDS, Fault, FaultPlan, Kind, State, World

if TYPE_CHECKING:
    from phalanx.testing.chaos import Outcome

Draw = Callable[[World], tuple[Fault, ...]]
"""Gives the faults for a world."""

BRIEF_S = 5.0
"""What happens to an instance that runs lasts no longer, so that it serves again."""

_STATES: tuple[State, ...] = get_args(State)
_SET_HERE = ("launcher", "ledger", "allow_chaos", "engine_restarts", "served_model_name", "worker_extension_cls")
_TITLES = ("fault", "rank", "step", "state", "verdict", "ms", "culprit", "cause", "group", "sequence", "operation")
_COLUMNS = "{:12} {:>4} {:>5} {:8} {:34} {:>8}  {:9} {:9} {:9} {:9} {:9}"


class _Names(click.ParamType):  # type: ignore[type-arg]  # generic only in later versions of click
    """Some of several names, with commas in between."""

    name = "list"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        for name in names:
            if name not in self._allowed:
                self.fail(f"{name!r} is none of {', '.join(self._allowed)}", param, ctx)
        return names


@click.command(
    cls=SectionedCommand,
    params=[
        click.Option(["--seed"], type=int, default=1, show_default=True, help="The same faults for the same seed."),
        click.Option(["--count"], type=click.IntRange(1), default=20, show_default=True, help="How many faults."),
        click.Option(
            ["--kinds"],
            type=_Names((*KINDS, *ENDS)),
            default=KINDS,
            help=f"Some of {','.join(KINDS)}, and with --check also {','.join(ENDS)}; by default all that can happen.",
        ),
        click.Option(
            ["--states"],
            type=_Names((*_STATES, "any")),
            default=("idle", "prefill", "decode"),
            help=f"Of {','.join(_STATES)}; all but start by default. With --check there is no start, but any: whatever"
            " ranks do.",
        ),
        click.Option(
            ["--plan"], type=click.Path(exists=True, dir_okay=False), help="A fault plan in TOML or JSON, not a seed."
        ),
        click.Option(
            ["--check"],
            is_flag=True,
            help="One engine, which heals, for all faults: check that its clients see nothing but pauses.",
        ),
        click.Option(
            ["--streams"],
            type=click.IntRange(1, 256),
            default=8,
            show_default=True,
            help="With --check: requests at a time, of different kinds.",
        ),
        click.Option(["--only"], type=click.IntRange(0), help="With --check: only the round with this number."),
        click.Option(
            ["--log"],
            type=click.Path(dir_okay=False, path_type=Path),
            help="With --check: a file for what the engine says; otherwise nobody hears it.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print a line of JSON for each fault instead."),
        click.Option(
            ["--pid"],
            type=click.IntRange(1),
            help="Not MODEL, but what runs already, by the process id of its engine or server.",
        ),
        *engine_options(leave_out=_SET_HERE),
    ],
)
@click.argument("model", required=False, type=type_for("model", str))
def chaos(
    model: str | None,
    seed: int,
    count: int,
    kinds: tuple[Kind, ...],
    states: tuple[State, ...],
    plan: str | None,
    check: bool,
    streams: int,
    only: int | None,
    log: Path | None,
    as_json: bool,
    pid: int | None,
    **settings: Any,
) -> None:
    """Start engines of MODEL on this host, each for one fault, and compare what the ledger says with what was done.

    With --pid the faults happen, for five seconds each, to an instance that runs, if it was started with --allow-chaos:
    it needs some load meanwhile, and most kinds end it. The exit code is 1 if a culprit, a cause, a group, a sequence
    number or an operation was wrong, or could not be told.

    With --check they happen to one engine that heals, while it serves streams of different kinds: greedy, seeded, with
    penalties, log-probabilities and stop strings, and some that are cancelled. The exit code is 1 if one of them is not
    that of a run without a fault, does not end exactly once, waits for too long, if the wrong rank is blamed, or
    something is left over.
    """
    if check:
        _refuse_with_check(pid=pid, plan=plan)
        rounds = range(count) if only is None else (only,)
        has_kinds, has_states = given_of("kinds"), given_of("states")
        its_kinds, its_states = kinds if has_kinds else BLOW_KINDS, states if has_states else MOMENTS
        todo = Check(str(model), settings, seed, rounds, its_kinds, its_states, streams, log)
        run_check(todo, as_json=as_json)
        return
    _refuse_without_check(kinds, states)
    if (model is None) == (pid is None):
        raise click.UsageError("give MODEL, or --pid of an instance that runs")
    if pid is not None and given(settings):
        raise click.UsageError("--pid is of an instance that has its settings")
    _refuse_without_effect(has_plan=plan is not None)
    if pid is not None:
        kinds, states = _possible_where_it_runs(kinds, states)
    draw = partial(_faults, plan, seed, count, kinds=kinds, states=states)
    outcomes = _in_instance(pid, draw) if pid is not None else _in_engines(str(model), settings, seed, draw)
    all_right, has_happened = True, False
    for number, outcome in enumerate(outcomes):
        if number == 0 and not as_json:  # not before there is something to say, which may be an error
            click.echo(_COLUMNS.format(*_TITLES))
        has_happened = has_happened or outcome.injected is not None
        all_right = all_right and (outcome.injected is None or outcome.rightness.is_right)
        click.echo(msgspec.json.encode(outcome).decode() if as_json else _row(outcome))
    if not has_happened:
        click.echo("no fault has happened: nothing was tried", err=True)
    if not (all_right and has_happened):
        click.get_current_context().exit(FAILURE)


def _refuse_without_effect(*, has_plan: bool) -> None:
    """Raises UsageError for what a seed makes a plan of, if there is a plan."""
    if has_plan and (without := given_of("seed", "count", "kinds", "states")):
        raise click.UsageError(f"{', '.join(without)}: without effect, since --plan says what is to go wrong")


def _refuse_with_check(*, pid: int | None, plan: str | None) -> None:
    """Raises UsageError for what is not to be had then."""
    context = click.get_current_context()
    if context.params["model"] is None or pid is not None or plan is not None:
        raise click.UsageError("--check needs MODEL, and neither --pid nor --plan")
    if context.params["only"] is not None and given_of("count"):
        raise click.UsageError("--count: without effect, since --only says which round")
    for name, allowed in (("kinds", BLOW_KINDS), ("states", MOMENTS)):
        if given_of(name) and (odd := [one for one in context.params[name] if one not in allowed]):
            raise click.UsageError(f"--{name} {','.join(odd)}: not with --check, where an engine serves")


def _refuse_without_check(kinds: tuple[str, ...], states: tuple[str, ...]) -> None:
    """Raises UsageError for what is to be had with --check alone."""
    if without := given_of("streams", "only", "log"):
        raise click.UsageError(f"{', '.join(without)}: only with --check")
    if odd := [one for one in (*kinds, *states) if one in (*ENDS, "any")]:
        raise click.UsageError(f"{', '.join(odd)}: only with --check")


def _possible_where_it_runs(
    kinds: tuple[Kind, ...], states: tuple[State, ...]
) -> tuple[tuple[Kind, ...], tuple[State, ...]]:
    """What a seed may draw from for an instance that runs. Raises UsageError for what was asked for and cannot be."""
    if "error" in kinds and given_of("kinds"):
        raise click.UsageError("--kinds error: not with --pid, as the engine tells it, and no verdict is given on it")
    if "start" in states:
        raise click.UsageError("--states start: not with --pid, as what runs has started")
    return tuple(kind for kind in kinds if kind != "error"), states


def _in_engines(model: str, settings: dict[str, Any], seed: int, draw: Draw) -> Iterator[Outcome]:
    """An engine for each fault."""
    from phalanx.testing.chaos import try_fault
    from phalanx.testing.warm_launcher import WarmStart

    config = Config.build(model=model, launcher="local", ledger=True, allow_chaos=True, **given(settings))
    world_size = config.parallel.world_size
    if world_size == 1 or config.parallel.engine_size < world_size:
        raise ConfigError("tensor_parallel_size", config.parallel.tensor_parallel_size, "ranks must work together")
    faults = draw(World.of(config))
    with WarmStart() as warm:
        for number, fault in enumerate(faults):
            yield try_fault(config, fault, warm, seed=seed + number)


def _in_instance(pid: int, draw: Draw) -> Iterator[Outcome]:
    """One instance for all, as long as it lives."""
    from phalanx.testing.running_chaos import find_instance, try_faults

    instance = find_instance(pid)
    faults = draw(World.unknown(instance.world_size))
    if any(fault.kind == "error" for fault in faults):
        raise ConfigError("kind", "error", "not with --pid: the engine tells it, and no verdict is given on it")
    if any(fault.state == "start" for fault in faults):
        raise ConfigError("state", "start", "not with --pid: what runs has started")
    brief = tuple(msgspec.structs.replace(fault, seconds=min(fault.seconds, BRIEF_S)) for fault in faults)
    yield from try_faults(instance, brief)


def _faults(
    plan: str | None,
    seed: int,
    count: int,
    world: World,
    *,
    kinds: tuple[Kind, ...],
    states: tuple[State, ...],
) -> tuple[Fault, ...]:
    if plan is None:
        for kind in kinds if kinds != KINDS else ():
            if (why_not := world.why_not(kind)) is not None:
                raise ConfigError("kinds", kind, why_not)
        found = FaultPlan.of_seed(seed, count, world, kinds=kinds, states=states)
        return found.faults
    faults = FaultPlan.parse(Path(plan).read_text()).faults
    for fault in faults:
        fault.check(world)
    return faults


def _row(outcome: Outcome) -> str:
    """A line of the table."""
    fault, injected, verdict, rightness = outcome.fault, outcome.injected, outcome.verdict, outcome.rightness
    if injected is None:
        said = outcome.error or "it never happened"
    elif verdict is not None:
        said = f"{verdict.cause}: rank {' or '.join(map(str, verdict.culprits))}"
        said += f", {verdict.group} {verdict.sequence}" if verdict.group is not None else ""
    else:
        said = outcome.error.splitlines()[0] if outcome.error else "nothing"
    took = "" if outcome.told_after_s is None else f"{outcome.told_after_s * 1e3:.0f}"
    answers = msgspec.structs.astuple(rightness) if injected is not None else [""] * 5
    step = str(injected.step) if injected is not None and injected.step else ""
    return _COLUMNS.format(fault.kind, fault.rank, step, fault.state, said[:34], took, *answers).rstrip()

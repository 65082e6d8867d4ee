"""`phalanx chaos`: what it refuses, and its table."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from phalanx.cli.chaos import _row
from phalanx.cli.commands import phalanx
from phalanx.errors import ConfigError, StartError, UserError
from phalanx.ledger.verdict import Verdict
from phalanx.testing.chaos import Outcome
from phalanx.testing.checker import Checker
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import Fault, Injected
from phalanx.testing.oracle import NOTHING, assess


def run(*arguments: str) -> Result:
    return CliRunner().invoke(phalanx, ["chaos", *arguments])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give MODEL, or --pid"),
        (("model", "--pid", "1"), "give MODEL, or --pid"),
        (("--pid", "1", "-tp", "2"), "--pid is of an instance that has its settings"),
        (("model", "--kinds", "stop,explode"), "'explode' is none of kill, oom, stop"),
        (("model", "--states", "asleep"), "'asleep' is none of idle, prefill"),
        (("--pid", "1", "--states", "decode,start"), "--states start: not with --pid"),
        (("--pid", "1", "--kinds", "stop,error"), "--kinds error: not with --pid"),
        (("model", "--plan", "PLAN", "--seed", "1"), "--seed: without effect, since --plan says"),
        (("--pid", "1", "--plan", "PLAN", "--states", "idle"), "--states: without effect"),
        (("model", "--plan", "PLAN", "--kinds", "stop", "--count", "3"), "--count, --kinds: without effect"),
        (("--check",), "--check needs MODEL"),
        (("model", "--check", "--plan", "PLAN"), "--check needs MODEL, and neither --pid nor --plan"),
        (("model", "--check", "--only", "3", "--count", "4"), "--count: without effect, since --only says"),
        (("model", "--check", "--states", "start"), "--states start: not with --check"),
        (("model", "--check", "--kinds", "kill,store"), "--kinds store: not with --check"),
        (("model", "--streams", "3", "--only", "1"), "--streams, --only: only with --check"),
        (("model", "--kinds", "stop,kill-engine"), "kill-engine: only with --check"),
        (("model", "--states", "any"), "any: only with --check"),
    ],
)
def test_a_wrong_command(arguments: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('[[faults]]\nkind = "kill"\nrank = 0\n')
    result = run(*(str(tmp_path / "plan.toml") if one == "PLAN" else one for one in arguments))
    assert result.exit_code == 2 and complaint in result.output


@pytest.mark.parametrize(
    ("flags", "field"), [(["--no-heal"], "heal"), (["-dp", "2"], "data_parallel_size"), (["--kinds", "link"], "kinds")]
)
def test_what_cannot_be_checked_is_refused(flags: list[str], field: str) -> None:
    error = run("model", "--check", "-tp", "2", *flags).exception
    assert isinstance(error, ConfigError) and error.field == field


def test_one_rank_alone_has_no_ledger() -> None:
    result = run("model")
    error = result.exception
    assert isinstance(error, ConfigError) and error.field == "tensor_parallel_size"
    assert not result.output, "no table begins that has no line"


def test_no_table_begins_before_there_is_an_engine_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def none_starts(*_: object, **__: object) -> None:
        raise StartError("rank 1", "loading", "no memory")

    monkeypatch.setattr(Checker, "start", none_starts)
    result = run(str(write_checkpoint(tmp_path / "llama")), "--check", "-tp", "2")
    assert isinstance(result.exception, StartError) and "blow" not in result.output


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[faults]]\nkind = "kill"\nrank = 2\n')
    error = run("model", "-tp", "2", "--plan", str(plan)).exception
    assert isinstance(error, ConfigError) and (error.field, error.value) == ("rank", 2)


def test_a_kind_that_cannot_happen_is_refused() -> None:
    error = run("model", "-tp", "2", "--kinds", "stop,link").exception
    assert isinstance(error, ConfigError) and (error.field, error.value) == ("kinds", "link")
    assert "cut the network" in str(error)


def test_a_process_that_is_no_instance() -> None:
    error = run("--pid", "1").exception
    assert isinstance(error, UserError) and "process 1 is no instance" in str(error)


def test_rows() -> None:
    fault = Fault(kind="swap", rank=1, state="prefill")
    done = Injected(at_ns=1, step=7, group="tp@0", sequence=9, theirs="a", peers="b")
    verdict = Verdict(
        cause="diverged", culprits=(1,), nodes=("x",), what="", step=7, group="tp@0", sequence=9, theirs="a", peers="b"
    )
    right = Outcome(
        fault=fault,
        injected=done,
        verdict=verdict,
        error="",
        told_after_s=0.0456,
        rightness=assess(fault, done, verdict),
        took_s=1.0,
    )
    assert _row(right).split() == ["swap", "1", "7", "prefill", "diverged:", "rank", "1,", "tp@0", "9", "46"] + 5 * [
        "right"
    ]
    never = Outcome(
        fault=fault, injected=None, verdict=None, error="", told_after_s=None, rightness=NOTHING, took_s=1.0
    )
    assert _row(never).split() == ["swap", "1", "prefill", "it", "never", "happened"]
    refused = msgspec.structs.replace(never, error="not here")
    assert _row(refused).split() == ["swap", "1", "prefill", "not", "here"]

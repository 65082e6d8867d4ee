"""`phalanx upcycle`: what it says, and what it refuses before it loads anything."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich import console

from phalanx.cli import main
from phalanx.models.checkpoint import resolve
from phalanx.testing.checkpoints import write_checkpoint

TWO = ["--num-experts", "2", "--num-experts-per-tok", "1"]


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "dense", "llama"))


def test_a_mixture_is_made_and_named(dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "mixture")
    assert main.run(["upcycle", dense, target, *TWO, "--noise", "0.01", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}: MixtralForCausalLM, 2 experts, 1 a token\n"
    assert err == ""
    assert resolve(target).hf_config.num_local_experts == 2


def test_a_terminal_sees_how_far_it_is(dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    terminal = console.Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    assert main.run(["upcycle", dense, str(tmp_path / "mixture"), *TWO]) == 0
    assert "writing" in written.getvalue()
    assert "MB" in written.getvalue() or "kB" in written.getvalue()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num-experts", "2", "--num-experts-per-tok", "3"], "--num-experts-per-tok: 3 is not possible: at most 2"),
        (["--num-experts", "0", "--num-experts-per-tok", "1"], "--num-experts: 0 is not possible: a whole number"),
        ([*TWO, "--noise", "nan"], "--noise: nan is not possible: a number, at least 0 and at most 1"),
        ([*TWO, "--noise", "-1"], "--noise: -1 is not possible: a number, at least 0 and at most 1"),
        ([*TWO, "--seed", "x"], "--seed: 'x' is not possible: a whole number"),
        ([*TWO, "--architecture", "olmoe"], "--architecture: 'olmoe' is not possible: one of mixtral, qwen3_moe"),
        (["--num-experts", "2"], "Missing option '--num-experts-per-tok'"),
        ([*TWO, "--revision", "main"], "--revision: 'main' is not possible: only a model on the hub has revisions"),
    ],
)
def test_wrong_flags(
    flags: list[str], complaint: str, dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["upcycle", dense, str(tmp_path / "mixture"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"phalanx: error: {complaint}")
    assert not (tmp_path / "mixture").exists()


def test_a_target_that_is_not_empty_is_kept(dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "mixture")
    assert main.run(["upcycle", dense, target, *TWO]) == 0
    four = ["--num-experts", "4", "--num-experts-per-tok", "2"]
    assert main.run(["upcycle", dense, target, *four]) == 2
    assert "is not empty; --overwrite replaces" in capsys.readouterr().err
    assert resolve(target).hf_config.num_local_experts == 2
    assert main.run(["upcycle", dense, target, *four, "--overwrite"]) == 0
    assert resolve(target).hf_config.num_local_experts == 4


def test_a_mistake_is_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from phalanx.cli import main\n"
        f"main.run(['upcycle', './nowhere', {str(tmp_path / 'x')!r}, *{TWO!r}])\n"
        f"main.run(['upcycle', './nowhere', {str(tmp_path)!r}, *{TWO!r}])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    assert "there is no such file or directory" in done.stderr
    assert "is not empty" in done.stderr

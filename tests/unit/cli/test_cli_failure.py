"""A failed command: one line, the right exit code, a traceback only on demand."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from phalanx.cli import main
from phalanx.cli.failure import report
from phalanx.errors import CheckpointError, ConfigError, PlacementError, RequestError, StartError


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "m", "--max-num-seqs", "0"], "--max-num-seqs: 0 is not possible: a whole number, at least 1"),
        (["serve", "m", "--dtype", "int8"], "--dtype: 'int8' is not possible: one of auto, float32"),
        (["serve", "m", "--max-num-sqs", "1"], "--max-num-seqs"),
        (["serve"], "MODEL"),
        (["serv", "m"], "serv"),
        (["serve", "m", "--max-num-batched-tokens", "8"], "--max-num-batched-tokens: 8 is not possible"),
        (["serve", "m", "--launcher", "inline", "-tp", "2"], "--launcher: 'inline' is not possible"),
        (
            ["serve", "m", "--ray-bundle-indices", "0,x"],
            "--ray-bundle-indices: '0,x' is not possible: values with commas",
        ),
        (["serve", "m", "--ray-runtime-env", "[]"], "--ray-runtime-env: '[]' is not possible: a JSON object"),
        (["serve", "m", "--ray-address", "h:1"], "--ray-address: 'h:1' is not possible: only with launcher ray"),
        (["serve", "m", "--api-key-file", "/no/such"], "--api-key-file: '/no/such' is not possible"),
        (["serve", "m", "--host", "no such host"], "--host: 'no such host' is not possible"),
        (["serve", "\udcff"], r"MODEL: '\udcff' is not possible: text in UTF-8"),
        (["generate", "m", "hi\udcff"], r"prompt: 'hi\udcff' is not possible: text in UTF-8"),
        (["generate", "m"], "there is no prompt: give some after MODEL, or a file of them with --file"),
        (["generate", "m", "hi", "--file", "x"], "--file: 'x' is not possible: give either prompts or a file"),
        (["generate", "m", "--file", "/no/such"], "--file: '/no/such' is not possible: it cannot be read"),
        (["generate", "m", "hi", "--temperature", "-1"], "--temperature: -1.0 is not possible"),
        (["generate", "m", "hi", "--output", "/no/such/file"], "--output: '/no/such/file' is not possible"),
    ],
)
def test_the_users_mistakes(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("phalanx: error: ")
    assert err.count("\n") == 1
    assert line in err


def test_a_taken_port_is_found_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.run(["serve", "/no/such/model", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"--port: {port} is not possible: another process listens on 127.0.0.1:{port}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("no config.json\n in it"), 2, "phalanx: error: no config.json in it\n"),
        (RequestError("prompt", [], "one token"), 2, "phalanx: error: prompt: [] is not possible: one token\n"),
        (
            ConfigError("max_model_len", 1000, "this model goes up to 64"),
            2,
            "phalanx: error: --max-model-len: 1000 is not possible: this model goes up to 64\n",
        ),
        (
            StartError("rank 1", "loading", "killed"),
            1,
            "phalanx: error: rank 1 did not start: killed (while loading) (PHALANX_DEBUG=1 shows the traceback)\n",
        ),
        (
            PlacementError("there is no\nroom", "  node  free\n  a     0"),
            2,
            "phalanx: error: there is no room\n  node  free\n  a     0\n",
        ),
        (
            StartError("the engine", "loading", "rank 1 died; its log ends:\n  one\n  two"),
            1,
            "phalanx: error: the engine did not start: rank 1 died; its log ends: (while loading) "
            "(PHALANX_DEBUG=1 shows the traceback)\n  one\n  two\n",
        ),
        (
            StartError("the engine", "loading", "rank 0 on alpha, loading: RuntimeError: broken"),
            1,
            "phalanx: error: the engine did not start: rank 0 on alpha, loading: RuntimeError: broken "
            "(PHALANX_DEBUG=1 shows the traceback)\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "phalanx: error: the output cannot be written: No space left on device "
            "(PHALANX_DEBUG=1 shows the traceback)\n",
        ),
        (KeyError("x"), 1, "phalanx: error: KeyError: 'x' (PHALANX_DEBUG=1 shows the traceback)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_report(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == code
    assert capsys.readouterr().err == line


def test_the_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PHALANX_DEBUG", "1")
    try:
        raise KeyError("x")
    except KeyError as error:
        report(error)
    assert "Traceback" in capsys.readouterr().err


def test_help_is_fast_because_it_loads_little() -> None:
    code = (
        "import sys; from phalanx.cli.main import run; assert run(['serve', '--help']) == 0; "
        "print(*{'torch', 'transformers', 'uvicorn', 'fastapi', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--max-num-seqs" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("module", ["numpy", "msgspec", "click", "asyncio"])
def test_an_interrupt_during_the_imports_leaves_no_traceback(module: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from phalanx.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_as_a_program() -> None:
    command = [sys.executable, "-c", "from phalanx.cli.main import main; main()", "serve", "m", "--port", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PHALANX_DEBUG": "0"})
    assert done.returncode == 2
    assert done.stderr == "phalanx: error: --port: -1 is not possible: a whole number, at least 0 and at most 65535\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_without_a_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0
    assert "phalanx" in capsys.readouterr().out

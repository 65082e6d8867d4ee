"""`phalanx doctor`: every line says how it is and what to do; failures give exit code 1."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
from pathlib import Path

import pytest

from phalanx.cli import checks, doctor, instances, main
from phalanx.cli.checks import Check
from phalanx.cli.commands import phalanx
from phalanx.config import Config, ServerConfig
from phalanx.errors import PlacementError
from phalanx.executor import platform
from phalanx.ledger.instance import Found


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this user has running."""
    monkeypatch.setattr(instances, "running", lambda: iter(()))


def test_json_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"python", "phalanx", "torch", "cores", "memory", "shared memory", "futex", "pidfd", "open files"} <= set(
        found
    )
    for name in ("shared memory", "futex", "pidfd"):
        assert found[name]["status"] == "ok"
    assert all(check["advice"] for check in found.values() if check["status"] != "ok")


def test_a_failure_is_shown_with_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [Check("torch", "ok", "2"), Check("futex", "fail", "not permitted", "allow it")]
    monkeypatch.setattr(checks, "all_checks", lambda model, server: iter(broken))
    assert main.run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "torch", "2"]
    assert lines[1].split() == ["fail", "futex", "not", "permitted"]
    assert lines[2].strip() == "→ allow it"


def test_a_call_that_is_not_permitted_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    for check in (*checks.memfd(), *checks.pidfd()):
        assert check.status == "fail"
        assert "not permitted" in check.detail
        assert "seccomp" in (check.advice or "")


def test_few_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    (check,) = checks.open_files()
    assert (check.status, check.advice) == ("warn", "ulimit -n 4096")


def test_a_taken_port_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (check,) = checks.port(ServerConfig(port=port))
    assert check.status == "warn"
    assert str(port) in check.detail


def test_a_host_that_is_not_here_is_a_failure() -> None:
    (check,) = checks.port(ServerConfig(host="192.0.2.77"))
    assert (check.status, check.detail) == ("fail", "the server cannot listen on 192.0.2.77:8000")
    assert "--host: no interface of this machine has it" in (check.advice or "")


def test_a_running_instance_is_told_besides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "all_checks", lambda model, server: iter([Check("torch", "ok", "2")]))
    monkeypatch.setattr(instances, "running", lambda: iter([Found(pid=5, instance=None)]))
    assert main.run(["doctor", "--json"]) == 0
    assert [check["name"] for check in json.loads(capsys.readouterr().out)] == ["torch", "placement", "instance 5"]
    assert main.run(["doctor", "--json", "--running"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["status"], found["detail"]) == ("warn", "it is of another version")
    assert main.run(["doctor", "--json", "--pid", "5"]) == 0
    assert [check["name"] for check in json.loads(capsys.readouterr().out)] == ["instance 5"]


def test_no_such_process_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--pid", str(os.getpid())]) == 2
    assert f"process {os.getpid()} is of no instance of this user" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--pid", "5"], ["--running"], ["--stacks"]])
def test_what_runs_has_a_model_and_settings_already(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["model"], ["-tp", "2"]):
        assert main.run(["doctor", *flags, *given]) == 2
        assert "leave out MODEL and its settings" in capsys.readouterr().err


def test_the_flags_of_serve_are_taken_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("versions", "gpus"):  # the slow ones
        monkeypatch.setattr(checks, name, lambda: iter(()))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--port", str(port), "--api-key-file", str(tmp_path / "none"), "--device", "cpu"]
        assert main.run(["doctor", "--json", *flags]) == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert (found["port"]["status"], found["port"]["detail"]) == ("warn", f"127.0.0.1:{port} is taken")
    assert found["api keys"]["status"] == "fail"
    assert "cannot be read" in found["api keys"]["detail"]


def test_doctor_takes_every_flag_of_serve() -> None:
    serve, doctor = (phalanx.commands[name].params for name in ("serve", "doctor"))
    assert {flag for param in serve for flag in param.opts} <= {flag for param in doctor for flag in param.opts}


@pytest.mark.parametrize("flag", ["--shutdown-timeout-s", "--served-model-name"])
def test_what_serve_alone_reads_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    monkeypatch.setattr(checks, "all_checks", lambda model, server: iter(()))
    assert main.run(["doctor", flag, "3"]) == 0
    assert re.match(rf"warn +settings +{flag} has no effect here\n", capsys.readouterr().out)


def test_every_flag_of_the_server_has_an_effect_or_is_told() -> None:
    looked_at = {"host", "port", "api_key_file"}
    assert set(ServerConfig.__struct_fields__) - looked_at <= set(doctor._READ_BY_SERVE_ALONE)


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"/sys/fs/cgroup/memory.max": 3 * 2**20, "/sys/fs/cgroup/memory.current": 2**20}
    monkeypatch.setattr(checks, "_number", numbers.get)
    assert checks.free_memory() == (2 * 2**20, 3 * 2**20, True)
    (check,) = checks.memory()
    assert check.status == "warn"
    assert "control group" in check.detail


@pytest.mark.parametrize(("content", "status"), [(b"GGUF and more", "ok"), (b"PK\3\4", "fail"), (None, "warn")])
def test_a_models_file(tmp_path: Path, content: bytes | None, status: str) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    (check,) = checks.checkpoint(str(file))
    assert check.status == status


@pytest.mark.parametrize("model", ["~nobody-has-this-name/model", "m" * 300])
def test_a_name_that_can_be_no_file_is_none(model: str) -> None:
    (check,) = checks.checkpoint(model)
    assert (check.status, check.detail) == ("warn", f"there is no file or directory {model}")


def test_a_models_file_that_cannot_be_read_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "m.gguf"
    file.touch()
    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no file's mode stops
    (check,) = checks.checkpoint(str(file))
    assert (check.status, check.detail) == ("fail", f"{file} cannot be read: Permission denied")


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    (check,) = checks.checkpoint(str(tmp_path))
    assert check.status == "fail"
    assert "config.json" in check.detail


def test_where_ranks_would_be_on_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--json", "-tp", "2", "--device", "cpu"]) == 0
    (found,) = (check for check in json.loads(capsys.readouterr().out) if check["name"] == "placement")
    assert found["status"] == "ok"
    assert found["detail"].startswith("2 ranks on this host, cpu")


def test_no_room_is_a_failure_with_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(config: Config) -> str:
        raise PlacementError("no room", "  node  free\n  a     0")

    monkeypatch.setattr(checks, "all_checks", lambda model, server: iter(()))
    monkeypatch.setattr(platform, "pick_device", refuse)
    assert main.run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fail", "placement", "no", "room"]
    assert "  node  free" in lines
    assert main.run(["doctor", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["table"] == "  node  free\n  a     0"


def test_a_wrong_flag_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--launcher", "inline", "-tp", "2"]) == 2
    assert "--launcher: 'inline' is not possible" in capsys.readouterr().err

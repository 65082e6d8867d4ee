"""How processes of a program make themselves known, and are made to."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.errors import FrameError, PeerDiedError
from phalanx.ledger.after_import import after_import
from phalanx.ledger.environment import recorded
from phalanx.ledger.registry import VARIABLE, LaneNotice, Registry, RegistryEntry


def notice(index: int) -> LaneNotice:
    return LaneNotice(pid=os.getpid(), index=index, name="x" * 200, ranks=(0, 1))


def test_many_processes_write_and_nothing_is_mixed_up() -> None:
    with Registry() as registry:
        for writer in range(4):
            if os.fork() == 0:
                entry = RegistryEntry({VARIABLE: registry.place})
                for i in range(200):
                    entry.announce(notice(1000 * writer + i))
                os._exit(0)
        found: list[int] = []
        for _ in range(4):
            os.wait()
            found += [one.index for one in registry.news() if isinstance(one, LaneNotice)]
        assert sorted(found) == sorted(1000 * writer + i for writer in range(4) for i in range(200))
        for writer in range(4):
            assert [i for i in found if i // 1000 == writer] == [1000 * writer + i for i in range(200)]
        assert registry.news() == []


def test_whoever_is_no_roster_is_refused() -> None:
    with Registry() as registry:
        pid, descriptor, _ = registry.place.split(":")
        with pytest.raises(FrameError, match="is another one"):
            RegistryEntry({VARIABLE: f"{pid}:{descriptor}:0123456789abcdef"})
    with open(os.devnull) as null, pytest.raises(FrameError, match="is no registry"):
        RegistryEntry({VARIABLE: f"{pid}:{null.fileno()}:0123456789abcdef"})
    with pytest.raises(PeerDiedError):
        RegistryEntry({VARIABLE: "4194303:5:0123456789abcdef"})


def test_what_is_to_be_done_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    acts: list[int] = []
    after_import("late_module", lambda: acts.append(sys.modules["late_module"].value))
    assert acts == []
    import late_module  # type: ignore[import-not-found]

    assert acts == [1] and late_module.__spec__.origin == str(tmp_path / "late_module.py")
    after_import("late_module", lambda: acts.append(2))
    assert acts == [1, 2]


def test_who_only_looks_for_a_module_and_who_fails_to_import_it_keep_nothing_from_being_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    acts: list[str] = []
    for act in ("one", "another"):
        after_import("probed_module", lambda act=act: acts.append(act))  # type: ignore[misc]
    num_finders = len(sys.meta_path)
    assert importlib.util.find_spec("probed_module") is None
    (tmp_path / "probed_module.py").write_text("raise RuntimeError('not yet')")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("probed_module")
    (tmp_path / "probed_module.py").write_text("value = 1  # at last")
    importlib.invalidate_caches()
    found = importlib.util.find_spec("probed_module")
    assert found is not None and found.loader is not None
    assert found.loader.get_data(str(tmp_path / "probed_module.py")) == b"value = 1  # at last"  # type: ignore[attr-defined]
    assert acts == []
    assert importlib.import_module("probed_module").value == 1
    assert sorted(acts) == ["another", "one"] and len(sys.meta_path) == num_finders - 2
    found.loader.exec_module(importlib.util.module_from_spec(found))
    assert len(acts) == 2, "once"
    monkeypatch.delitem(sys.modules, "probed_module")


@pytest.mark.parametrize("is_there", [False, True])
def test_an_import_does_not_fail_because_of_what_is_done_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_there: bool
) -> None:
    (tmp_path / "fragile_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    if is_there:
        importlib.import_module("fragile_module")

    def act() -> None:
        raise RuntimeError("a fault of ours")

    after_import("fragile_module", act)
    assert importlib.import_module("fragile_module").value == 1
    assert "what was to be done after the import of fragile_module was not" in caplog.text
    assert "RuntimeError: a fault of ours" in caplog.text
    monkeypatch.delitem(sys.modules, "fragile_module")


def test_a_sitecustomize_of_the_users_own_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("mine = 42")
    program = (
        "import sys, sitecustomize; assert sitecustomize.mine == 42;"
        "assert 'torch' not in sys.modules and 'msgspec' not in sys.modules;"
        "print([type(one).__module__ for one in sys.meta_path][0])"
    )
    environment = recorded({**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}, "1:2:3")
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "phalanx.ledger.after_import\n" and found.stderr == ""


def test_a_python_without_phalanx_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "phalanx.py").write_text("raise ImportError('none here')")
    environment = recorded({**os.environ, "PYTHONPATH": str(tmp_path)}, "1:2:3")
    environment["PYTHONPATH"] = f"{environment['PYTHONPATH'].split(':')[0]}:{tmp_path}"
    found = subprocess.run(
        [sys.executable, "-c", "print(1)"], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "1\n" and "is not watched: none here" in found.stderr

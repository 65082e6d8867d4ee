"""What tests of several folders share."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hosts import Network, why_no_hosts
from ray_cluster import RayCluster

_NUM_CPUS = {"alpha": 2, "beta": 2, "gamma": 2}

_RAY_CLUSTER = ("cluster/test_ray_", "faults/test_node_", "faults/test_ledger_nodes")
"""Tests on the nodes of one Ray, which takes long to start."""

_ALONE = (
    *_RAY_CLUSTER,
    *("faults/", "cluster/test_cluster_local", "cluster/test_cluster_ray", "cluster/test_cluster_relay"),
    *("cluster/test_hosts", "cluster/test_served_replicas"),
    *("unit/executor/", "unit/server/test_server_run", "unit/engine/test_engine_client"),
)
"""Tests of whether faults are told in time: they wait more than they compute, and are to have a core when they do."""


def pytest_configure() -> None:
    """Tests of Ctrl-C work also where a shell has this run in the background, and so ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that `-m` leaves out by `alone` are not imported: each worker would take many seconds for it."""
    asked = config.getoption("markexpr").split(" and ")
    if collection_path.is_dir() or not {"alone", "not alone"} & set(asked):
        return None
    return _is_in(_ALONE, collection_path) != ("alone" in asked) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of the Ray cluster come first: none of them can go to another lane when this one is the last to end."""
    for item in items:
        if _is_in(_ALONE, item.path):
            item.add_marker("alone")
    items.sort(key=lambda item: not _is_in(_RAY_CLUSTER, item.path))


def _is_in(beginnings: tuple[str, ...], path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix().startswith(beginnings)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup` a file's tests stay together, and those of the Ray cluster; in the order collected."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class InLanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.removeprefix("tests/")
            return "Ray cluster" if path.startswith(_RAY_CLUSTER) else path.partition("::")[0]

    config.option.loadscopereorder = False
    return InLanes(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test prints may be no UTF-8, which a report on its way to another process has to be."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests compute with tiny matrices: several threads of torch would wait for each other most of the time."""
    torch = sys.modules.get("torch")  # not for tests that have no use for it: it takes seconds to import
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_launcher_is_left() -> Iterator[None]:
    """Of those that tests share (cluster/warm_launchers.py)."""
    yield
    if "warm_launchers" in sys.modules:
        sys.modules["warm_launchers"].LAUNCHERS.end()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three Ray nodes with two of Ray's CPUs each; the tests' folders are seen on all of them."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install phalanx[ray]")
    if reason := why_no_hosts():
        pytest.skip(reason)
    visible = [tmp_path_factory.getbasetemp()]
    with ExitStack() as stack:
        yield RayCluster(Network(stack, tuple(_NUM_CPUS), visible), _NUM_CPUS)

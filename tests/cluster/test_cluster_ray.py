"""Ranks as Ray actors: one node, no namespaces. The test's process is a driver, and a user, of Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from formation_rig import READY_WITHIN_S, Rig, kill
from resize_rig import cancel_once_begun, run_through

ray = pytest.importorskip("ray")

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

from phalanx import LLM  # noqa: E402
from phalanx.cli import main  # noqa: E402
from phalanx.config import Config  # noqa: E402
from phalanx.errors import ConfigError, HungError, PeerDiedError, PlacementError, StartError, WorkerError  # noqa: E402
from phalanx.executor.deadline import Deadline  # noqa: E402
from phalanx.executor.ray.calls import answers_to  # noqa: E402
from phalanx.executor.ray.discovery import running_rays  # noqa: E402
from phalanx.executor.ray.messages import NodeOrder  # noqa: E402
from phalanx.executor.ray.node_agent import NodeAgent  # noqa: E402
from phalanx.executor.ray.placement import RayPlacement  # noqa: E402
from phalanx.executor.ray.survey import survey  # noqa: E402
from phalanx.membership.resize import Size  # noqa: E402
from phalanx.protocol.sampling import SamplingParams  # noqa: E402
from phalanx.testing.checkpoints import write_checkpoint  # noqa: E402
from phalanx.testing.faults import Fault  # noqa: E402
from phalanx.transport.keys import RunKey  # noqa: E402

pytestmark = pytest.mark.slow

PROMPTS = [[72, 101, 108, 108, 111], list(range(60, 130)), [5]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NUM_CPUS = 4
GONE_WITHIN_S = 2.0
CLOSED_WITHOUT_HEAD_WITHIN_S = 45.0
"""Less than the minute after which Ray ends the process. Its own farewell takes seven seconds."""

Tokens = list[tuple[int, ...]]


def processes(*names: str) -> list[psutil.Process]:
    """Of this test and what it started: those that live and whose command begins with one of `names`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and command.startswith(names):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def ranks() -> list[psutil.Process]:
    return processes("ray::RankActor")


def wait_until(condition: Callable[[], bool], within_s: float) -> None:
    expires_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < expires_at, f"not so after {within_s} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=NUM_CPUS,
        num_gpus=2,  # Ray does not look whether there are any
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def cluster(running_ray: None) -> Iterator[None]:
    """A Ray with nothing on it, before and after."""
    yield
    assert ray.is_initialized(), "the user's connection is gone"
    wait_until(lambda: not ranks(), GONE_WITHIN_S)
    wait_until(lambda: ray.available_resources().get("CPU") == NUM_CPUS, 5.0)


def on_ray(checkpoint: Path, **settings: Any) -> LLM:
    sizes = {"max_num_seqs": 8, "kv_cache_memory": 1 << 20, "threads_per_rank": 1, "device": "cpu"}
    settings = {"engine_restarts": 0, **settings}
    return LLM(str(checkpoint), **{"launcher": "ray", "tensor_parallel_size": 2, **sizes, **settings})


def tokens(llm: LLM) -> Tokens:
    return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tokens:
    """What two ranks of the local launcher make."""
    with on_ray(checkpoint, launcher="local") as llm:
        return tokens(llm)


def test_tokens_are_those_of_the_local_launcher(cluster: None, checkpoint: Path, expected: Tokens) -> None:
    phases: dict[int, list[str]] = {0: [], 1: []}
    with on_ray(checkpoint, on_progress=lambda rank, phase, *_: phases[rank].append(phase)) as llm:
        assert tokens(llm) == expected
    for seen in phases.values():
        assert seen[:2] == ["placing", "starting"]
        assert {"joining", "loading", "idle"} <= set(seen)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_ranks_run_as_their_nodes_ray_does(cluster: None, checkpoint: Path) -> None:
    """And not as its workers, behind all else."""
    with on_ray(checkpoint):
        (raylet,) = {rank.ppid() for rank in ranks()}
        assert {rank.nice() for rank in ranks()} == {psutil.Process(raylet).nice()}


def test_the_ledger_on_one_node(
    cluster: None, checkpoint: Path, expected: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    """One process more than without it, which sees all ranks itself."""
    with on_ray(checkpoint, heal=False) as llm:  # or a rank that was stopped would not be waited for
        (watcher,) = [one for one in psutil.Process().children() if "phalanx.executor.watcher_process" in one.cmdline()]
        victim = llm._core.formation._line.executor._launcher._processes.placed[1]  # type: ignore[attr-defined]
        os.kill(victim.pid, signal.SIGSTOP)
        going_on = threading.Timer(1.5, os.kill, (victim.pid, signal.SIGCONT))
        going_on.start()
        assert tokens(llm) == expected
        going_on.join()
        assert f"verdict: rank 1 on {victim.node} is stopped by a signal" in caplog.text
    assert not watcher.is_running()


def test_two_instances_at_once(cluster: None, checkpoint: Path, expected: Tokens) -> None:
    with on_ray(checkpoint) as one, on_ray(checkpoint) as other:
        assert tokens(one) == tokens(other) == expected


def test_too_few_resources_are_an_error_at_once(cluster: None, checkpoint: Path) -> None:
    began_at = time.monotonic()
    with pytest.raises(PlacementError, match=r"8 ranks .* and the cluster has room for 4") as caught:
        on_ray(checkpoint, tensor_parallel_size=8)
    assert time.monotonic() - began_at < 2.0
    assert "missing" in caught.value.table
    assert os.uname().nodename in caught.value.table


def test_what_others_hold_is_missing(cluster: None, checkpoint: Path) -> None:
    held = placement_group([{"CPU": 3}])
    ray.get(held.ready())
    try:
        with pytest.raises(PlacementError, match="the cluster has room for 1"):
            on_ray(checkpoint)
    finally:
        remove_placement_group(held)


def test_the_doctor_shows_the_placement(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--launcher", "ray", "-tp", "2", "-pp", "2", "--device", "cpu"]
    assert main.run(["doctor", "--json", *flags]) == 0
    (found,) = (check for check in json.loads(capsys.readouterr().out) if check["name"] == "placement")
    assert [(rank["stage"], rank["tp_rank"]) for rank in found["facts"]["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {rank["node"] for rank in found["facts"]["ranks"]} == {os.uname().nodename}
    assert [group["ranks"] for group in found["facts"]["groups"]] == [[0, 1], [2, 3], [0, 2], [1, 3]]
    assert {group["backend"] for group in found["facts"]["groups"]} == {"shm"}
    assert main.run(["doctor", *flags]) == 0
    assert "pp0-1@1" in capsys.readouterr().out


def gpu_config(**settings: Any) -> Config:
    return Config.build(model="m", launcher="ray", tensor_parallel_size=2, device="cuda", **settings)


def test_each_rank_has_a_gpu_of_its_own(cluster: None) -> None:
    placed = survey(gpu_config()).ranks
    assert [(rank.local_rank, rank.devices) for rank in placed] == [(0, ("0", "1")), (1, ("0", "1"))]


def test_a_rank_that_shares_a_bundle_has_its_gpu(cluster: None) -> None:
    """And Ray has given no other one for it."""
    config = gpu_config()
    config = msgspec.structs.replace(config, parallel=msgspec.structs.replace(config.parallel, tensor_parallel_size=1))
    with RayPlacement(config, lambda _: None) as first:
        (before,) = first.survey(lambda _: None, Deadline(READY_WITHIN_S))
        with RayPlacement(config, lambda _: None, beside=first.reservation.bundles) as second:
            (after,) = second.survey(lambda _: None, Deadline(READY_WITHIN_S))
            assert ray.available_resources()["GPU"] == 1
        assert len(bundles()) == 1
    assert after.devices == before.devices and after.pid != before.pid


def test_two_ranks_that_ray_puts_on_one_gpu_are_an_error(cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"Ray has given GPU 0 of .* to more than one rank"):
        survey(gpu_config(ray_per_worker_gpus=0.4))


def test_the_ray_of_this_test_can_be_found(cluster: None) -> None:
    assert ray.get_runtime_context().gcs_address in running_rays()


def test_another_ray_than_the_one_at_hand_is_an_error(cluster: None, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"ray_address: .* this process is connected to the Ray at .* already"):
        on_ray(checkpoint, ray_address="10.9.8.7:6379")


@pytest.fixture
def group(cluster: None) -> Iterator[Any]:
    made = placement_group([{"CPU": 1}] * 3, name="bundles of mine")
    ray.get(made.ready())
    yield made
    remove_placement_group(made)


@pytest.mark.parametrize("how", ["object", "id", "name"])
def test_a_placement_group_that_exists(group: Any, checkpoint: Path, how: str) -> None:
    given = {"object": group, "id": group.id.hex(), "name": "bundles of mine"}[how]
    config = Config.build(
        model="m",
        launcher="ray",
        tensor_parallel_size=2,
        device="cpu",
        placement_group=given,
        ray_bundle_indices=[2, 0],
    )
    assert [rank.bundle for rank in survey(config).ranks] == [2, 0]


def test_tokens_within_a_placement_group_that_exists(group: Any, checkpoint: Path, expected: Tokens) -> None:
    with on_ray(checkpoint, placement_group=group) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"placement_group": "nobody's"}, ConfigError, r"there is none of this name or id; .* bundles of mine \("),
        ({"placement_group": "bundles of mine", "ray_bundle_indices": (0, 3)}, PlacementError, "rank 1 .* bundle 3"),
        ({"ray_bundle_indices": (0, 1)}, ConfigError, "ray_bundle_indices: .* only with a placement group that exists"),
    ],
)
def test_placement_groups_that_do_not_fit(
    group: Any, checkpoint: Path, settings: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        on_ray(checkpoint, **settings)


def test_the_current_placement_group(cluster: None, checkpoint: Path, expected: Tokens) -> None:
    """An actor that drives an engine of its own is in a bundle itself; ranks go into the others."""

    class Driver:
        def answer(self, checkpoint: str, settings: dict[str, Any], prompts: list[list[int]], limit: int) -> Any:
            from phalanx import LLM
            from phalanx.protocol.sampling import SamplingParams

            with LLM(checkpoint, **settings) as llm:
                sampling = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True)
                bundles = [rank.bundle for rank in llm._core.formation._line.executor._launcher._processes.placed]  # type: ignore[attr-defined]
                return bundles, [completion.token_ids for completion in llm.generate(prompts, sampling)]

    group = placement_group([{"CPU": 1}] * 3)
    settings = {"launcher": "ray", "tensor_parallel_size": 2, "device": "cpu", "kv_cache_memory": 1 << 20}
    strategy = PlacementGroupSchedulingStrategy(group, 1, placement_group_capture_child_tasks=True)
    driver: Any = ray.remote(Driver).options(num_cpus=1, scheduling_strategy=strategy).remote()
    try:
        answer = driver.answer.remote(str(checkpoint), {**settings, "max_num_seqs": 8}, PROMPTS, GREEDY.max_tokens)
        assert ray.get(answer, timeout=120) == ([0, 2], expected)
    finally:
        ray.kill(driver)
        remove_placement_group(group)


def test_a_node_that_cannot_be_linked_says_why(cluster: None) -> None:
    agent: Any = ray.remote(NodeAgent).options(num_cpus=0).remote()
    rank = subprocess.Popen(["sleep", "60"])
    order = NodeOrder(
        epoch=1,
        name="beta",
        ranks=(1,),
        pids=(rank.pid,),
        brain_address="127.0.0.1",
        brain_port=1,  # nobody listens there
        own_address="127.0.0.1",
        key=RunKey.new(),
        deadline_s=5.0,
        groups=(),
        report=None,
        stay_s=1.0,
    )
    call = agent.prepare.remote(msgspec.msgpack.encode(order))
    try:
        with pytest.raises(
            StartError, match=r"^agent of beta did not start: the link to 127\.0\.0\.1 port 1 .*refused"
        ):
            answers_to({call: "agent of beta"}, "linking", 20.0)
        assert rank.wait(GONE_WITHIN_S) == -signal.SIGKILL, "it is of no use, and is not left"
    finally:
        rank.kill()
        rank.wait()
        ray.kill(agent)


def test_a_killed_rank_is_named_with_its_log(cluster: None, checkpoint: Path) -> None:
    with on_ray(checkpoint, heal=False) as llm:
        victim = llm._core.formation._line.executor._launcher._processes.placed[1]  # type: ignore[attr-defined]
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(PeerDiedError, match=rf"rank 1 \(pid {victim.pid}\) died: killed by SIGKILL") as caught:
            llm.generate(PROMPTS, GREEDY)
        assert time.monotonic() - killed_at < 1.0
        assert f"its log is {victim.node}:{victim.log}" in str(caught.value)


def test_a_rank_that_cannot_start_ends_the_start_with_its_error(
    cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    (tmp_path / "transformers.py").write_text("raise RuntimeError('no transformers today')")
    with pytest.raises(WorkerError, match=r"rank \d on .*: RuntimeError: no transformers today"):
        on_ray(checkpoint, ray_runtime_env=environment)


def test_faults_are_healed(cluster: None, checkpoint: Path, tmp_path: Path) -> None:
    """By the line that stands ready; on the memory of the ranks before, with their actors and without one of them; and
    from the checkpoint."""
    rig = Rig(checkpoint, tmp_path / "report", launcher="ray", tensor_parallel_size=2, standby=1)
    try:
        actors = ranks()
        rig.await_standby()
        assert rig.run_with(Fault(kind="stop", rank=0)) == rig.expected
        assert rig.stats().healed == {"standby": 1}
        rig.formation.rest_standby()
        assert rig.run_with(Fault(kind="error", rank=1)) == rig.expected
        assert rig.stats().healed == {"standby": 1, "new line": 1}
        assert ranks() == actors, "they have stayed, and are as many"
        assert rig.run(kill(actors[1].pid, signal.SIGKILL)) == rig.expected
        assert rig.stats().healed == {"standby": 1, "new line": 2}
        assert actors[0] in ranks() and actors[1] not in ranks()
        rig.formation._recovery._memory.drop()  # type: ignore[union-attr]
        assert rig.run_with(Fault(kind="error", rank=1)) == rig.expected
        assert rig.stats().healed == {"standby": 1, "new line": 2, "checkpoint": 1} and not rig.stats().failed
        assert actors[0] not in ranks(), "whatever was wrong with it is over"
        assert rig.errors == [HungError, WorkerError, PeerDiedError, WorkerError]
        resize_and_heal(rig)
    finally:
        rig.close()


def resize_and_heal(rig: Rig) -> None:
    """From two ranks to one in a bundle that is there; undone first, while its actor comes, and healed after it."""
    actors, before = ranks(), bundles()
    assert run_through(rig, Size(1, 1), cancel_once_begun).ending == "cancelled"
    wait_until(lambda: ranks() == actors, GONE_WITHIN_S)
    assert bundles() == before and len(before) == 2
    assert run_through(rig, Size(1, 1)).ending == "done"
    wait_until(lambda: len(bundles()) == 1, GONE_WITHIN_S)
    wait_until(lambda: len(ranks()) == 1, GONE_WITHIN_S)
    assert bundles() < before and ranks()[0] not in actors
    rig.errors.clear()
    assert rig.run(kill(rig.pids()[0], signal.SIGKILL)) == rig.expected
    assert rig.errors == [PeerDiedError]


def bundles() -> set[str]:
    """Ids of the placement groups that there are."""
    return {key for key, group in placement_group_table().items() if group["state"] == "CREATED"}


@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_a_ray_of_our_own_leaves_nothing(checkpoint: Path, tmp_path: Path, victim: str) -> None:
    """No Ray runs where this engine is: it starts one, which ends with it."""
    code = (
        "import sys, time; from phalanx import LLM\n"
        "llm = LLM(sys.argv[1], launcher='ray', ray_address='local', tensor_parallel_size=2, kv_cache_memory=1 << 20, "
        "max_num_seqs=8, device='cpu')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"ready\n"
        family = psutil.Process(engine.pid).children(recursive=True)
        raylet = next(process for process in family if process.name() == "raylet")
        (raylet if victim == "raylet" else engine).kill()
        if victim == "raylet":
            wait_until(lambda: not [process for process in family if is_rank(process)], GONE_WITHIN_S)
            engine.kill()
        wait_until(lambda: not [process for process in family if lives(process)], GONE_WITHIN_S)


def test_an_engine_without_rays_head_ends_with_an_error_and_closes(checkpoint: Path) -> None:
    """Ray would end the process after a minute."""
    code = (
        "import sys, time; from phalanx import LLM; from phalanx.errors import DeadlineError\n"
        "from phalanx.executor.ray import head\n"
        "head.SHARE = 0.02\n"
        "llm = LLM(sys.argv[1], launcher='ray', ray_address='local', tensor_parallel_size=2, kv_cache_memory=1 << 20, "
        "max_num_seqs=8, device='cpu')\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True: llm.check_health(); time.sleep(0.1)\n"
        "except DeadlineError as error: print(error, flush=True)\n"
        "llm.close()\n"
        "print('closed', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        family = psutil.Process(engine.pid).children(recursive=True)
        next(process for process in family if process.name() == "gcs_server").kill()
        killed_at = time.monotonic()
        assert engine.stdout.readline().startswith("waited 1.2 s for a sign of life from Ray's head at ")
        assert engine.stdout.readline() == "closed\n"
        wait_until(lambda: not [process for process in family if lives(process)], GONE_WITHIN_S)
        assert time.monotonic() - killed_at < CLOSED_WITHOUT_HEAD_WITHIN_S
        assert engine.wait(CLOSED_WITHOUT_HEAD_WITHIN_S) == 0


def test_a_ray_of_our_own_is_for_nobody_else_and_leaves_the_environment_as_it_was() -> None:
    """Ray notes there that it asks for tokens: sent to the next one, which may have none, they break it."""
    code = (
        "import os, ray; from phalanx.config import ClusterConfig\n"
        "from phalanx.executor.ray.connection import connect\n"
        "from phalanx.executor.ray.discovery import running_rays\n"
        "with connect(ClusterConfig(ray_address='local'), num_ranks=1):\n"
        "    assert ray.get_runtime_context().gcs_address not in running_rays()\n"
        "    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)\n"
        "assert 'RAY_AUTH_MODE' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def is_rank(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
        return lives(process) and (command.startswith("ray::RankActor") or "phalanx.executor.fork_server" in command)
    except psutil.NoSuchProcess:
        return False

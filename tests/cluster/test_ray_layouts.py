"""Real models over several real Ray nodes: whatever the layout, the tokens are those of one process."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_server import ClusterServer
from one_process import Tokens, tokens_of_one_process
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = [[72, 101, 108, 108, 111], list(range(60, 130)), [5]]
NUM_TOKENS = 24
CLEAN_WITHIN_S = 5.0
LEAST_TRAFFIC_BYTES = NUM_TOKENS * 100

A_NODE_EACH = ("--ray-per-worker-gpus", "2")
"""A node has two of Ray's CPUs."""
STRICT = ("--collective-guard", "strict")
TENSOR_PARALLEL = ("--tensor-parallel-size", "2", "--allow-split-tensor-parallel", *A_NODE_EACH, *STRICT)
PIPELINE = ("--pipeline-parallel-size", "3", *A_NODE_EACH)
BOTH = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Tokens]:
    return tokens_of_one_process(checkpoint, PROMPTS, NUM_TOKENS)


def expect_tokens(server: ClusterServer, expected: list[Tokens]) -> None:
    """All prompts at once, so that steps hold several requests."""
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = clients.map(lambda prompt: server.complete(prompt, NUM_TOKENS), PROMPTS)
        assert list(answers) == [tokens.names for tokens in expected]


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ((*TENSOR_PARALLEL, "--network-interface", "eth1"), "eth1"),
        ((*PIPELINE, "--node-address", "alpha"), "eth0"),
        ((*BOTH, "--node-address", "fd00::1"), "eth0"),
    ],
    ids=["tp2-interface", "pp3-host-name", "tp2-pp2-ipv6"],
)
def test_tokens_over_several_nodes(
    ray_cluster: RayCluster,
    checkpoint: Path,
    expected: list[Tokens],
    flags: tuple[str, ...],
    device: str,
    tmp_path: Path,
) -> None:
    """`device` is the one that the nodes are to meet over."""
    with ClusterServer(ray_cluster, checkpoint, tmp_path / "log", *flags) as server:
        server.await_ready()
        before = ray_cluster.head.bytes_sent(device)
        expect_tokens(server, expected)
        assert ray_cluster.head.bytes_sent(device) - before > LEAST_TRAFFIC_BYTES
        assert server.stop() == 0, server.log
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


def test_two_instances_that_share_a_node(
    ray_cluster: RayCluster, checkpoint: Path, expected: list[Tokens], tmp_path: Path
) -> None:
    """The first takes most of alpha and beta, the second what is left of alpha, and gamma."""
    first = ("--pipeline-parallel-size", "2", "--ray-per-worker-gpus", "1.5")
    second = ("--pipeline-parallel-size", "2", "--ray-per-worker-gpus", "0.5")
    with ClusterServer(ray_cluster, checkpoint, tmp_path / "first", *first) as one:
        one.await_place()
        with ClusterServer(ray_cluster, checkpoint, tmp_path / "second", *second, port=8001) as other:
            for server in (one, other):
                server.await_ready()
            with ThreadPoolExecutor(2) as clients:
                list(clients.map(lambda server: expect_tokens(server, expected), (one, other)))
            assert other.stop() == 0, other.log
        expect_tokens(one, expected)
        assert one.stop() == 0, one.log
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


_IN_A_GROUP_OF_THE_USER = """
import json, sys
import ray
from ray.util.placement_group import placement_group, placement_group_table
from phalanx import LLM, SamplingParams

checkpoint, prompts, num_tokens, nodes = json.loads(sys.argv[1])
ray.init("auto", logging_level="error")
group = placement_group([{"CPU": 1, f"node:{address}": 0.01} for address in nodes])
ray.get(group.ready())
sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
settings = {"launcher": "ray", "pipeline_parallel_size": 2, "device": "cpu", "kv_cache_memory": 1 << 20}
with LLM(checkpoint, placement_group=group, max_num_seqs=8, **settings) as llm:
    completions = llm.generate(prompts, sampling)
assert placement_group_table(group)["state"] == "CREATED", "the user's group is gone"
assert ray.is_initialized(), "the user's connection is gone"
print(json.dumps([completion.token_ids for completion in completions]))
"""


def test_a_placement_group_of_the_user(ray_cluster: RayCluster, checkpoint: Path, expected: list[Tokens]) -> None:
    """On the two nodes that the driver is not on."""
    nodes = [ray_cluster.hosts[name].address for name in ("beta", "gamma")]
    order = json.dumps([str(checkpoint), PROMPTS, NUM_TOKENS, nodes])
    printed = ray_cluster.python(ray_cluster.head, "-c", _IN_A_GROUP_OF_THE_USER, order, timeout_s=120)
    (made,) = [line for line in printed.splitlines() if line.startswith("[[")]  # Ray prints there too
    assert json.loads(made) == [list(tokens.ids) for tokens in expected], printed
    ray_cluster.expect_clean(CLEAN_WITHIN_S)

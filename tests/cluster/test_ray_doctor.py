"""`phalanx doctor --launcher ray` on a cluster of several nodes: who would be where, or what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from ray_cluster import RayCluster

pytestmark = pytest.mark.slow

CLEAN_WITHIN_S = 5.0
ANSWER_WITHIN_S = 60.0


def examine(cluster: RayCluster, *flags: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the check of the placement."""
    command = [sys.executable, "-m", "phalanx", "doctor", "--launcher", "ray", "--ray-address", cluster.address]
    doctor = cluster.head.popen(
        *command,
        "--device",
        "cpu",
        "--json",
        *flags,
        env={**cluster.environment, **environment},
        stdout=subprocess.PIPE,
    )
    printed, _ = doctor.communicate(timeout=ANSWER_WITHIN_S)
    checks = {check["name"]: check for check in json.loads(printed)}
    return doctor.returncode, checks["placement"]


def test_ranks_nodes_addresses_and_groups(ray_cluster: RayCluster) -> None:
    code, check = examine(ray_cluster, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3")
    assert (code, check["status"]) == (0, "ok")
    ranks, groups = check["facts"]["ranks"], check["facts"]["groups"]
    nodes = [name for name in ("alpha", "beta", "gamma") for _ in range(2)]
    assert [(one["rank"], one["node"], one["address"]) for one in ranks] == [
        (rank, node, ray_cluster.hosts[node].address) for rank, node in enumerate(nodes)
    ]
    assert {group["name"]: (group["backend"], group["nodes"]) for group in groups} == {
        "tp@0": ("shm", ["alpha"]),
        "tp@1": ("shm", ["beta"]),
        "tp@2": ("shm", ["gamma"]),
        **{f"pp0-1@{tp_rank}": ("gloo", ["alpha", "beta"]) for tp_rank in range(2)},
        **{f"pp1-2@{tp_rank}": ("gloo", ["beta", "gamma"]) for tp_rank in range(2)},
    }
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


@pytest.mark.parametrize("flags", [(), ("--enable-expert-parallel",)], ids=["apart", "lockstep"])
def test_replicas(ray_cluster: RayCluster, flags: tuple[str, ...]) -> None:
    """Also those that run apart are numbered and shown together, each where its engine would place it."""
    sizes = ("--tensor-parallel-size", "2", "--data-parallel-size", "2", "--data-parallel-size-local", "1")
    code, check = examine(ray_cluster, *sizes, *flags)
    assert (code, check["status"]) == (0, "ok")
    assert check["detail"] == "4 ranks on 2 nodes"
    assert [(one["rank"], one["replica"], one["tp_rank"], one["node"]) for one in check["facts"]["ranks"]] == [
        (0, 0, 0, "alpha"),
        (1, 0, 1, "alpha"),
        (2, 1, 0, "beta"),
        (3, 1, 1, "beta"),
    ]
    own = {"tp@0.0": ("shm", ["alpha"]), "tp@1.0": ("shm", ["beta"])}
    shared = {f"dp@0.{tp_rank}": ("gloo", ["alpha", "beta"]) for tp_rank in range(2)} if flags else {}
    groups = {group["name"]: (group["backend"], group["nodes"]) for group in check["facts"]["groups"]}
    assert groups == {**own, **shared}
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


def test_too_many_replicas_for_a_node(ray_cluster: RayCluster) -> None:
    code, check = examine(ray_cluster, "-tp", "2", "-dp", "2", "-dpl", "2", "--enable-expert-parallel")
    assert (code, check["status"]) == (1, "fail")
    assert "2 of 2 replicas are to be on the driver's node (data_parallel_size_local): 4 ranks" in check["detail"]


def test_what_is_missing(ray_cluster: RayCluster) -> None:
    code, check = examine(ray_cluster, "--tensor-parallel-size", "3", "--pipeline-parallel-size", "3")
    assert (code, check["status"]) == (1, "fail")
    rows = {line.split()[0]: line.split() for line in check["table"].splitlines()}
    assert rows["missing"][1:] == ["3", "3"]
    for name in ("beta", "gamma"):
        assert rows[name][1:] == [ray_cluster.hosts[name].address, "2", "2", "2", "0"]


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [({"HOME": "/tmp/nobody"}, "it asks for its token"), ({"RAY_AUTH_TOKEN": "0" * 64}, "our token is not the one")],
    ids=["none", "another"],
)
def test_a_cluster_that_asks_for_a_token(ray_cluster: RayCluster, environment: dict[str, str], complaint: str) -> None:
    code, check = examine(ray_cluster, **environment)
    assert (code, check["status"]) == (1, "fail")
    assert f"ray_address: '{ray_cluster.address}' is not possible: {complaint}" in check["detail"]

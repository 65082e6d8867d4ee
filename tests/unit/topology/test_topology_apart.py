"""Room for replicas that run apart: each in what those before it leave, and what is missing for the next one."""

from __future__ import annotations

from phalanx.topology.apart import Fit, Wanted, fit_apart
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Demand, Node, avoiding

CPU = Demand.on("cpu", 1.0)
TWO = Wanted(Grid(2, 1))
NODES = [
    Node("a", "alpha", "10.0.0.1", 2, 2, is_driver=True),
    Node("b", "beta", "10.0.0.2", 4, 3),
    Node("c", "gamma", "10.0.0.3", 2, 0),
]


def test_each_takes_what_those_before_it_leave() -> None:
    assert fit_apart([TWO, TWO], CPU, NODES, may_split=False) == Fit(2, None)
    fit = fit_apart([TWO, TWO, TWO], CPU, NODES, may_split=False)
    assert fit.num_replicas == 2 and fit.complaint is not None
    assert "2 ranks (tensor_parallel_size 2, pipeline_parallel_size 1) of 1 CPU each are asked for" in fit.complaint
    assert fit.complaint.endswith("CPU free: alpha 0 of 2, beta 1 of 4, gamma 0 of 2")


def test_a_group_that_may_span_nodes_takes_what_is_left() -> None:
    nodes = [NODES[0]._replace(free=1), NODES[1]._replace(free=1)]
    assert fit_apart([TWO], CPU, nodes, may_split=False).num_replicas == 0
    assert fit_apart([TWO], CPU, nodes, may_split=True) == Fit(1, None)


def test_whether_it_is_to_be_local_counts() -> None:
    here, elsewhere = Wanted(Grid(2, 1), 1), Wanted(Grid(2, 1), 0)
    assert fit_apart([here, elsewhere], CPU, NODES, may_split=False) == Fit(2, None)
    assert fit_apart([here, here], CPU, NODES, may_split=False).num_replicas == 1


def test_a_node_is_avoided_by_its_name_its_address_and_its_id() -> None:
    for name in ("beta", "10.0.0.2", "b"):
        fit = fit_apart([TWO, TWO], CPU, avoiding(NODES, [name]), may_split=False)
        assert fit.num_replicas == 1 and "beta 3 of 4 (avoided)" in str(fit.complaint)


def test_there_may_be_no_node() -> None:
    assert str(fit_apart([TWO], CPU, [], may_split=False).complaint).endswith("CPU free: no node")

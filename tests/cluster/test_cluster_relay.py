"""The queue over a network of its own: what is on the wire, what stalls it survives, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import Direction, HostProcess, Network, why_no_hosts
from transport_messages import Tick

from phalanx.errors import DeadlineError
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

RELAY_NODE = Path(__file__).with_name("relay_node.py")
RANKS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack, ("alpha", "beta"), [])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


class Run:
    """A brain on alpha, in this process, and a relay with four ranks on beta."""

    def __init__(
        self,
        stack: ExitStack,
        network: Network,
        *,
        bound: str,
        dialled: str | None = None,
        node_timeout_s: float = 10.0,
    ) -> None:
        key = RunKey.new()
        types = {"command_type": Tick, "reply_type": Tick}
        with network.hosts["alpha"].network():
            self.queue: ClusterQueue[Tick, Tick] = ClusterQueue(
                [], {"beta": RANKS}, address=bound, key=key, node_timeout_s=node_timeout_s, **types
            )
        stack.callback(self.queue.close)
        where = (dialled or self.queue.address, str(self.queue.port), key.secret.hex())
        command = [sys.executable, str(RELAY_NODE), "beta", *where, *map(str, RANKS)]
        self.node: HostProcess = network.hosts["beta"].start(*command, stdout=subprocess.PIPE)
        stack.callback(self.node.end)

    def tick(self, number: int = 0, buffers: Sequence[bytes] = ()) -> None:
        """One round trip."""
        self.queue.put(Tick(number), buffers, deadline_s=20)
        for _ in RANKS:
            found = self.queue.get(timeout_s=20)
            assert found is not None
            assert found[1] == Tick(number)
            assert [bytes(buffer) for buffer in found[2]] == list(buffers)

    def last_words(self, timeout_s: float) -> str:
        """What the node's process said in the end, when it and its ranks have ended."""
        assert self.node.wait(timeout_s) == 0
        assert self.node.stdout is not None
        return self.node.stdout.read().decode()


@pytest.fixture
def run(stack: ExitStack, network: Network) -> Run:
    made = Run(stack, network, bound=network.hosts["alpha"].address)
    made.queue.accept(deadline_s=20)
    made.tick()
    return made


@pytest.mark.parametrize("version", [0, 1], ids=["IPv4", "IPv6"])
def test_only_the_chosen_address_is_bound(stack: ExitStack, network: Network, version: int) -> None:
    alpha = network.hosts["alpha"]
    run = Run(stack, network, bound=alpha.addresses[version])
    bound = [line.split()[3] for line in alpha.run("ss", "-Hltn").splitlines()]
    where = f"[{alpha.addresses[version]}]" if version else alpha.address
    assert bound == [f"{where}:{run.queue.port}"]
    run.queue.accept(deadline_s=20)
    run.tick(1, [bytes(1_000_000)])


def test_another_address_of_the_host_is_refused(stack: ExitStack, network: Network) -> None:
    run = Run(stack, network, bound=network.hosts["alpha"].address, dialled="10.0.1.1")
    assert "StartError: the link to 10.0.1.1" in run.last_words(20)


def test_nodes_may_dial_a_host_name(stack: ExitStack, network: Network) -> None:
    run = Run(stack, network, bound=network.hosts["alpha"].address, dialled="alpha")
    run.queue.accept(deadline_s=20)
    run.tick()


def test_there_is_one_copy_on_the_wire_and_it_cannot_be_read(run: Run, network: Network) -> None:
    alpha = network.hosts["alpha"]
    before = alpha.bytes_sent("eth0")
    for _ in range(5):
        run.queue.put(Tick(), [bytes(1_000_000)], deadline_s=20)
        for _ in RANKS:
            assert run.queue.get(timeout_s=20) is not None
    # The answers carry the same and come in the other direction, four to one; alpha sends their acknowledgements.
    assert 5_000_000 < alpha.bytes_sent("eth0") - before < 5_700_000


def test_a_stall_of_three_seconds_is_survived(run: Run, network: Network) -> None:
    with network.cables["beta"].cut():
        timer = threading.Thread(target=run.tick, args=(7, [bytes(300_000)]))
        timer.start()
        time.sleep(3.0)
        assert timer.is_alive()
    ended_at = time.monotonic()
    timer.join(10)
    assert not timer.is_alive()
    assert time.monotonic() - ended_at < 3.0
    run.tick(8)


def test_delay_and_loss_are_survived(run: Run, network: Network) -> None:
    bad = Direction(delay_s=0.1, loss=0.05)
    with network.cables["beta"].impaired(sent=bad, received=bad):
        for number in range(10):
            run.tick(number, [bytes([number]) * 30_000])  # 20 packets there, 80 back: some of them are lost
    run.tick(11)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in the middle of a conversation"])
@pytest.mark.parametrize("how", ["link down", "no way from it", "no way to it"])
def test_a_longer_one_ends_both_sides(stack: ExitStack, network: Network, how: str, busy: bool) -> None:
    cable = network.cables["beta"]
    faults = {
        "link down": cable.cut,
        "no way from it": lambda: cable.impaired(sent=Direction(loss=1.0)),
        "no way to it": lambda: cable.impaired(received=Direction(loss=1.0)),
    }
    run = Run(stack, network, bound=network.hosts["alpha"].address, node_timeout_s=2.0)
    run.queue.accept(deadline_s=20)
    run.tick()
    with faults[how]():
        started = time.monotonic()
        named = r"a sign of life from node beta \(rank 1, rank 2, rank 3, rank 4\)"
        with pytest.raises(DeadlineError, match=named):
            while busy:
                run.tick(0, [bytes(100_000)])
            run.queue.get(timeout_s=20)
        assert 1.5 < time.monotonic() - started < 4.0
        if how != "no way from it":  # the brain, which goes on for itself, can still be heard there
            assert "DeadlineError" in run.last_words(5)
    run.queue.close()
    assert run.node.wait(10) == 0  # with its ranks

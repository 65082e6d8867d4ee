"""What is asked of a process that looks at a Ray cluster: it starts when it is asked, and again when it has ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_engine_client import in_loop

from phalanx.config import ClusterConfig
from phalanx.engine import census as module
from phalanx.engine.census import Census
from phalanx.errors import DeadlineError, StartError
from phalanx.topology.placement import Node
from phalanx.transport.liveness import is_running

NODE = Node("a", "alpha", "10.0.0.1", 4.0, 3.0, is_driver=True)

FAKE = """
import os, sys, time
import msgspec
from phalanx.executor.census import CensusAnswer, CensusQuestion
from phalanx.topology.placement import Node
from phalanx.transport.liveness import Party
from phalanx.transport.stream import Stream

behaviour, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
answers = {
    "answers": CensusAnswer(nodes=(Node("a", "alpha", "10.0.0.1", 4.0, 3.0, is_driver=True),)),
    "has none": CensusAnswer(has_cluster=False),
    "fails": CensusAnswer(error="no Ray answers there"),
}
with Stream(descriptor, Party.of("who asks", parent)) as stream:
    while stream.wait(30.0):
        for frame in stream.poll():
            question = msgspec.msgpack.decode(frame, type=CensusQuestion)
            assert (question.resource, question.cluster.ray_address) == ("CPU", "10.0.0.1:6379")
            if behaviour == "dies":
                sys.exit(1)
            if behaviour != "is silent":
                stream.send(msgspec.msgpack.encode(answers.get(behaviour, answers["answers"])), deadline_s=5.0)
        if behaviour == "idles":
            break
"""


def census(tmp_path: Path, behaviour: str) -> Census:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    cluster = ClusterConfig(ray_address="10.0.0.1:6379")
    return Census(cluster, command=(sys.executable, str(fake), behaviour))


@in_loop
async def test_the_nodes(tmp_path: Path) -> None:
    found = census(tmp_path, "answers")
    assert await found.nodes("CPU") == (NODE,)
    pid = found.pid
    assert pid is not None
    assert await found.nodes("CPU") == (NODE,)
    assert found.pid == pid, "the same process"
    await found.close()
    assert not is_running(pid)
    assert found.pid is None


@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        ("fails", StartError, "no Ray answers there"),
        ("dies", StartError, "its end of the stream is closed"),
        ("is silent", DeadlineError, "waited 0.5 s for what is free"),
    ],
)
@in_loop
async def test_why_there_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, error: type[Exception], words: str
) -> None:
    found = census(tmp_path, behaviour)
    if behaviour == "is silent":
        monkeypatch.setattr(module, "ANSWER_S", 0.5)
    with pytest.raises(error, match=words):
        await found.nodes("CPU")
    await found.close()


@in_loop
async def test_without_a_cluster_there_are_no_nodes_to_tell_of(tmp_path: Path) -> None:
    found = census(tmp_path, "has none")
    assert await found.nodes("CPU") is None
    await found.close()


@in_loop
async def test_one_that_has_ended_as_nobody_asked_is_started_again(tmp_path: Path) -> None:
    found = census(tmp_path, "idles")
    for _ in range(2):
        assert await found.nodes("CPU") == (NODE,)
    await found.close()

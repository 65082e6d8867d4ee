"""What clients see of a server over HTTP, and what they must see of one that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.holdings import listening_ports
from phalanx.testing.serving import PORTS, ServedChecker, _body, _family, _flag, _free_port, follow_url
from phalanx.testing.streams import Asked, Seen

ASKED = Asked((1, 2), SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))


class Stream(httpx.AsyncByteStream):
    """Chunks of an answer; None breaks the connection."""

    def __init__(self, *chunks: str | None) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            if chunk is None:
                raise httpx.ReadError("the connection was reset")
            yield chunk.encode()


def event(text: str, reason: str | None = None, logprobs: list[float] | None = None) -> str:
    its_logprobs = None if logprobs is None else {"token_logprobs": logprobs}
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": its_logprobs}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def seen(*chunks: str | None) -> tuple[Seen, list[int]]:
    counts: list[int] = []

    async def read() -> Seen:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Stream(*chunks)))
        async with httpx.AsyncClient(transport=transport) as client:
            return await follow_url(client, "http://server", ASKED, counts.append)

    return asyncio.run(read()), counts


def test_a_stream_is_read_to_its_end() -> None:
    found, counts = seen(event("ab", logprobs=[-1.0]), event("c", "length", [-2.0]), "data: [DONE]\n\n")
    assert (found.text, found.reasons, found.logprobs, found.error) == ("abc", ["length"], [-1.0, -2.0], None)
    assert counts == [2, 1]


@pytest.mark.parametrize("end", [None, 'data: {"error": {"message": "gone"}}\n\n'])
def test_a_stream_that_breaks_is_an_error(end: str | None) -> None:
    found, _ = seen(event("ab"), end)
    assert found.text == "ab" and found.reasons == [] and found.error is not None


def checker() -> ServedChecker:
    made = ServedChecker(Path("model"), {}, 2, 1, None)
    made._expected = [Seen(text="abcdef", reasons=["length"]), Seen(text="uvwxyz", reasons=["length"])]
    return made


def test_clients_of_a_killed_server_have_a_part_and_an_error_or_the_whole() -> None:
    right = [Seen(text="abc", error="reset"), Seen(text="uvwxyz", reasons=["length"])]
    assert checker()._judged(right, 0.1) == ([], [])
    wrong, lost = checker()._judged([Seen(text="abd", error="reset"), Seen(text="uvw")], 0.1)
    assert wrong == ["stream 0 is not the beginning of what it was"]
    assert lost == ["stream 1 has ended without an error"]
    assert checker()._judged([], 12.0) == ([], ["streams have not ended 12 s after their server"] * 2)
    assert checker()._judged(right, 3.0)[1] == ["the last stream has ended 3.0 s after its server"]


def test_what_is_asked_is_what_differs_from_the_default() -> None:
    assert _body(ASKED) == {"prompt": [1, 2], "stream": True, "temperature": 0.0, "max_tokens": 3, "ignore_eos": True}
    assert _flag("max_num_seqs", 8) == ["--max-num-seqs", "8"]
    assert _flag("ledger", True) == ["--ledger"] and _flag("ledger", False) == ["--no-ledger"]


def test_a_family_has_all_that_was_started_and_a_port_is_free_when_nobody_listens() -> None:
    with subprocess.Popen(
        ["/bin/sh", "-c", "sleep 100 & echo; wait"], stdout=subprocess.PIPE, process_group=0
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        family = _family(shell.pid)
        assert len(family) == 2 and family[0].pid == shell.pid
        os.killpg(shell.pid, 9)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port in listening_ports()
    assert port not in listening_ports()
    assert _free_port(random.Random(1)) in PORTS

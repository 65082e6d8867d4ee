"""The status page: every rank and group, the culprit marked, nothing from outside taken for HTML."""

import base64
import re
from html.parser import HTMLParser

import msgspec
from ledger_instances import hung, reported
from server_rig import Rig, in_loop

from phalanx.protocol.client import EngineStats, ReplicaStats
from phalanx.server.status import ServerStatus
from phalanx.server.status_page import page

EVIL = "<script>alert('&\"')</script>"
STATS = EngineStats((ReplicaStats(3, 4, 25, 100, 7, 1, 50, 20, 60),))


def rig_of(reported_evil: bool = False) -> Rig:
    rig = Rig()
    said = EVIL if reported_evil else ""
    rig.engine.trouble = reported(1, "tp@0", said)
    rig.engine.instances = (hung(rig.engine.trouble, EVIL if reported_evil else "all_reduce float32 [1, 72]"),)
    rig.engine.stats = STATS
    return rig


class Elements(HTMLParser):
    """The names of all elements, checked to be closed in order; and the text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@in_loop
async def test_the_page() -> None:
    answer = await rig_of().client.get("/status")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    document = answer.text
    elements = Elements(document)
    assert '<meta http-equiv="refresh" content="2">' in document
    assert "script" not in elements.seen and not re.search(r"(src|href)=|url\(|@import", document)
    assert [document.count(f'class="{mark}"') for mark in ("culprit", "waits", "awaited")] == [1, 1, 0]
    for told in (
        "stuck",
        "rank 1 on here does it",
        "all_reduce float32 [1, 72]",
        "#2",
        "tp@0",
        "in it for",
        "25 of 100",
    ):
        assert told in elements.text
    assert "tensor parallel 3" in elements.text and "not begun" in elements.text


@in_loop
async def test_nothing_from_outside_is_taken_for_html() -> None:
    document = (await rig_of(reported_evil=True).client.get("/status")).text
    elements = Elements(document)
    assert "script" not in elements.seen and EVIL in elements.text


@in_loop
async def test_json() -> None:
    rig = rig_of()
    answer = await rig.client.get("/status.json")
    status = msgspec.json.decode(answer.content, type=ServerStatus)
    assert status.model == "tiny" and status.health.status == "stuck" and status.engines[0].pid == 42
    assert (status.queues[0].num_running, status.queues[0].num_waiting) == (3, 4)
    assert [rank.is_culprit for rank in status.instances[0].ranks] == [False, True, False]
    assert page(status) == page(status)


@in_loop
async def test_without_a_ledger_there_are_queues() -> None:
    rig = Rig()
    rig.engine.stats = STATS
    elements = Elements((await rig.client.get("/status")).text)
    assert "no ledger is kept" in elements.text and "25 of 100" in elements.text


@in_loop
async def test_many_that_ask_look_once() -> None:
    rig, looks = Rig(), []
    rig.engine.statuses = lambda: looks.append(1) or ()
    for _ in range(5):
        await rig.client.get("/status.json")
    assert len(looks) == 1


@in_loop
async def test_keys_are_asked_for() -> None:
    rig = Rig(keys=("secret",))
    for path in ("/status", "/status.json"):
        refused = await rig.client.get(path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
        for given in ("Bearer secret", f"Basic {base64.b64encode(b':secret').decode()}"):
            assert (await rig.client.get(path, headers={"Authorization": given})).status_code == 200
    basic = {"Authorization": f"Basic {base64.b64encode(b':secret').decode()}"}
    assert (await rig.client.get("/v1/models", headers=basic)).status_code == 401
    assert (await rig.client.get("/health")).status_code == 200

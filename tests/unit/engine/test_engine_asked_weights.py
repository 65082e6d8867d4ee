"""Weights that a client asks its engine for: the answer to the right question, or none in time."""

from __future__ import annotations

import asyncio

import pytest

from phalanx.engine import asked_weights
from phalanx.engine.asked_weights import NONE, AskedWeights
from phalanx.protocol.client import ShareWeights, WeightsShared


def test_answers_come_to_those_who_asked() -> None:
    async def ask() -> list[bytes]:
        sent: list[ShareWeights] = []
        asked = AskedWeights(sent.append)
        asking = [asyncio.create_task(asked.ask()) for _ in range(3)]
        while len(sent) < 3:
            await asyncio.sleep(0)
        for question in reversed(sent[:2]):
            asked.note(WeightsShared(question.number, b"%d" % question.number))
        asked.give_up()
        answers = await asyncio.gather(*asking)
        asked.note(WeightsShared(sent[2].number, b"too late"))
        return [*answers, b"%d" % sent[0].number, b"%d" % sent[1].number]

    first, second, third, *numbers = asyncio.run(ask())
    assert [first, second] == numbers and third == NONE


def test_an_answer_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_weights, "ANSWER_S", 0.01)
    assert asyncio.run(AskedWeights(lambda _: None).ask()) == NONE

"""Answers as both endpoints write them: whole, or as the events of a stream. Only their choices differ."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from phalanx.engine.stream import OutputDelta
from phalanx.server.generation import Generation


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, generation: Generation) -> Usage:
        prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
        return cls(prompt, output, prompt + output, PromptTokensDetails(generation.num_cached_tokens))


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[msgspec.Struct]
    usage: Usage | UnsetType | None = UNSET


class ChoiceForm(Protocol):
    """How an endpoint writes the choices of one request's answer."""

    id_prefix: str
    name: str
    """The `object` of a whole answer."""
    event_name: str
    """The `object` of an event."""

    def whole(self, index: int, output: OutputDelta) -> msgspec.Struct:
        """A choice that is not streamed."""
        ...

    def opening(self, index: int) -> msgspec.Struct | None:
        """What a stream has of a choice before any token; None for nothing."""
        ...

    def part(self, index: int, delta: OutputDelta) -> msgspec.Struct:
        """One more part of a choice."""
        ...


class AnswerWriter:
    """Writes one request's answer. With `includes_usage` a stream ends with the usage, and each event has the field."""

    def __init__(self, form: ChoiceForm, model: str, *, includes_usage: bool) -> None:
        self._form = form
        self._id = f"{form.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._includes_usage = includes_usage

    def whole(self, outputs: Sequence[OutputDelta], usage: Usage) -> Answer:
        """The answer when it is not streamed; one output for each choice."""
        choices = [self._form.whole(index, output) for index, output in enumerate(outputs)]
        return self._answer(self._form.name, choices, usage)

    def opening(self, index: int) -> Answer | None:
        """The first event of a choice, before any token."""
        choice = self._form.opening(index)
        return None if choice is None else self._event([choice])

    def event(self, index: int, delta: OutputDelta) -> Answer | None:
        """The event for one delta; None if it has nothing to show."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._event([self._form.part(index, delta)])

    def closing(self, usage: Usage) -> Answer | None:
        """The last event; None if the client does not want the usage."""
        return self._event([], usage) if self._includes_usage else None

    def _event(self, choices: Sequence[msgspec.Struct], usage: Usage | None = None) -> Answer:
        return self._answer(self._form.event_name, choices, usage if self._includes_usage else UNSET)

    def _answer(self, name: str, choices: Sequence[msgspec.Struct], usage: Usage | UnsetType | None) -> Answer:
        return Answer(id=self._id, object=name, created=self._created, model=self._model, choices=choices, usage=usage)

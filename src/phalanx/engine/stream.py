"""A request's tokens become text: stop strings, finish reasons, log-probabilities."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.engine.request import new_seed
from phalanx.engine.tokenizer import Tokenizer
from phalanx.protocol.client import Submit, TokenBatch
from phalanx.protocol.columns import LogprobColumns, as_floats, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams

FinishName = Literal["stop", "length", "cancelled", "error"]

_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
}


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token and its natural log-probability. A token may be part of a character: then only `bytes` is exact."""

    token_id: int
    logprob: float
    text: str
    bytes: bytes


class PositionLogprobs(msgspec.Struct, frozen=True):
    """The token that was chosen at one position, and the most likely ones there, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class Origin(NamedTuple):
    """What made a token."""

    weights_version: int
    epoch: int
    """Of the ranks; one for all where they do not heal."""


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has made since the last delta. Text may lag behind the tokens.

    `token_ids` has every token, also one that ended the output and so has no text. `finish_reason` comes with the last
    delta. `stop_reason` is the stop string or stop token id that was asked for and found. `num_cached_tokens` comes
    once, with the first token.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishName | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    """Why, when `finish_reason` is `error`."""
    origins: tuple[Origin, ...] = ()
    """What made these tokens, one after the other. Nothing in the process that computes them itself."""


class StopStrings:
    """Finds stop strings over piece boundaries. The result does not depend on how the text was cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_letters = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string that ends it, if one does: the one that is complete first.

        Without `may_stop`, a stop string that is complete in this piece is text like any other.
        """
        if not self._stops:
            return piece, None
        text, num_held = self._held + piece, len(self._held)
        if may_stop and (found := self._find(text, num_held)) is not None:
            start, stop = found
            self._held = ""
            return text[:start], stop
        shown = len(text) - self._length_to_hold(text)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """Text that was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """The first stop string that is complete only after the first `num_old` letters, and where it begins."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(num_old - len(stop) + 1, 0))) >= 0
        ]
        return min(found)[1:] if found else None

    def _length_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for start in range(max(len(text) - self._longest + 1, 0), len(text)):
            if text[start] in self._first_letters:
                end = text[start:]
                if any(len(stop) > len(end) and stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0


class RequestStream:
    """Output of one request: takes tokens, gives deltas. Unread deltas merge: a slow reader costs its text only.

    Outlives the engine that makes the tokens: it knows all that another one needs to go on, seed included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        is_rehearsal: bool = False,
    ) -> None:
        """`is_rehearsal`: as in Submit."""
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=new_seed())
        self._tokenizer = tokenizer
        self._prompt = ints(prompt_token_ids)
        self._sampling = sampling
        self._is_rehearsal = is_rehearsal
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids)
        self._stops = StopStrings(sampling.stop)
        self._output = array("i")
        self._finish_reason: FinishName | None = None
        self._stop_reason: str | int | None = None
        self._error: str | None = None
        self._is_end_taken = False
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._num_cached: int | None = None
        self._origins: list[Origin] = []

    @property
    def is_finished(self) -> bool:
        """No more tokens are taken in."""
        return self._finish_reason is not None

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Prompt and output so far."""
        return as_ints(self._prompt + self._output.tobytes())

    @property
    def num_tokens(self) -> int:
        """Those that were pushed."""
        return len(self._output)

    def submit(self, request_id: int) -> Submit:
        """The request as an engine is to take it: it goes on after the last token that was pushed."""
        return Submit(request_id, self._prompt, self._sampling, self._output.tobytes(), self._is_rehearsal)

    def push(self, token_id: int, reason: FinishReason | None = None, row: LogprobRow | None = None) -> None:
        """Take in one token; `reason` if it is the last one."""
        assert not self.is_finished, "a token came after the end"
        self._output.append(token_id)
        self._token_ids.append(token_id)
        if row is not None and self._sampling.logprobs is not None:
            self._logprobs.append(self._position(token_id, row))
        if reason is FinishReason.STOP:  # the token that ended the output is no part of the text
            self._stop_reason = token_id if token_id in self._sampling.stop_token_ids else None
        else:
            self._show(self._detokenizer.feed(token_id))
        if reason is not None and not self.is_finished:
            self.finish(reason)

    def push_num_cached(self, num_cached_tokens: int) -> None:
        """Note how many prompt tokens came from the prefix cache."""
        self._num_cached = num_cached_tokens

    def push_origin(self, origin: Origin) -> None:
        """Note what has made the tokens that were just pushed."""
        if self._origins[-1:] != [origin]:
            self._origins.append(origin)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the output. Held text is let go: it can no longer become a stop string."""
        assert not self.is_finished, "ended twice"
        self._show(self._detokenizer.flush())
        if not self.is_finished:
            self._text.append(self._stops.flush())
            self._finish_reason = _NAMES[reason]
            self._error = error

    def take(self) -> OutputDelta | None:
        """All that is new since the last call; None if nothing is."""
        is_end = self.is_finished and not self._is_end_taken
        text = "".join(self._text)
        if not (text or self._token_ids or is_end):
            return None
        delta = OutputDelta(
            text=text,
            token_ids=tuple(self._token_ids),
            logprobs=None if self._sampling.logprobs is None else tuple(self._logprobs),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            num_cached_tokens=self._num_cached,
            error=self._error,
            origins=tuple(self._origins),
        )
        self._is_end_taken = self.is_finished
        self._text, self._token_ids, self._logprobs, self._num_cached, self._origins = [], [], [], None, []
        return delta

    def _show(self, piece: str) -> None:
        # A stop string, too, ends the output only after so many tokens, though it may begin before.
        shown, stop = self._stops.feed(piece, may_stop=len(self._output) > self._sampling.min_tokens)
        self._text.append(shown)
        if stop is not None:
            self._finish_reason, self._stop_reason = "stop", stop

    def _position(self, token_id: int, row: LogprobRow) -> PositionLogprobs:
        chosen, top = row
        assert self._sampling.logprobs is not None
        return PositionLogprobs(
            self._token_logprob(token_id, chosen),
            tuple(self._token_logprob(*pair) for pair in top[: self._sampling.logprobs] if pair[1] > -math.inf),
        )

    def _token_logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        written = self._tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, logprob, written.decode(errors="replace"), written)


LogprobRow = tuple[float, list[tuple[int, float]]]
"""The chosen token's log-probability, and the most likely tokens with theirs."""


class Streams:
    """The running requests of one client, by id."""

    def __init__(self) -> None:
        self._running: dict[int, RequestStream] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._running

    def __getitem__(self, request_id: int) -> RequestStream:
        return self._running[request_id]

    def add(self, request_id: int, stream: RequestStream) -> None:
        """Tokens of `request_id` go to `stream` from now on."""
        assert request_id not in self._running, request_id
        self._running[request_id] = stream

    def drop(self, request_id: int) -> bool:
        """Take no more interest in a request. False if it has ended already."""
        return self._running.pop(request_id, None) is not None

    def drop_all(self) -> list[int]:
        """Take no more interest in any request; returns the ids of those that had not ended."""
        dropped = list(self._running)
        self._running.clear()
        return dropped

    def drop_stream(self, stream: RequestStream) -> list[int]:
        """Take no more interest in one request; returns its id, if it had not ended."""
        dropped = [request_id for request_id, one in self._running.items() if one is stream]
        for request_id in dropped:
            del self._running[request_id]
        return dropped

    def end_all(self, reason: FinishReason) -> list[int]:
        """End every request that still runs; returns their ids."""
        ended = list(self._running)
        for stream in self._running.values():
            stream.finish(reason)
        self._running.clear()
        return ended

    def apply(self, batch: TokenBatch, origin: Origin | None = None) -> tuple[list[int], list[int]]:
        """Hand out one step's tokens, which `origin` has made. Ids of requests that nobody waits for are passed over.

        Returns the ids of requests with news, and of those that met a stop string, which the brain does not know of and
        must be told to cancel.
        """
        finished, errors = dict(batch.finished), dict(batch.errors)
        touched: list[int] = []
        for request_id, num_cached in batch.cached:
            if request_id in self._running:
                self._running[request_id].push_num_cached(num_cached)
        rows = dict(_rows(batch.logprobs)) if batch.logprobs is not None else {}
        request_ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
        for entry, (request_id, token_id) in enumerate(zip(request_ids, as_ints(batch.tokens).tolist(), strict=True)):
            stream = self._running.get(request_id)
            if stream is not None:
                stream.push(token_id, finished.get(request_id), rows.get(entry))
                if origin is not None:
                    stream.push_origin(origin)
                touched.append(request_id)
        for request_id, reason in finished.items():
            stream = self._running.get(request_id)
            if stream is not None and not stream.is_finished:  # it ended without a token in this batch
                stream.finish(reason, errors.get(request_id))
                touched.append(request_id)
        ended = [request_id for request_id in touched if self._running[request_id].is_finished]
        for request_id in ended:
            del self._running[request_id]
        return touched, [request_id for request_id in ended if request_id not in finished]


def _rows(columns: LogprobColumns) -> Iterator[tuple[int, LogprobRow]]:
    entries, chosen = as_ints(columns.entries).tolist(), as_floats(columns.chosen).tolist()
    shape = (len(entries), columns.width)
    top_ids = as_ints(columns.top_ids).reshape(shape).tolist()
    top_logprobs = as_floats(columns.top_logprobs).reshape(shape).tolist()
    for i, entry in enumerate(entries):
        yield entry, (chosen[i], list(zip(top_ids[i], top_logprobs[i], strict=True)))

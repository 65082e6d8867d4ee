"""How long ranks may wait for another one: learned from the steps that they have made, by how many tokens those had."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from phalanx.ledger.limits import Limits
from phalanx.ledger.look import Look
from phalanx.ledger.record import Kind, Record

LEAST_S = 0.7
"""With the looks that find it and the time that a verdict has to stand, it is told within a second."""

STEPS_OF_PATIENCE = 20
"""Times the median of steps of about as many tokens: without the first of them, once there is another, as that may have
had much to set up."""

LARGER_BY = 4
"""Times what the largest step seen would take with more tokens: the cost of a token grows with what came before it."""

AT_FIRST_S = 10.0
AT_FIRST_PER_TOKEN_S = 0.01
"""Until a step has been made: the first one of a run may have much to set up, and nothing says how fast ranks are."""

_KEPT = 64
_NS = 1e9


class Patience:
    """What a watcher has seen of steps."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # By the size of a step, its tokens' number of bits, and by step: of the rank that was in it for longest.
        self._took_s: dict[int, dict[int, float]] = defaultdict(dict)
        self._learned: dict[int, int] = {}

    def learned(self, rank: int) -> int:
        """Up to which of a rank's records; 0 if to none."""
        return self._learned.get(rank, 0)

    def learn(self, rank: int, steps: Iterable[Record]) -> None:
        """Take in the steps that a rank's journal has, in their order; those that were seen before do not count."""
        newest = self.learned(rank)
        for record in steps:
            if record.kind != Kind.STEP or record.number <= newest:
                continue
            if not record.is_done:  # nor will those after it be done before it
                break
            self._note(record.sequence.bit_length(), record.step, (record.done_ns - record.issued_ns) / _NS)
            self._learned[rank] = record.number

    def _note(self, size: int, step: int, took_s: float) -> None:
        took = self._took_s[size]
        took[step] = max(took_s, took.get(step, 0.0))
        if len(took) > _KEPT:
            del took[next(iter(took))]

    def of_s(self, look: Look) -> float:
        """How long somebody may wait in the largest of the steps that are under way."""
        return self.of_step_s(max((_tokens_under_way(one.entries.records) for one in look.ranks.values()), default=0))

    def of_step_s(self, num_tokens: int) -> float:
        """How long somebody may wait in a step of so many tokens, of all replicas together."""
        return max(LEAST_S, min(self._expected_s(num_tokens), self._limits.step_s))

    def _expected_s(self, num_tokens: int) -> float:
        size = num_tokens.bit_length()
        if not self._took_s:
            return AT_FIRST_S + AT_FIRST_PER_TOKEN_S * num_tokens
        larger = [known for known in self._took_s if known >= size]
        known = min(larger) if larger else max(self._took_s)
        first_s, *others_s = self._took_s[known].values()
        usual_s = statistics.median(others_s or [first_s])
        if larger:
            return STEPS_OF_PATIENCE * usual_s
        return max(float(STEPS_OF_PATIENCE), LARGER_BY * num_tokens / (1 << max(known - 1, 0))) * usual_s


def _tokens_under_way(records: Iterable[Record]) -> int:
    return max((one.sequence for one in records if one.kind == Kind.STEP and not one.is_done), default=0)

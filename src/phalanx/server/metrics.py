"""What Prometheus reads at /metrics: counts of this server, and the engine's state at the time of asking."""

from __future__ import annotations

import collections
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from phalanx.engine.condition import Condition
from phalanx.engine.engine import Engine, Strength
from phalanx.engine.roster import Phase
from phalanx.engine.stream import OutputDelta
from phalanx.ledger.verdict import Cause
from phalanx.protocol.client import ReplicaStats

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_NEXT_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 30)
_WHOLE_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Its own registry, so that two servers in one process do not meet."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self._ended = Counter(
            "phalanx_requests", "Outputs that ended, by how; n choices are n.", ["outcome"], registry=registry
        )
        self._refused = Counter(
            "phalanx_requests_refused", "HTTP requests answered with an error.", ["status"], registry=registry
        )
        self._maintained = Counter(
            "phalanx_maintenance",
            "Reloads, sleeps and wakes, by how they ended.",
            ["order", "outcome"],
            registry=registry,
        )
        self._maintenance_s = Gauge(
            "phalanx_maintenance_last_seconds", "What the last one took.", ["order"], registry=registry
        )
        self._first_token = Histogram(
            "phalanx_time_to_first_token_seconds",
            "From acceptance to the first token.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._next_token = Histogram(
            "phalanx_inter_token_latency_seconds",
            "From one token to the next, as they leave the server.",
            buckets=_NEXT_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._whole = Histogram(
            "phalanx_request_seconds", "From acceptance to the last token.", buckets=_WHOLE_BUCKETS_S, registry=registry
        )

        self._resizes = Counter("phalanx_resizes", "Resizes that ended, by how.", ["outcome"], registry=registry)
        self._resize_s = Gauge(
            "phalanx_resize_last_seconds", "That the last resize took, whatever came of it.", registry=registry
        )

    def note_resize(self, outcome: str, took_s: float) -> None:
        self._resizes.labels(outcome).inc()
        self._resize_s.set(took_s)

    def count_refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def note_maintenance(self, order: str, *, has_failed: bool, took_s: float) -> None:
        """A reload, sleep or wake is over."""
        self._maintained.labels(order, "failed" if has_failed else "done").inc()
        self._maintenance_s.labels(order).set(took_s)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    async def observe(self, deltas: AsyncGenerator[OutputDelta, None]) -> AsyncGenerator[OutputDelta, None]:
        """Pass one output on, and note its times and its end. Closing this closes `deltas`."""
        started = previous = time.monotonic()
        outcome, has_token = "cancelled", False
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    now = time.monotonic()
                    if delta.token_ids:
                        self._note_tokens(len(delta.token_ids), now - previous, is_first=not has_token)
                        previous, has_token = now, True
                    outcome = delta.finish_reason or outcome
                    yield delta
        except Exception:  # whatever it is, it counts; a client that leaves is no Exception
            outcome = "error"
            raise
        finally:
            self._ended.labels(outcome).inc()
            self._whole.observe(time.monotonic() - started)

    def _note_tokens(self, num_tokens: int, waited_s: float, *, is_first: bool) -> None:
        if is_first:
            self._first_token.observe(waited_s)
            return
        for _ in range(num_tokens):  # tokens that came together waited equally long
            self._next_token.observe(waited_s / num_tokens)


class _EngineCollector(Collector):
    """The engine's latest stats, by replica; zeros before it has told any."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        is_up = self._engine.dead is None and self._engine.down is None
        yield GaugeMetricFamily("phalanx_engine_up", "1 while the engine serves.", float(is_up))
        numbers = [replica.replica for replica in self._engine.replicas()]
        replicas = self._replicas(len(numbers))
        running = [stats.num_running for stats in replicas]
        yield _gauge("requests_running", "Requests in the batch.", numbers, running)
        waiting = [stats.num_waiting for stats in replicas]
        yield _gauge("requests_waiting", "Requests that wait for room in the batch.", numbers, waiting)
        used = [stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0 for stats in replicas]
        yield _gauge("kv_cache_used_ratio", "Share of KV cache blocks in use.", numbers, used)
        for name, text, counts in (
            ("prompt_tokens", "Tokens of prompts.", [stats.num_prompt_tokens for stats in replicas]),
            (
                "prompt_tokens_cached",
                "Tokens of prompts that came from the prefix cache.",
                [stats.num_cached_tokens for stats in replicas],
            ),
            ("generated_tokens", "Tokens of outputs.", [stats.num_generated_tokens for stats in replicas]),
            ("engine_steps", "Steps of the engine.", [stats.num_steps for stats in replicas]),
            (
                "preemptions",
                "Requests that lost their KV cache and were computed anew.",
                [stats.num_preemptions for stats in replicas],
            ),
        ):
            family = CounterMetricFamily(f"phalanx_{name}", text, labels=["replica"])
            for replica, count in zip(numbers, counts, strict=True):
                family.add_metric([str(replica)], count)
            yield family
        yield self._states()
        yield from _strength(self._engine.strength)
        yield from self._balance()
        yield from self._progress()

    def _progress(self) -> Iterator[Metric]:
        """Whether steps progress, and what the ledger has found."""
        conditions = self._engine.conditions()
        healthy = GaugeMetricFamily(
            "phalanx_engine_healthy", "1 while steps progress, or there are none to make.", labels=["engine"]
        )
        since = GaugeMetricFamily(
            "phalanx_engine_seconds_since_step", "Since the last step; grows while there are none.", labels=["engine"]
        )
        watched = GaugeMetricFamily("phalanx_ledger_ranks_watched", "Ranks that the ledger watches.", labels=["engine"])
        restarts = CounterMetricFamily(
            "phalanx_engine_restarts", "Times that the engine was started again.", labels=["engine"]
        )
        weights = GaugeMetricFamily(
            "phalanx_weights_version", "Of the weights in use; grows with each reload.", labels=["engine"]
        )
        asleep = GaugeMetricFamily("phalanx_sleep_level", "Of the engine's sleep; 0 while awake.", labels=["engine"])
        watchers = CounterMetricFamily(
            "phalanx_ledger_watcher_restarts", "Times that a watcher was replaced.", labels=["engine"]
        )
        counts: collections.Counter[str] = collections.Counter()
        for condition in conditions:
            engine = condition.replica
            healthy.add_metric([str(engine)], float(condition.is_healthy))
            if condition.since_step_s is not None:
                since.add_metric([str(engine)], condition.since_step_s)
            watched.add_metric([str(engine)], condition.num_watched)
            restarts.add_metric([str(engine)], condition.num_restarts)
            weights.add_metric([str(engine)], condition.weights_version)
            asleep.add_metric([str(engine)], condition.sleep_level)
            watchers.add_metric([str(engine)], condition.num_watcher_restarts)
            counts.update(condition.verdicts)
        verdicts = CounterMetricFamily(
            "phalanx_ledger_verdicts", "Times that steps did not progress, by cause.", labels=["cause"]
        )
        for cause in sorted({*get_args(Cause), *counts}):
            verdicts.add_metric([cause], counts[cause])
        yield from (healthy, since, watched, watchers, restarts, weights, asleep, verdicts)
        yield from _healing(conditions)

    def _states(self) -> Metric:
        """How many replicas are in each state."""
        counts = collections.Counter(replica.state for replica in self._engine.replicas())
        family = GaugeMetricFamily("phalanx_replicas", "Replicas, by what they are up to.", labels=["state"])
        for state in get_args(Phase):
            family.add_metric([state], counts[state])
        return family

    def _balance(self) -> Iterator[Metric]:
        """Nothing where experts do not move, or before they were first measured."""
        balance = self._engine.stats and self._engine.stats.balance
        if not balance:
            return
        ratio = GaugeMetricFamily(
            "phalanx_expert_load_ratio",
            "Tokens for the experts of the busiest rank over those of the mean one: measured, and what is expected of "
            "the same tokens with experts where they are since then.",
            labels=["kind"],
        )
        ratio.add_metric(["measured"], balance.measured)
        ratio.add_metric(["expected"], balance.expected)
        yield ratio
        text = "Layers whose experts have moved, each time counted."
        yield CounterMetricFamily("phalanx_expert_moves", text, value=balance.num_moves)

    def _replicas(self, count: int) -> Sequence[ReplicaStats]:
        if self._engine.stats is not None:
            return self._engine.stats.replicas
        return [ReplicaStats(0, 0, 0, self._engine.info.num_blocks, 0, 0, 0, 0, 0)] * count


def _strength(strength: Strength) -> Iterator[Metric]:
    """Of the replicas that are wanted."""
    text = "Replicas that were lost with their places and are not back."
    yield GaugeMetricFamily("phalanx_replicas_missing", text, float(strength.num_missing))
    text = "Times that a replica has lost its place, as its node was lost or drained and no other had room."
    yield CounterMetricFamily("phalanx_replicas_lost", text, value=strength.num_lost)
    text = "Times that a lost replica has come back by itself."
    yield CounterMetricFamily("phalanx_replicas_grown", text, value=strength.num_grown)


def _healing(conditions: Sequence[Condition]) -> Iterator[Metric]:
    """Of the engines that a fault does not end."""
    epoch = GaugeMetricFamily(
        "phalanx_formation_epoch", "Of the ranks that compute; grows with each fault and resize.", labels=["engine"]
    )
    standby = GaugeMetricFamily("phalanx_standby_ready", "1 while a standby line stands ready.", labels=["engine"])
    pause = GaugeMetricFamily(
        "phalanx_healing_last_seconds", "From the last fault to ranks that compute again.", labels=["engine"]
    )
    faults = CounterMetricFamily("phalanx_faults", "Faults that ended all ranks of an engine.", labels=["engine"])
    standbys = CounterMetricFamily(
        "phalanx_standby_faults", "Standby lines that did not come up, or did not last.", labels=["engine"]
    )
    sharing = GaugeMetricFamily(
        "phalanx_weights_shared",
        "1 while the ranks' weights are memory that those of another replica may compute with, too.",
        labels=["engine"],
    )
    tries = CounterMetricFamily(
        "phalanx_healing_tries",
        "What was tried after faults, and what came of it.",
        labels=["engine", "rung", "outcome"],
    )
    for condition in conditions:
        if (stats := condition.formation) is None:
            continue
        name = [str(condition.replica)]
        epoch.add_metric(name, stats.epoch)
        standby.add_metric(name, float(stats.standby == "ready"))
        pause.add_metric(name, stats.last_pause_s)
        faults.add_metric(name, stats.num_faults)
        standbys.add_metric(name, stats.num_standby_faults)
        sharing.add_metric(name, float(stats.shares_weights))
        for outcome, counts in (("healed", stats.healed), ("failed", stats.failed)):
            for rung, count in counts.items():
                tries.add_metric([*name, rung, outcome], count)
    if any(condition.formation is not None for condition in conditions):
        yield from (epoch, standby, pause, faults, standbys, sharing, tries)


def _gauge(name: str, text: str, replicas: Sequence[int], values: Sequence[float]) -> Metric:
    family = GaugeMetricFamily(f"phalanx_{name}", text, labels=["replica"])
    for replica, value in zip(replicas, values, strict=True):
        family.add_metric([str(replica)], value)
    return family

"""What /health says. It fails when requests are not taken, and when steps do not progress. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.engine.condition import Condition
from phalanx.ledger.report import VerdictReport
from phalanx.server.api_error import ApiError, ErrorBody, engine_dead, engine_restarting


class HealthBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """ok: steps progress, or there are none to make. degraded: not in every replica. stuck: in none. restarting: all of
    those that ended are being started again. asleep: until it is woken, as somebody wants it."""

    status: Literal["ok", "asleep", "degraded", "stuck", "restarting", "dead", "stopping", "starting"]
    phase: str | None = None
    """While it starts, for the first time or again: what it does."""
    error: ErrorBody | None = None
    verdict: VerdictReport | None = None


class Health(NamedTuple):
    status: int
    """Of HTTP."""
    body: HealthBody


def health(conditions: Sequence[Condition], refusal: ApiError | None) -> Health:
    """`refusal` says why no requests are taken, if none are."""
    verdict = next((one.trouble for one in conditions if one.trouble is not None), None)
    if refusal is not None:
        status: Literal["dead", "stopping"] = "dead" if refusal.code == "engine_dead" else "stopping"
        return Health(refusal.status, HealthBody(status=status, error=refusal.body().error, verdict=verdict))
    sick = [one for one in conditions if not one.is_healthy]
    if not sick:
        num_asleep = sum(one.sleep_level > 0 for one in conditions)
        if 0 < num_asleep < len(conditions):
            said = f"{num_asleep} of {len(conditions)} replicas are asleep until POST /wake"
            return Health(
                200, HealthBody(status="degraded", error=ApiError(503, said, code="engine_asleep").body().error)
            )
        return Health(200, HealthBody(status="asleep" if num_asleep else "ok"))
    starting = [one for one in sick if one.down is not None]
    errors = [_error_of(one).body().error for one in sorted(sick, key=lambda one: one.dead is not None)]
    if len(sick) < len(conditions):
        return Health(200, HealthBody(status="degraded", error=errors[0], verdict=verdict))
    if len(starting) == sum(one.dead is None for one in conditions):
        error = engine_restarting(str(starting[0].down)).body().error
        return Health(503, HealthBody(status="restarting", phase=starting[0].phase, error=error, verdict=verdict))
    return Health(503, HealthBody(status="stuck", error=errors[0], verdict=verdict))


def _error_of(condition: Condition) -> ApiError:
    if condition.dead is not None:
        return engine_dead(condition.dead)
    if condition.down is not None:
        return engine_restarting(condition.down)
    assert condition.trouble is not None, "an engine that lives and is not healthy is in trouble"
    return ApiError(503, f"steps do not progress: {condition.trouble.paragraph}", code="stuck")


def while_starting(error: ApiError, phase: str) -> HealthBody:
    return HealthBody(status="starting", phase=phase, error=error.body().error)

"""Calls of actors: their answers, or in words why there are none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray import ObjectRef

from phalanx.errors import DeadlineError, StartError

POLL_S = 0.1
MAX_CAUSE_CHARS = 2000
END_OF_FILE = "connection error code 2"
"""How Ray calls it that a process is gone which had not taken its leave."""
WITHOUT_A_WORD = "its process was killed or crashed"
_ENDS_OF_ACTORS = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
)


def answers_to(calls: Mapping[ObjectRef[Any], str], phase: str, deadline_s: float) -> list[Any]:
    """The answers, in the order of `calls`, each of which has the name of its actor.

    Raises StartError as soon as one fails, with its reason; DeadlineError naming those that have not answered.
    """
    expires_at = time.monotonic() + deadline_s
    waiting = list(calls)
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
        for call in ended:
            _check(call, calls[call], phase)
        if waiting and time.monotonic() >= expires_at:
            raise DeadlineError(f"an answer while {phase}", ", ".join(calls[call] for call in waiting), deadline_s)
    return [ray.get(call) for call in calls]


def _check(call: ObjectRef[Any], name: str, phase: str) -> None:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        raise StartError(name, phase, explain(error)) from error


class Outcome(NamedTuple):
    """Of a call that is over."""

    how: str
    """What it returned, or why there is nothing."""
    has_actor_ended: bool
    """Whether it is over because its actor is. Not so if that was for lack of memory: a call may be why."""


def outcome(ref: ObjectRef[Any]) -> Outcome:
    """Of a finished call of an actor. Returns at once."""
    try:
        return Outcome(str(ray.get(ref, timeout=0)), has_actor_ended=False)
    except Exception as error:  # whatever it is, it is the answer
        return Outcome(explain(error), isinstance(error, _ENDS_OF_ACTORS))


def explain(error: BaseException) -> str:
    """Ray's exceptions without their advice, an actor's own with its type."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if not isinstance(cause, BaseException):
            return str(error)
        return str(cause) if type(cause) is RuntimeError else f"{type(cause).__name__}: {cause}"
    text = str(error).strip()
    if isinstance(error, ray.exceptions.ActorDiedError):
        text = _reason_of_death(text)
    return text[-MAX_CAUSE_CHARS:] or type(error).__name__


def _reason_of_death(text: str) -> str:
    """The sentence that says it, of many lines."""
    for beginning in ("Worker exit detail: ", "The actor died because its node has died", "The actor is dead because "):
        _, found, rest = text.partition(beginning)
        if found:
            detail = rest if beginning.endswith(": ") else f"{found}{rest}"
            return (
                WITHOUT_A_WORD if END_OF_FILE in detail else detail.partition(" Some common causes include")[0].strip()
            )
    return text

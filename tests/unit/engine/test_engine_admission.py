from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.engine.admission import check_request, typed
from phalanx.errors import RequestError
from phalanx.protocol.sampling import SamplingParams


def check(prompt: Any, **sampling: Any) -> None:
    check_request(prompt, SamplingParams(**sampling), max_model_len=8, vocab_size=10)


@pytest.mark.parametrize("prompt", [[0, 9], (1,), range(3), [np.int64(9)], np.array([9, 0])])
def test_token_ids_are_whole_numbers_of_any_kind(prompt: Any) -> None:
    check(prompt, max_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "value"), [([1.5], 1.5), ([1, "a"], "a"), ([1, None], None), ([[1]], [1]), ([9, 1.0], 1.0)]
)
def test_anything_else_is_refused(prompt: Any, value: object) -> None:
    with pytest.raises(RequestError, match="whole numbers") as caught:
        check(prompt, max_tokens=1)
    assert (caught.value.field, caught.value.value) == ("prompt", value)


def test_sampling_gets_the_types_of_its_fields() -> None:
    given: Any = {
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "temperature": np.float64(0.5),
        "max_tokens": np.int64(3),
    }
    found = typed(SamplingParams(**given))
    assert found == SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2), temperature=0.5, max_tokens=3)
    assert [type(value) for value in (found.stop, found.stop_token_ids, found.temperature)] == [tuple, tuple, float]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("stop", "abc", "expected array, got str"),  # each letter would be a stop string
        ("stop", ("\ud800",), "surrogate"),
        ("stop_token_ids", (1, 1.5), "expected int, got float"),
        ("max_tokens", 1.5, "expected int | null, got float"),
        ("temperature", "hot", "expected float, got str"),
        ("ignore_eos", 1, "expected bool, got int"),
    ],
)
def test_sampling_of_wrong_types_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        typed(SamplingParams(**{field: value}))
    assert caught.value.field == field
    assert says in str(caught.value)


def test_what_is_no_sampling_is_refused() -> None:
    nothing: Any = {"temperature": 0}
    with pytest.raises(RequestError, match="SamplingParams"):
        typed(nothing)

"""Requests that go on in another engine: the same tokens as in one, whatever runs beside them, and nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
from engine_brain_rig import Client, Rig
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_brain_properties import _prompts, _samplings
from test_engine_stream import stream_of

from phalanx.errors import RequestError
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams

LIMITS: dict[str, Any] = {"block_size": 4, "max_model_len": 40}


def successor(rig: Rig, **limits: Any) -> Rig:
    """Another engine, which has the requests that have not ended in `rig`, with what they have made."""
    other = Rig(**{**LIMITS, **limits})
    for request_id, client in rig.clients.items():
        if client.reason is None:
            resume(other, request_id, client)
    return other


def resume(rig: Rig, request_id: int, client: Client) -> None:
    rig.brain.submit(Submit(request_id, ints(client.prompt), client.sampling, ints(client.output)))
    rig.clients[request_id] = client


@given(
    requests=st.lists(st.tuples(_prompts, _samplings), min_size=1, max_size=8),
    numbers_of_steps=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    limits=st.fixed_dictionaries(
        {
            "num_blocks": st.integers(10, 18),
            "max_num_seqs": st.integers(1, 6),
            "max_num_batched_tokens": st.integers(6, 30),
            "async_scheduling": st.booleans(),
            "enable_prefix_caching": st.booleans(),
            "pipeline_parallel_size": st.integers(1, 3),
            "data_parallel_size": st.integers(1, 2),
        }
    ),
)
@settings(max_examples=40, deadline=None)
def test_outputs_go_on_as_if_nothing_had_happened(
    requests: list[tuple[list[int], dict[str, object]]], numbers_of_steps: list[int], limits: dict[str, Any]
) -> None:
    rigs = [Rig(**LIMITS, **limits)]
    for prompt, sampling in requests:
        rigs[0].submit(prompt, **sampling)
    for num_steps in numbers_of_steps:
        for _ in range(num_steps):
            if rigs[-1].brain.has_work():
                rigs[-1].step()
        rigs.append(successor(rigs[-1], **limits))
    clients = rigs[0].clients
    while rigs[-1].brain.has_work():
        rigs[-1].step()
    for client in clients.values():
        rigs[-1]._check_output(client)
    stats = [replica for rig in rigs for replica in rig.brain.stats().replicas]
    assert sum(one.num_generated_tokens for one in stats) == sum(len(client.output) for client in clients.values())
    assert sum(one.num_prompt_tokens for one in stats) == sum(len(client.prompt) for client in clients.values())
    assert sum(one.num_cached_tokens for one in stats) == sum(client.num_cached or 0 for client in clients.values())


def test_what_no_longer_fits_is_refused() -> None:
    rig = Rig(**{**LIMITS, "max_model_len": 10})
    client = Client([10, 11, 12], SamplingParams(max_tokens=None, ignore_eos=True), [13] * 6)
    resume(rig, 0, client)
    rig.step()
    assert client.reason is FinishReason.LENGTH
    with pytest.raises(RequestError, match=r"output: '7 tokens'.*at most 6"):
        resume(rig, 1, Client(client.prompt, client.sampling, [13] * 7))


def test_a_stream_says_what_another_engine_must_know() -> None:
    stream, ids = stream_of("one two", temperature=1.0, max_tokens=9)
    first = stream.submit(3)
    assert (first.request_id, first.output_token_ids) == (3, b"")
    assert first.sampling.seed is not None, "an engine that chose one itself would take it along when it ends"
    for token_id in ids:
        stream.push(token_id)
    later = stream.submit(4)
    assert as_ints(later.output_token_ids).tolist() == ids
    assert (later.prompt_token_ids, later.sampling) == (first.prompt_token_ids, first.sampling)


def test_a_seed_that_was_asked_for_stays() -> None:
    stream, _ = stream_of("one", seed=7)
    assert stream.submit(0).sampling.seed == 7
    seeds = {stream_of("one")[0].submit(0).sampling.seed for _ in range(9)}
    assert len(seeds) == 9

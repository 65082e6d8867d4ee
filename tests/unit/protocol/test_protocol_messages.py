"""Every message survives the wire, and what is not a message is refused."""

import msgspec
import numpy as np
import pytest

from phalanx.errors import RequestError
from phalanx.protocol.client import Cancel, ClientMessage, EngineFailed, EngineMessage, Shutdown, Submit, TokenBatch
from phalanx.protocol.columns import WrongSetting, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import (
    AllocateCache,
    Call,
    Failure,
    Loaded,
    NewRequest,
    Reply,
    Step,
    StepPlan,
    StepResult,
    StepShape,
    WorkerMessage,
)

SAMPLING = SamplingParams(temperature=0.5, stop=("a", "b"), stop_token_ids=(1,), seed=2**63)
PLAN = StepPlan(
    epoch=1,
    step=7,
    shape=StepShape(3, 2, 1),
    slots=ints([0, 1]),
    num_tokens=ints([1, 2]),
    new=(NewRequest(0, ints([5, 6]), 2, 0, ints([9]), SAMPLING, 2**62, (2,)),),
)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Submit(1, ints([1, 2]), SAMPLING), ClientMessage),
        (Cancel((1, 2)), ClientMessage),
        (Shutdown(), ClientMessage),
        (TokenBatch(b"", b"", ((1, FinishReason.STOP),)), EngineMessage),
        (EngineFailed("why", is_user_error=True), EngineMessage),
        (EngineFailed("why", True, WrongSetting("dtype", None, "auto")), EngineMessage),
        (Call(3, Step((PLAN,)), (0,)), Call),
        (Call(4, AllocateCache(10, 128), (0, 1)), Call),
        (Reply(3, StepResult(7, ints([4]))), WorkerMessage),
        (Reply(0, Loaded(1, "cpu", "float32")), WorkerMessage),
        (Failure("node", "phase", "KeyError", "x", "trace", False), WorkerMessage),
    ],
)
def test_a_message_survives_the_wire(message: object, kind: type) -> None:
    wire = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(wire, type=kind) == message


def test_a_steady_decode_step_costs_a_few_bytes_a_request() -> None:
    rows = 256
    plan = StepPlan(
        epoch=1,
        step=1000,
        shape=StepShape(rows, rows, rows),
        slots=ints(range(rows)),
        num_tokens=ints([1] * rows),
    )
    assert len(msgspec.msgpack.encode(Call(1, Step((plan,)), (0,)))) < 10 * rows


@pytest.mark.parametrize("wire", [b"", b"\x00", b"\x93\xa4Nope\x01\x02", msgspec.msgpack.encode({"a": 1})])
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        msgspec.msgpack.decode(wire, type=WorkerMessage)


def test_columns_are_read_without_a_copy() -> None:
    column = ints([1, -2, 3])
    numbers = as_ints(column)
    assert numbers.tolist() == [1, -2, 3]
    assert np.shares_memory(numbers, np.frombuffer(column, np.uint8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("stop", ("",)),
        ("stop_token_ids", (10**12,)),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("seed", 2**64),
    ],
)
def test_a_wrong_parameter_is_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value}).check()  # type: ignore[arg-type]
    assert caught.value.field == field

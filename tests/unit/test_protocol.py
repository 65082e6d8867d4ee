"""Every message survives the wire, and what is not a message is refused."""

import msgspec
import numpy as np
import pytest

from phalanx import protocol
from phalanx.errors import RequestError
from phalanx.protocol import SamplingParams

SAMPLING = SamplingParams(temperature=0.5, stop=("a", "b"), stop_token_ids=(1,), seed=2**63)
PLAN = protocol.StepPlan(
    epoch=1,
    step=7,
    shape=protocol.StepShape(3, 2, 1),
    slots=protocol.ints([0, 1]),
    num_tokens=protocol.ints([1, 2]),
    new=(protocol.NewRequest(0, protocol.ints([5, 6]), 2, 0, protocol.ints([9]), SAMPLING, 2**62, (2,)),),
)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (protocol.Submit(1, protocol.ints([1, 2]), SAMPLING), protocol.ClientMessage),
        (protocol.Cancel((1, 2)), protocol.ClientMessage),
        (protocol.Shutdown(), protocol.ClientMessage),
        (protocol.TokenBatch(b"", b"", ((1, protocol.FinishReason.STOP),)), protocol.EngineMessage),
        (protocol.EngineFailed("why", is_user_error=True), protocol.EngineMessage),
        (protocol.EngineFailed("why", True, protocol.WrongSetting("dtype", None, "auto")), protocol.EngineMessage),
        (protocol.Call(3, protocol.Step((PLAN,)), (0,)), protocol.Call),
        (protocol.Call(4, protocol.AllocateCache(10, 128), (0, 1)), protocol.Call),
        (protocol.Reply(3, protocol.StepResult(7, protocol.ints([4]))), protocol.WorkerMessage),
        (protocol.Reply(0, protocol.Loaded(1, "cpu", "float32")), protocol.WorkerMessage),
        (protocol.Failure(1, "node", "phase", "KeyError", "x", "trace", False), protocol.WorkerMessage),
    ],
)
def test_a_message_survives_the_wire(message: object, kind: type) -> None:
    wire = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(wire, type=kind) == message


def test_a_steady_decode_step_costs_a_few_bytes_a_request() -> None:
    rows = 256
    plan = protocol.StepPlan(
        epoch=1,
        step=1000,
        shape=protocol.StepShape(rows, rows, rows),
        slots=protocol.ints(range(rows)),
        num_tokens=protocol.ints([1] * rows),
    )
    assert len(msgspec.msgpack.encode(protocol.Call(1, protocol.Step((plan,)), (0,)))) < 10 * rows


@pytest.mark.parametrize("wire", [b"", b"\x00", b"\x93\xa4Nope\x01\x02", msgspec.msgpack.encode({"a": 1})])
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        msgspec.msgpack.decode(wire, type=protocol.WorkerMessage)


def test_columns_are_read_without_a_copy() -> None:
    column = protocol.ints([1, -2, 3])
    numbers = protocol.as_ints(column)
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

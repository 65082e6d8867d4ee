"""The engine's process without a model: speaks the protocol around an EchoBrain, and fails as it is told to.

Usage, as for the real one: python engine_fake_process.py BEHAVIOUR DESCRIPTOR SERVER_PID

BEHAVIOUR `FILE:first,second,third` is another one each time that it is started, which is counted in FILE; the last one
stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec
from engine_echo_brain import EchoBrain

from phalanx.errors import PeerDiedError
from phalanx.executor.shared_fate import die_with_parent
from phalanx.memory.shared_weights import SharedWeights, WeightsKind, decode_shared, encode_shared
from phalanx.protocol.client import (
    AvoidNodes,
    Begin,
    Cancel,
    CancelResize,
    ClientMessage,
    EngineFailed,
    EngineReady,
    Maintained,
    MaintenanceOrder,
    MaintenanceStats,
    Reload,
    Resize,
    ResizeBegun,
    ResizeEnded,
    ShareWeights,
    Sleep,
    StartProgress,
    Submit,
    WeightsShared,
)
from phalanx.protocol.columns import Message, WrongSetting, as_ints
from phalanx.transport.liveness import Party
from phalanx.transport.stream import Stream

DEADLINE_S = 20.0
SIGN_OF_LIFE_S = 0.1
MAX_MODEL_LEN = 100_000
LONG_STEP_S = 0.6
PACE_S = 0.002
REFUSED, FAILS, DIES, NEVER_READY = 13, 14, 15, 16
"""Sizes of a resize, by what becomes of it; others are done."""
POISON = 7
"""A prompt that begins with this token, when the engine dies of one."""


def resolved(model: str) -> str:
    return str(Path(model).resolve())


class FakeEngine:
    def __init__(self, stream: Stream, behaviour: str) -> None:
        self.stream = stream
        self.behaviour = behaviour
        self.brain = EchoBrain()
        self.sleep_level = 0
        self.weights = b""
        """Shared by others."""
        self.avoided: tuple[str, ...] = ()
        self.checkpoint = ""

    def send(self, message: Message) -> None:
        self.stream.send(msgspec.msgpack.encode(message), deadline_s=DEADLINE_S)

    def fail(self, reason: str, *, is_user_error: bool = False, setting: WrongSetting | None = None) -> NoReturn:
        """As the real one does: stay until the client has heard it."""
        self.send(EngineFailed(reason, is_user_error, setting))
        with contextlib.suppress(PeerDiedError):
            while self.stream.wait(DEADLINE_S):
                self.stream.poll()
        sys.exit(1)

    def start(self) -> None:
        while not (frames := self.stream.poll()):
            assert self.stream.wait(DEADLINE_S)
        begin = msgspec.msgpack.decode(frames[0], type=Begin)
        config, self.weights = begin.config, begin.weights
        self.send(StartProgress(0, "loading", 1, 2))
        if self.behaviour == "wrong-setting":
            self.fail("what str() gives", is_user_error=True, setting=WrongSetting("block_size", 7, "16 or 32"))
        if self.behaviour == "wrong-checkpoint":
            self.fail("there is no config.json", is_user_error=True)
        if self.behaviour == "broken-worker":
            self.fail("rank 1 on here: RuntimeError: boom")
        if self.behaviour == "dies-at-start":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "hangs-at-start":
            time.sleep(DEADLINE_S)
        if self.behaviour.startswith("waits-for "):
            while not Path(self.behaviour.removeprefix("waits-for ")).exists():
                time.sleep(0.005)
        self.checkpoint = resolved(config.model.model)
        ready = EngineReady(MAX_MODEL_LEN, 10, config.cache.block_size, 1, "cpu", "float32", checkpoint=self.checkpoint)
        self.send(ready)

    def serve(self) -> None:
        decoder = msgspec.msgpack.Decoder(ClientMessage)
        while True:
            if (self.sleep_level or not self.brain.has_work()) and not self.stream.wait(SIGN_OF_LIFE_S):
                self.send_stats()
            for frame in self.stream.poll():
                message = decoder.decode(frame)
                if isinstance(message, Submit):
                    if self.behaviour == "dies-when-asked":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if self.behaviour.startswith("when-asked-waits-for "):
                        while not Path(self.behaviour.removeprefix("when-asked-waits-for ")).exists():
                            time.sleep(0.005)
                    self.brain.submit(message)
                elif isinstance(message, Cancel):
                    self.brain.cancel(message.request_ids)
                elif isinstance(message, MaintenanceOrder):
                    self.maintain(message)
                elif isinstance(message, Resize):
                    self.resize(message)
                elif isinstance(message, CancelResize):
                    self.send(ResizeEnded(message.number, "cancelled"))
                elif isinstance(message, AvoidNodes):
                    self.avoided = message.nodes
                    self.send_stats()
                elif isinstance(message, ShareWeights):
                    self.share_weights(message.number)
                elif self.behaviour != "ignores-shutdown":
                    return
            if self.brain.has_work() and not self.sleep_level:
                self.step()

    def share_weights(self, number: int) -> None:
        """They tell its own pid, and those of who has shared them with it."""
        before = decode_shared(self.weights).kind.versions if self.weights else ()
        kind = WeightsKind(b"", "float32", 1, 1, True, (str(os.getpid()), *before))
        self.send(WeightsShared(number, encode_shared(SharedWeights(kind, ()))))

    def send_stats(self) -> None:
        maintenance = MaintenanceStats("asleep", self.sleep_level) if self.sleep_level else None
        self.send(msgspec.structs.replace(self.brain.stats(), maintenance=maintenance, avoided=self.avoided))

    def maintain(self, order: MaintenanceOrder) -> None:
        if self.behaviour == "dies-in-maintenance":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "refuses-maintenance":
            self.send(Maintained("it is another model", is_user_error=True))
            return
        if not isinstance(order, Sleep):
            self.weights = order.weights
        if not isinstance(order, Reload):
            self.sleep_level = order.level if isinstance(order, Sleep) else 0
        self.send_stats()
        asked = None if isinstance(order, Sleep) else order.model
        before, self.checkpoint = self.checkpoint, self.checkpoint if asked is None else resolved(asked)
        is_other = self.checkpoint != before
        has_new_weights = is_other or isinstance(order, Reload)
        self.send(Maintained(has_new_weights=has_new_weights, model=self.checkpoint if is_other else None))

    def resize(self, asked: Resize) -> None:
        """What comes of it depends on the larger of the sizes that are asked for."""
        number, size = asked.number, max(asked.data_parallel_size, asked.tensor_parallel_size)
        if size == REFUSED:
            self.send(
                ResizeEnded(number, "refused", "no", WrongSetting("data_parallel_size", size, "there are 2 cores"))
            )
            return
        self.send(ResizeBegun(number))
        self.send(StartProgress(1, "loading", 3, 4))
        if size == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        elif size == FAILS:
            self.send(ResizeEnded(number, "failed", "rank 2 did not start: killed"))
        elif size != NEVER_READY:
            size_now = (asked.data_parallel_size, asked.tensor_parallel_size)
            ready = EngineReady(MAX_MODEL_LEN, 10, 16, size_now[0] * size_now[1], "cpu", "float32", *size_now)
            self.send(ResizeEnded(number, "done", ready=ready))

    def step(self) -> None:
        batch = self.brain.step()
        if self.brain.num_steps == 5 and self.behaviour == "fails-in-step-5":
            self.fail("step 5: rank 0 died")
        if self.behaviour == f"dies-in-step-{self.brain.num_steps}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "dies-of-a-poison" and any(map(is_poison, self.brain.running.values())):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.brain.num_steps == 5 and self.behaviour == "stops-in-step-5":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.brain.num_steps == 5 and self.behaviour == "hangs-in-step-5":
            time.sleep(DEADLINE_S)
        if self.behaviour == "takes-long-steps":
            time.sleep(LONG_STEP_S)
        if self.behaviour == "is-paced":
            time.sleep(PACE_S)
        assert batch is not None
        self.send(batch)
        if batch.finished:
            self.send_stats()


def is_poison(request: Submit) -> bool:
    return as_ints(request.prompt_token_ids)[0] == POISON


def behaviour_now(told: str) -> str:
    found = re.fullmatch(r"(.+):(.+)", told)
    if found is None:
        return told
    starts, behaviours = Path(found[1]), found[2].split(",")
    with starts.open("a+b") as counted:
        counted.write(b".")
        counted.flush()
        return behaviours[min(counted.tell(), len(behaviours)) - 1]


def main() -> None:
    behaviour, descriptor, server_pid = behaviour_now(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(server_pid)
    with Stream(descriptor, Party.of("the server", server_pid)) as stream:
        engine = FakeEngine(stream, behaviour)
        engine.start()
        engine.serve()


if __name__ == "__main__":
    main()

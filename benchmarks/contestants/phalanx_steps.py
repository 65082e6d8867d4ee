"""Phalanx's agreement on a step of all replicas; a contestant of coordination.py.

"turn": plan, encode, ring, decode, answer, commit, one after the other. "message": only what lies between the two.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from functools import partial

from contest import BLOCK_SIZE, num_workers, serve
from phalanx_queue import DEADLINE_S, work

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import Call, Done, Ping, Reply, ReplyBody, Step, StepResult, WorkerMessage
from phalanx.transport.queue import MessageQueue

PROMPT_LEN = 128
MAX_MODEL_LEN = 8192
VOCAB_SIZE = 32_000
WARM_UP_STEPS = 20


class QueueExecutor:
    """Sends steps to workers and collects an answer for each replica."""

    def __init__(self, queue: MessageQueue[Call, WorkerMessage], num_replicas: int) -> None:
        self.last: Step | None = None
        self._queue = queue
        self._ranks = tuple(range(num_replicas))

    def step(self, step: Step) -> Answers:
        self.last = step
        self._queue.put(Call(step.number, step, self._ranks), deadline_s=DEADLINE_S)
        return Answers(self._queue, len(self._ranks))


class Answers:
    """What the replicas make of a step. With one step under way, all that comes belongs to it."""

    def __init__(self, queue: MessageQueue[Call, WorkerMessage], num_replicas: int) -> None:
        self._queue = queue
        self._num_replicas = num_replicas

    def result(self) -> tuple[StepResult, ...]:
        results: dict[int, StepResult] = {}
        while len(results) < self._num_replicas:
            found = self._queue.get(timeout_s=DEADLINE_S)
            assert found is not None
            rank, message, _ = found
            assert isinstance(message, Reply)
            assert isinstance(message.body, StepResult)
            results[rank] = message.body
        return tuple(results[rank] for rank in range(self._num_replicas))


def answer(replica: int, call: Call) -> ReplyBody:
    """A token for each sample of a step; to any other call next to nothing."""
    if not isinstance(call.body, Step):
        return Done()
    plan = call.body.plans[replica]
    return StepResult(plan.step, ints([1] * plan.shape.num_samples))


def ping(queue: MessageQueue[Call, WorkerMessage], num_replicas: int) -> None:
    queue.put(Call(0, Ping(), tuple(range(num_replicas))), deadline_s=DEADLINE_S)
    for _ in range(num_replicas):
        assert queue.get(timeout_s=DEADLINE_S) is not None


def make_brain(executor: QueueExecutor, num_replicas: int, num_running: int) -> Brain:
    """With so many requests of each replica that decode. One step at a time: nothing is hidden behind another."""
    config = Config.build(
        model="simulated",
        block_size=BLOCK_SIZE,
        max_num_seqs=num_running,
        max_num_batched_tokens=max(2048, 2 * num_running),
        async_scheduling=False,
        data_parallel_size=num_replicas,
        enable_expert_parallel=num_replicas > 1,
    )
    num_blocks = num_running * (MAX_MODEL_LEN // BLOCK_SIZE + 1)
    brain = Brain(config, executor, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, eos_token_ids=())
    dice = random.Random(0)
    for request_id in range(num_replicas * num_running):
        length = PROMPT_LEN + dice.randrange(BLOCK_SIZE)
        prompt = ints([dice.randrange(VOCAB_SIZE) for _ in range(length)])
        brain.submit(Submit(request_id, prompt, SamplingParams(max_tokens=None)))
    while any(replica.num_waiting for replica in brain.stats().replicas):
        brain.step()
    for _ in range(WARM_UP_STEPS):
        brain.step()
    return brain


def main() -> None:
    num_replicas, num_running = num_workers(), int(sys.argv[3])
    names = [f"replica {replica}" for replica in range(num_replicas)]
    queue: MessageQueue[Call, WorkerMessage] = MessageQueue(names, command_type=Call, reply_type=WorkerMessage)
    with queue:
        spawn = multiprocessing.get_context("spawn")
        workers = [
            spawn.Process(target=work, args=(queue.handle(replica), partial(answer, replica)), daemon=True)
            for replica in range(num_replicas)
        ]
        for worker in workers:
            worker.start()
        ping(queue, num_replicas)  # returns when all have attached
        executor = QueueExecutor(queue, num_replicas)
        brain = make_brain(executor, num_replicas, num_running)
        assert executor.last is not None
        message = partial(_send, executor, executor.last)
        serve({"turn": partial(_turn, brain), "message": message}, [worker.pid for worker in workers if worker.pid])
    for worker in workers:
        worker.join(DEADLINE_S)


def _turn(brain: Brain) -> None:
    assert brain.step() is not None


def _send(executor: QueueExecutor, step: Step) -> None:
    executor.step(step).result()


if __name__ == "__main__":
    main()

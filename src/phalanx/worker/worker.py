"""One rank: takes calls, answers them in order.

The same object serves a process of its own (process.py) and the brain's process (executor/inline.py).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from phalanx.collectives.agreement import agreement
from phalanx.collectives.join import join
from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.journaled_exchange import JournaledExchange
from phalanx.collectives.stream_writes import StreamWrites
from phalanx.errors import ConfigError, DriverError
from phalanx.ledger.journal import GroupJournal, Journal, NoJournal
from phalanx.ledger.pulse import Pulse
from phalanx.ledger.record import PlanSize
from phalanx.ledger.stacks import may_offer, offer_stacks
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigests
from phalanx.memory.arena import Arena
from phalanx.memory.cuda_driver import CudaDriver
from phalanx.memory.held import encode_held
from phalanx.memory.sizing import LINE_BYTES, cache_bytes
from phalanx.models.model import CausalLM, WeightMemory, load_model
from phalanx.moe.dispatcher import AllGatherReduceScatter, AllToAll, Dispatcher
from phalanx.protocol import (
    AllocateCache,
    Allocated,
    Call,
    CallMethod,
    CommandBody,
    Done,
    ExpertLoads,
    LayerLoad,
    Loaded,
    Maintaining,
    Measured,
    MeasureExperts,
    MeasureMemory,
    MoveExperts,
    Progress,
    Reply,
    ReplyBody,
    Step,
    StepIssued,
    Stop,
    as_ints,
)
from phalanx.topology.grid import Grid
from phalanx.topology.sharding import ExpertShare
from phalanx.transport.shared_memory import SharedSegment
from phalanx.worker.checkpoint import check_same_checkpoint, find_checkpoint
from phalanx.worker.cuda_capture import CudaCapture, WaitsForGpuError
from phalanx.worker.decode_graphs import DecodeGraphs
from phalanx.worker.error_text import message_of
from phalanx.worker.graph_sizes import can_have_graphs, graph_sizes
from phalanx.worker.kv_cache import allocate_cache, block_bytes
from phalanx.worker.maintenance import RankMaintenance
from phalanx.worker.methods import Methods, load_extension, remote_method
from phalanx.worker.profile import compute_little, graph_bytes, peak_activation_bytes
from phalanx.worker.runner import InFlight, Runner
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.stage import Stage

if TYPE_CHECKING:
    from phalanx.collectives.exchange import Exchange
    from phalanx.collectives.group import Group
    from phalanx.collectives.spec import GroupSpec

REPORT_INTERVAL_S = 0.1
"""Progress within a phase is told this often: a model has hundreds of tensors, and many load in no time."""

SABOTEUR = "phalanx.testing.saboteur:Saboteur"
"""The extension that carries out fault plans, imported only where chaos is allowed."""

MAX_STEPS_IN_FLIGHT = 2
"""Steps launched on a GPU before the oldest is waited for."""

log = logging.getLogger("phalanx.worker")


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank runs, and what it was doing before it was asked."""

    rank: int
    node: str
    pid: int
    device: str
    phase: str


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens each of a rank's experts of one layer has had, since the start or since they last moved."""

    experts: tuple[int, ...]
    """Which they are. One may be there twice."""
    num_tokens: list[int]


class Worker:
    """A rank from its birth to Stop. Not thread-safe."""

    def __init__(self, spec: WorkerSpec, report: Callable[[Progress], None], exchange: Exchange | None = None) -> None:
        """`exchange` is None in a world of one."""
        self.spec = spec
        self._replica = Grid.of(spec.config.parallel).coordinates(spec.rank).replica
        self._board = SharedSegment.attach(spec.board) if spec.board is not None else None
        self._digests = self._step_digests()
        self._segment = SharedSegment.attach(spec.journal) if spec.journal is not None else None
        self._journal = Journal(self._segment.buf, spec.epoch) if self._segment is not None else None
        self._pulse = self._offer_journal() if self._journal is not None else None
        self.phase = "starting"
        self.call_id = 0
        self.stopped = False
        self.num_stale = 0
        """Plans of another epoch than this worker's: dropped (invariant 3)."""
        self._report = report
        self._exchange = exchange
        if exchange is not None and self._journal is not None:
            self._exchange = JournaledExchange(exchange, self._journal)
        self._reported_at = 0.0
        self._device = _device(spec)
        if self._journal is not None and self._segment is not None and self._device.type == "cuda":
            _follow_device(self._journal, self._segment, self._device)
        self._checkpoint = find_checkpoint(spec, self._enter)
        self._arena = _arena(spec, self._device)
        self._groups: dict[str, Group] = {}
        self._stage: Stage | None = None
        self._model: CausalLM | None = None
        self._runner: Runner | None = None
        self._maintenance: RankMaintenance | None = None
        self._has_graphs = can_have_graphs(spec.config, self._device.type)
        self._methods = Methods(self)
        # Without async scheduling no plan comes before the step under way is answered.
        self._most_in_flight = MAX_STEPS_IN_FLIGHT if spec.config.scheduler.async_scheduling else 1
        self._flights: deque[tuple[Call, InFlight, int, bytes]] = deque()
        self._replies: deque[Reply | StepIssued] = deque()

    def load(self) -> Loaded:
        """Join the groups and load this rank's weights. Blocks for seconds to minutes, and says where it stands."""
        self._enter("joining")
        check_same_checkpoint(self._checkpoint, self.spec, self._exchange)
        # First those that need no exchange: nobody takes in meanwhile what comes over it.
        for group in sorted(self.spec.groups, key=lambda group: group.spans_hosts):
            self._groups[group.name] = self._join(group)
        config = self.spec.config
        grid = Grid.of(config.parallel)
        self._stage = Stage.of(grid, self.spec.rank, self._groups)
        self._enter("loading")
        self._model = load_model(
            self._checkpoint,
            dtype=getattr(torch, config.model.dtype),
            device=self._device,
            group=self._stage.shared,
            memory=WeightMemory(
                self._arena.allocate,
                release=self._arena.release if config.model.pack_weights else None,
                filled={name: region.size_bytes for name, region in self._arena.held.items()},
                shares_packed=self.spec.keeps_memory and not grid.moves_experts,
                expect=self._arena.begin_part,
            ),
            on_progress=lambda done, total: self._enter("loading", done, total),
            layers=grid.stage_layers(self._checkpoint.num_layers, grid.coordinates(self.spec.rank).stage),
            experts=self._experts(grid),
            dequantise=config.model.dequantise_weights or self._device.type == "cpu",
        )
        for extension in (config.executor.worker_extension_cls, SABOTEUR if config.executor.allow_chaos else None):
            if extension is not None:
                self._methods.extend(extension, load_extension(extension, self))
        return Loaded(
            weight_bytes=self._model.weight_bytes,
            device=_device_name(self._device),
            dtype=str(self._model.dtype).removeprefix("torch."),
        )

    def _join(self, spec: GroupSpec) -> Group:
        """Join a group. Its collectives are then noted if there is where, and agreed upon if that is asked for."""
        index = 1 + self.spec.groups.index(spec)
        with ExitStack() as undo:
            with self._journal.joining(index) if self._journal is not None and spec.size > 1 else nullcontext():
                group = join(spec, self.spec.rank, self._device, self._exchange)
                undo.callback(group.close)
                agreed = agreement(spec, self.spec.rank, self._exchange)
            undo.pop_all()
        if spec.size == 1 or (self._journal is None and self._digests is None):
            return group
        journal = GroupJournal(self._journal, index) if self._journal is not None else NoJournal()
        return JournaledGroup(group, journal, index, self._digests, agreed)

    def _step_digests(self) -> StepDigests | None:
        """None if nobody compares what this rank issues."""
        groups = self.spec.groups
        if self.spec.config.executor.collective_guard == "off" or all(group.size == 1 for group in groups):
            return None
        memory = self._board.buf if self._board is not None else memoryview(bytearray(BOARD_BYTES))
        return StepDigests(memory, len(groups))

    def _offer_journal(self) -> Pulse:
        """Let those who read the journal ask whether this rank's interpreter runs, and where it is."""
        assert self._journal is not None and self._segment is not None
        if threading.current_thread() is not threading.main_thread():
            return Pulse(self._segment.buf)
        journal = self._journal
        journal.offer_stacks(offer_stacks())
        return Pulse(self._segment.buf, lambda: None if may_offer() else journal.offer_stacks(0))

    def _experts(self, grid: Grid) -> tuple[ExpertShare, Dispatcher] | None:
        """This rank's share of every layer's experts and the way to the others; None if it has a part of each."""
        if grid.all2all_backend is None:
            return None
        assert self._stage is not None
        rank, num_redundant = self.spec.rank, self.spec.config.parallel.num_redundant_experts
        share = ExpertShare(grid.expert_rank(rank), grid.expert_parallel_size, num_redundant, grid.moves_experts)
        _, stage, tp_rank = grid.coordinates(rank)
        if grid.all2all_backend == "alltoall":
            num_physical = self._checkpoint.num_experts + num_redundant
            return share, AllToAll(self._groups[grid.experts(stage)], self._stage.shared, num_physical)
        return share, AllGatherReduceScatter(self._groups[grid.peers(stage, tp_rank)], self._stage.shared)

    @property
    def phase(self) -> str:
        """What the rank does."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        if self._journal is not None:
            self._journal.enter(phase)

    @property
    def model(self) -> CausalLM:
        """This rank's shard, for worker extensions: there from the end of `load`."""
        assert self._model is not None
        return self._model

    @property
    def groups(self) -> Mapping[str, Group]:
        """The process groups of this rank by name, for worker extensions."""
        return self._groups

    @remote_method
    def whereabouts(self) -> Whereabouts:
        """Where this rank runs."""
        return Whereabouts(
            rank=self.spec.rank,
            node=os.uname().nodename,
            pid=os.getpid(),
            device=_device_name(self._device),
            phase=self.phase,
        )

    @remote_method
    def expert_load(self) -> dict[str, ExpertLoad]:
        """Of each layer's experts, by the name of their module; none where every rank has a part of each expert."""
        return {
            name: ExpertLoad(experts=experts.mine, num_tokens=experts.load.counts())
            for name, experts in self.model.experts.items()
        }

    @remote_method
    def methods_that_change_weights(self) -> list[str]:
        """Names of the extension's methods after which the prefix cache is of no use."""
        return self._methods.changing_weights()

    @remote_method
    def declares(self, method: str) -> bool:
        """Whether there is a method of this name that may be called."""
        return method in self._methods

    def accept(self, call: Call) -> None:
        """Carry out a call, or on a GPU set a step going. What there is to answer comes from `next_reply`."""
        self.call_id = call.call_id
        if isinstance(call.body, Step | MoveExperts) and call.body.epoch != self.spec.epoch:
            self.num_stale += 1
            return
        if isinstance(call.body, Step):
            assert self._runner is not None, "a step before AllocateCache"
            self.phase = "stepping"
            noted = self._begin_step(call.body)
            flight = self._runner.launch(call.body)
            self._flights.append((call, flight, noted, self._leave_step(call)))
            return
        while self._flights:  # replies keep the order of the calls
            self._finish_oldest()
        self._answer(call, self._carry_out(call.body))

    def next_reply(self, *, block: bool) -> Reply | StepIssued | None:
        """The oldest reply that is ready. With `block`, wait for the device if a step is still under way there."""
        if self._flights and (block or self._flights[0][1].is_ready() or len(self._flights) > self._most_in_flight):
            self._finish_oldest()
        return self._replies.popleft() if self._replies else None

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way on the device, or a reply waits to be fetched."""
        return bool(self._flights or self._replies)

    @property
    def has_reply(self) -> bool:
        """Whether `next_reply` need not wait for the device to give one."""
        return bool(self._replies or (self._flights and self._flights[0][1].is_ready()))

    @property
    def is_full(self) -> bool:
        """Whether the device has enough to do: another step is not to be launched before the oldest has ended."""
        return len(self._flights) >= self._most_in_flight

    def close(self) -> None:
        self.phase = "leaving"
        with ExitStack() as leaving:
            leaving.callback(self._arena.close)
            for segment in (self._segment, self._board):
                if segment is not None:
                    leaving.callback(segment.close)
            if self._pulse is not None:
                leaving.callback(self._pulse.close)
            for group in self._groups.values():
                leaving.callback(group.close)
            if self._runner is not None:
                leaving.callback(self._runner.close)
            if self._maintenance is not None:
                leaving.callback(self._maintenance.close)
        self._groups.clear()

    def _enter(self, phase: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if phase == self.phase and done < total and now < self._reported_at + REPORT_INTERVAL_S:
            return
        self.phase, self._reported_at = phase, now
        self._report(Progress(phase, done, total))

    def _finish_oldest(self) -> None:
        assert self._runner is not None
        call, flight, noted, issued = self._flights.popleft()
        self._answer(call, self._runner.finish(flight), issued)
        if self._journal is not None:
            self._journal.done(noted)
        if not self._flights:
            self.phase = "idle"

    def _begin_step(self, step: Step) -> int:
        """Note the decision that this rank follows from now on; returns the number of its record."""
        number = step.number + 1  # 0 is no step
        if self._digests is not None:
            self._digests.begin(number)
        if self._journal is None:
            return 0
        num_tokens = sum(plan.shape.num_tokens for plan in step.plans)
        shape = step.plans[self._replica].shape
        size = PlanSize(max(shape.num_tokens, 1), shape.num_rows, shape.num_samples)  # without a token it computes one
        return self._journal.begin_step(number, zlib.crc32(msgspec.msgpack.encode(step)), num_tokens, size)

    def _leave_step(self, call: Call) -> bytes:
        """What was issued in it, for the answer. A rank that does not answer, nor has a board, says it at once."""
        if self._journal is not None:
            self._journal.leave_step()
        if self._digests is None:
            return b""
        issued = self._digests.leave()
        if self._board is None and self.spec.rank not in call.reply_ranks:
            self._replies.append(StepIssued(issued))
        return issued

    def _answer(self, call: Call, body: ReplyBody, issued: bytes = b"") -> None:
        if self.spec.rank in call.reply_ranks:
            self._replies.append(Reply(call.call_id, body, issued))

    def _carry_out(self, body: CommandBody) -> ReplyBody:
        if isinstance(body, MeasureMemory):
            return self._measure(body.sizes_cache)
        if isinstance(body, AllocateCache):
            return self._allocate_cache(body.num_blocks, body.max_model_len)
        if isinstance(body, CallMethod):
            return self._call_method(body)
        if isinstance(body, MeasureExperts):
            return self._measure_experts()
        if isinstance(body, Maintaining):
            assert self._maintenance is not None, "before AllocateCache"
            return self._maintenance.carry_out(body)
        if isinstance(body, MoveExperts):
            self._move_experts(body)
        elif isinstance(body, Stop):
            self.stopped = True
        return Done()

    def _call_method(self, call: CallMethod) -> ReplyBody:
        """What a user's code does is judged by its deadline alone."""
        journal = self._journal
        if journal is None:
            return self._methods.call(call)
        journal.enter("calling a method")
        try:
            return self._methods.call(call)
        finally:
            journal.enter(self.phase)

    def _measure(self, sizes_cache: bool) -> Measured:
        assert self._model is not None
        self._enter("sizing")
        model, config = self._model, self.spec.config
        bytes_of_block = block_bytes(model.cache_layers, config.cache.block_size, model.dtype)
        longest = config.model.max_model_len or self._checkpoint.max_model_len
        if sizes_cache:
            found_bytes = self._measure_cache(longest, bytes_of_block)
        else:
            found_bytes = 0
            num_replicas = config.parallel.data_parallel_size
            compute_little(model, config.scheduler, config.cache.block_size, num_replicas)
            self._measure_graphs(longest, makes_some=False)
        for experts in model.experts.values():
            experts.load.reset()  # what it was measured with were no tokens of anybody
        return Measured(cache_bytes=found_bytes, block_bytes=bytes_of_block, num_padding=self._num_padding_blocks)

    def _measure_cache(self, max_model_len: int, bytes_of_block: int) -> int:
        """Bytes that there are for the KV cache, beside all that steps take."""
        assert self._model is not None
        config = self.spec.config
        peak_bytes = peak_activation_bytes(
            self._model, config.scheduler, config.cache.block_size, config.parallel.data_parallel_size
        )
        num_behind = config.healing.standby if self.spec.keeps_memory else 0
        peak_bytes += (1 + num_behind) * self._measure_graphs(max_model_len, makes_some=True)
        blocks_per_request = -(-max_model_len // config.cache.block_size)
        return cache_bytes(
            config.cache,
            self._device,
            useful_bytes=config.scheduler.max_num_seqs * blocks_per_request * bytes_of_block,
            peak_activation_bytes=peak_bytes + num_behind * LINE_BYTES,
            ranks_on_host=self.spec.ranks_on_host,
        )

    def _measure_graphs(self, max_model_len: int, *, makes_some: bool) -> int:
        """Bytes that graphs take; 0 unless it `makes_some`, or if, as is found out, the model cannot be captured."""
        assert self._model is not None
        if not self._has_graphs:
            return 0
        new_graphs = partial(self._new_graphs, max_model_len)
        try:
            return graph_bytes(self._model, new_graphs, self.spec.config.cache.block_size, makes_some=makes_some)
        except WaitsForGpuError as error:
            self._has_graphs = False
            log.warning("decode steps are not captured in CUDA graphs, as this model waits for the GPU: %s", error)
            return 0
        except RuntimeError as error:  # torch's; what a peer does has errors of ours
            raise _not_captured("a step", error) from error

    def _new_graphs(self, max_model_len: int, null_block: int) -> DecodeGraphs:
        assert self._model is not None
        config = self.spec.config
        return DecodeGraphs(
            self._model,
            CudaCapture(self._device),
            [group for group in self._groups.values() if isinstance(group, JournaledGroup)],
            sizes=graph_sizes(config.scheduler.max_num_seqs),
            max_model_len=max_model_len,
            block_size=config.cache.block_size,
            null_block=null_block,
            num_replicas=config.parallel.data_parallel_size,
        )

    @property
    def _num_padding_blocks(self) -> int:
        """Blocks of KV cache that no request gets: one where rows of padding can occur."""
        return int(self._has_graphs or self.spec.config.parallel.data_parallel_size > 1 or self._warms_up)

    @property
    def _warms_up(self) -> bool:
        """Whether the first step is to take no longer than others: it may come after a fault, when all wait for it.

        Not on a CPU where an extension may write to the weights, which are packed: a line that stands ready looks at
        them in its first step, and is to do so when no other one computes.
        """
        config = self.spec.config
        looks_later = self._device.type == "cpu" and config.executor.worker_extension_cls is not None
        return config.healing.standby > 0 and not looks_later

    def _capture(self, max_model_len: int, null_block: int) -> DecodeGraphs:
        graphs = self._new_graphs(max_model_len, null_block)
        for i, size in enumerate(reversed(graphs.sizes)):
            self._enter("capturing", i, len(graphs.sizes))
            try:
                graphs.capture(size)
            except RuntimeError as error:  # torch's; what a peer does has errors of ours
                raise _not_captured(f"a step of {size} rows", error) from error
        torch.cuda.empty_cache()  # what steps without a graph took
        return graphs

    def _measure_experts(self) -> ExpertLoads:
        loads = [(name, experts.num_tokens()) for name, experts in self.model.experts.items()]
        return ExpertLoads(tuple(LayerLoad(name, np.asarray(counts, np.int64).tobytes()) for name, counts in loads))

    @torch.inference_mode()
    def _move_experts(self, move: MoveExperts) -> None:
        """Nothing to do if the layer is on another stage."""
        experts = self.model.experts.get(move.layer)
        if experts is None:
            return
        self._enter("moving experts")
        assert move.number == experts.num_moves + 1, f"placement {move.number} comes after {experts.num_moves}"
        grid = Grid.of(self.spec.config.parallel)
        group = self._groups[grid.experts(grid.coordinates(self.spec.rank).stage)]
        experts.move(as_ints(move.placement).tolist(), group)
        self.phase = "idle"

    def _allocate_cache(self, num_blocks: int, max_model_len: int) -> Allocated:
        assert self._model is not None and self._stage is not None
        self._enter("allocating")
        config, model = self.spec.config, self._model
        grid = Grid.of(config.parallel)
        weights = frozenset(self._arena.regions)
        block_size, num_all = config.cache.block_size, num_blocks + self._num_padding_blocks
        self._arena.begin_part(num_all * block_bytes(model.cache_layers, block_size, model.dtype))
        model.bind_cache(allocate_cache(model.cache_layers, num_all, block_size, model.dtype, self._arena.allocate))
        graphs = self._capture(max_model_len, null_block=num_blocks) if self._has_graphs else None
        self._runner = Runner(
            model,
            self._stage,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.cache.block_size,
            num_blocks=num_blocks,
            device=self._device,
            replica=self._replica,
            graphs=graphs,
        )
        self._maintenance = self._new_maintenance([name for name in self._arena.regions if name not in weights])
        if self._warms_up:
            self._runner.warm_up(config.parallel.data_parallel_size)
        for experts in model.experts.values():
            experts.load.reset()  # what was computed for graphs, and to warm up, were no tokens of anybody
        self._enter("idle")
        if not self.spec.keeps_memory or not self._arena.can_be_held:
            return Allocated()
        without = weights if grid.moves_experts else frozenset()
        return Allocated(encode_held(self._arena.describe(lambda name: name not in without)))

    def _new_maintenance(self, cache: Sequence[str]) -> RankMaintenance:
        def enter(phase: str) -> None:
            self.phase = phase

        return RankMaintenance(
            self.model.weights,
            self._arena,
            cache,
            ranks_on_host=self.spec.ranks_on_host,
            enter=enter,
        )


def _arena(spec: WorkerSpec, device: torch.device) -> Arena:
    """For weights and KV cache, such as others can hold if somebody is going to."""
    driver = _sharing_driver(spec, device) if spec.keeps_memory and device.type == "cuda" else None
    return Arena(f"memory of rank {spec.rank}", device, spec.held, driver=driver)


def _sharing_driver(spec: WorkerSpec, device: torch.device) -> CudaDriver | None:
    """None where a GPU's memory ends with the process. Raises ConfigError if a standby line was to have it."""
    assert device.index is not None
    try:
        driver = CudaDriver(device.index)
        why_not = None if driver.can_share else "this GPU's driver has no memory with descriptors"
    except DriverError as error:
        why_not = str(error)
    if why_not is None:
        return driver
    if spec.config.healing.standby:
        raise ConfigError("standby", spec.config.healing.standby, f"0 here: {why_not}, which two lines could share")
    if spec.local_rank == 0:
        log.warning("after a fault, weights are read again and requests computed again: %s", why_not)
    return None


def _device(spec: WorkerSpec) -> torch.device:
    if spec.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", spec.local_rank)
    torch.cuda.set_device(device)
    return device


def _follow_device(journal: Journal, segment: SharedSegment, device: torch.device) -> None:
    """Have the GPU write into the journal how far it is."""
    try:
        journal.follow_device(StreamWrites(segment.buf[: mmap.PAGESIZE], device).write)
    except (OSError, RuntimeError) as error:
        log.warning("the ledger cannot tell what a GPU was given from what it has done: %s", error)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _not_captured(what: str, error: RuntimeError) -> ConfigError:
    return ConfigError("cuda_graphs", True, f"False would do, as {what} could not be captured: {message_of(error)}")

"""One rank: takes calls, answers them in order.

The same object serves a process of its own (process.py) and the brain's process (executor/inline.py).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import torch

from phalanx.collectives.agreement import agreement
from phalanx.collectives.join import join
from phalanx.collectives.journaled import JournaledGroup
from phalanx.errors import DeviceRefusedError
from phalanx.memory.held import encode_held
from phalanx.models.model import CausalLM, WeightMemory, load_model
from phalanx.moe.dispatcher import AllGatherReduceScatter, AllToAll, Dispatcher
from phalanx.protocol.columns import as_ints
from phalanx.protocol.worker import (
    AllocateCache,
    Allocated,
    BlockCopies,
    Call,
    CallMethod,
    CommandBody,
    CopyBlocks,
    Done,
    ExpertLoads,
    LayerLoad,
    Loaded,
    Maintaining,
    MeasureExperts,
    MeasureMemory,
    MoveExperts,
    Progress,
    Reply,
    ReplyBody,
    Step,
    StepIssued,
    Stop,
)
from phalanx.topology.grid import Grid
from phalanx.topology.sharding import ExpertShare
from phalanx.worker.checkpoint import check_same_checkpoint, find_checkpoint
from phalanx.worker.kv_cache import allocate_cache
from phalanx.worker.maintenance import RankMaintenance
from phalanx.worker.methods import Methods, load_extension, remote_method
from phalanx.worker.notes import RankNotes
from phalanx.worker.preparation import Preparation
from phalanx.worker.rank_memory import new_arena
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


class _Launched(NamedTuple):
    """A step that has been set going."""

    call: Call
    flight: InFlight
    noted: int
    """Its number in the journal."""
    issued: bytes
    """What was issued in it, for the answer."""


class Worker:
    """A rank from its birth to Stop. Not thread-safe."""

    def __init__(self, spec: WorkerSpec, report: Callable[[Progress], None], exchange: Exchange | None = None) -> None:
        """`exchange` is None in a world of one."""
        self.spec = spec
        self._replica = Grid.of(spec.config.parallel).coordinates(spec.rank).replica
        self._notes = RankNotes(spec)
        self.phase = "starting"
        self.stopped = False
        self._report = report
        self._exchange = self._notes.of_exchange(exchange) if exchange is not None else None
        self._reported_at = 0.0
        self._device = _device(spec)
        self._notes.follow_device(self._device)
        self._checkpoint = find_checkpoint(spec, self._enter)
        self._arena = new_arena(spec, self._device)
        self._groups: dict[str, Group] = {}
        self._stage: Stage | None = None
        self._model: CausalLM | None = None
        self._preparation: Preparation | None = None
        self._runner: Runner | None = None
        self._maintenance: RankMaintenance | None = None
        self._cache: frozenset[str] = frozenset()
        """Names of the tensors that are the KV cache's."""
        self._methods = Methods(self)
        # Without async scheduling no plan comes before the step under way is answered.
        self._most_in_flight = MAX_STEPS_IN_FLIGHT if spec.config.scheduler.async_scheduling else 1
        self._flights: deque[_Launched] = deque()
        self._replies: deque[Reply | StepIssued] = deque()

    def load(self) -> Loaded:
        """Join the groups and load this rank's weights. Blocks for seconds to minutes, and says where it stands."""
        self._enter("joining")
        check_same_checkpoint(self._checkpoint, self.spec, self._exchange)
        # First those that need no exchange: nobody takes in meanwhile what comes over it, and NCCL's files lose their
        # names before a group connects whose files need theirs.
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
        noted = [group for group in self._groups.values() if isinstance(group, JournaledGroup)]
        self._preparation = Preparation(self.spec, self._device, self._model, noted, self._enter)
        for extension in (config.executor.worker_extension_cls, SABOTEUR if config.executor.allow_chaos else None):
            if extension is not None:
                self._methods.extend(extension, load_extension(extension, self))
        return Loaded(
            weight_bytes=self._model.weight_bytes,
            device=_device_name(self._device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            gives_back=self._arena.can_be_held,
        )

    def _join(self, spec: GroupSpec) -> Group:
        with ExitStack() as undo:
            with self._notes.joining(spec):
                group = join(spec, self.spec.rank, self._device, self._exchange)
                undo.callback(group.close)
                agreed = agreement(spec, self.spec.rank, self._exchange)
            undo.pop_all()
        return self._notes.of_group(group, spec, agreed)

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
        self._notes.enter(phase)

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
        if isinstance(call.body, Step | MoveExperts) and call.body.epoch != self.spec.epoch:
            return  # invariant 3
        if isinstance(call.body, Step):
            assert self._runner is not None, "a step before AllocateCache"
            self.phase = "stepping"
            noted = self._notes.begin_step(call.body)
            flight = self._runner.launch(call.body)
            self._flights.append(_Launched(call, flight, noted, self._leave_step(call)))
            return
        while self._flights:  # replies keep the order of the calls
            self._finish_oldest()
        self._answer(call, self._carry_out(call.body))

    def next_reply(self, *, block: bool) -> Reply | StepIssued | None:
        """The oldest reply that is ready. With `block`, wait for the device if a step is still under way there."""
        if self._flights and (block or self._flights[0].flight.is_ready() or len(self._flights) > self._most_in_flight):
            self._finish_oldest()
        return self._replies.popleft() if self._replies else None

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way on the device, or a reply waits to be fetched."""
        return bool(self._flights or self._replies)

    @property
    def has_reply(self) -> bool:
        """Whether `next_reply` need not wait for the device to give one."""
        return bool(self._replies or (self._flights and self._flights[0].flight.is_ready()))

    @property
    def is_full(self) -> bool:
        """Whether the device has enough to do: another step is not to be launched before the oldest has ended."""
        return len(self._flights) >= self._most_in_flight

    def close(self) -> None:
        """Leave groups and give memory back. Waits for nobody."""
        self.phase = "leaving"
        with ExitStack() as leaving:
            leaving.callback(self._arena.close)
            leaving.callback(self._notes.close)
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
        oldest = self._flights.popleft()
        self._answer(oldest.call, self._runner.finish(oldest.flight), oldest.issued)
        self._notes.end_step(oldest.noted)
        if not self._flights:
            self.phase = "idle"

    def _leave_step(self, call: Call) -> bytes:
        """What was issued in it, for the answer. A rank that does not answer, nor has a board, says it at once."""
        issued = self._notes.leave_step()
        if self._notes.must_be_told and self.spec.rank not in call.reply_ranks:
            self._replies.append(StepIssued(issued))
        return issued

    def _answer(self, call: Call, body: ReplyBody, issued: bytes = b"") -> None:
        if self.spec.rank in call.reply_ranks:
            self._replies.append(Reply(call.call_id, body, issued))

    def _carry_out(self, body: CommandBody) -> ReplyBody:
        if isinstance(body, MeasureMemory):
            assert self._preparation is not None, "before it is loaded"
            longest = self.spec.config.model.max_model_len or self._checkpoint.max_model_len
            return self._preparation.measure(longest, sizes_cache=body.sizes_cache)
        if isinstance(body, AllocateCache):
            return self._allocate_cache(body)
        if isinstance(body, CallMethod):
            return self._call_method(body)
        if isinstance(body, MeasureExperts):
            return self._measure_experts()
        if isinstance(body, Maintaining):
            assert self._maintenance is not None, "before AllocateCache"
            return self._maintenance.carry_out(body)
        if isinstance(body, MoveExperts):
            self._move_experts(body)
        elif isinstance(body, CopyBlocks):
            self._copy_blocks(body.copies[self._replica])
        elif isinstance(body, Stop):
            self.stopped = True
        return Done()

    def _copy_blocks(self, copies: BlockCopies) -> None:
        sources_N, targets_N = (
            torch.from_numpy(as_ints(blocks).astype(np.int64)).to(self._device)
            for blocks in (copies.sources, copies.targets)
        )
        self.model.copy_blocks(sources_N, targets_N)

    def _call_method(self, call: CallMethod) -> ReplyBody:
        """What a user's code does is judged by its deadline alone."""
        self._notes.enter("calling a method")
        try:
            return self._methods.call(call)
        finally:
            self._notes.enter(self.phase)

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

    def _allocate_cache(self, order: AllocateCache) -> Allocated:
        assert self._preparation is not None and self._stage is not None
        self._enter("allocating")
        config, model, preparation = self.spec.config, self.model, self._preparation
        weights = frozenset(self._arena.regions)
        block_size, num_all = config.cache.block_size, order.num_blocks + preparation.num_padding_blocks
        self._arena.begin_part(num_all * preparation.block_bytes)
        model.bind_cache(allocate_cache(model.cache_layers, num_all, block_size, model.dtype, self._arena.allocate))
        self._runner = Runner(
            model,
            self._stage,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=order.max_model_len,
            block_size=config.cache.block_size,
            num_blocks=order.num_blocks,
            device=self._device,
            replica=self._replica,
            graphs=preparation.capture(order.max_model_len, order.num_blocks, later=order.captures_later),
        )
        self._cache = frozenset(self._arena.regions) - weights
        self._maintenance = RankMaintenance(
            model.weights,
            self._arena,
            cache=[name for name in self._arena.regions if name in self._cache],
            rank=self.spec.rank,
            ranks_on_host=self.spec.ranks_on_host,
            enter=self._note_phase,
            tell=self._allocated,
        )
        if preparation.warms_up:
            self._runner.warm_up(config.parallel.data_parallel_size)
        for experts in model.experts.values():
            experts.load.reset()  # what was computed for graphs, and to warm up, were no tokens of anybody
        self._enter("idle")
        return self._allocated()

    def _allocated(self) -> Allocated:
        """What there is to hold by now."""
        if not self.spec.keeps_memory or not self._arena.can_be_held:
            return Allocated()
        moves_experts = Grid.of(self.spec.config.parallel).moves_experts
        without = frozenset(self.model.weights.names) if moves_experts else frozenset()
        held = self._arena.describe(lambda name: name not in without)
        return Allocated(encode_held(msgspec.structs.replace(held, cache=self._cache & held.regions.keys())))

    def _note_phase(self, phase: str) -> None:
        self.phase = phase


def _device(spec: WorkerSpec) -> torch.device:
    """Raises DeviceRefusedError."""
    if spec.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", spec.local_rank)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DeviceRefusedError(f"{error} (GPU {spec.local_rank} of those that it sees)") from error
    torch.cuda.set_device(device)
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

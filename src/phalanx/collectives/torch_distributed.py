"""Collectives that torch.distributed carries: Gloo's on one host, and NCCL's.

The process groups are made directly, with a store, a rank, a size and a timeout: no `init_process_group`, no global
state, so that the groups of several epochs can stand beside each other in one process.

The ranks of one host find each other through a FileStore whose file is a memfd of the process that opened their
rendezvous: no TCP port is opened for it, and no file stays behind. Those of several hosts do so over an `Exchange`.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C import _distributed_c10d

from phalanx.collectives import nccl_files
from phalanx.collectives.descriptor import CollectiveRecord, Descriptor, described
from phalanx.collectives.exchange import Exchange
from phalanx.collectives.lockstep import Lockstep
from phalanx.collectives.nccl_bootstrap import connect_over
from phalanx.collectives.remote_lockstep import RemoteLockstep
from phalanx.collectives.row_counts import RowCounts
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import ConfigError, FrameError, PhalanxError
from phalanx.transport.interfaces import interface_addresses

_LOOPBACK = "lo"
# NCCL's watchdog ends the process and names no rank; a wait of ours that does shall end first.
_WATCHDOG_AFTER_S = 5.0
# Where torch.distributed has its classes from; it passes on only some of them, and the stubs leave out more.
c10d: Any = _distributed_c10d


class _Work(Protocol):
    def wait(self) -> bool: ...


class _Backend(Protocol):
    """What is used of ProcessGroupGloo and ProcessGroupNCCL."""

    def allreduce(self, tensors: list[Tensor], options: object) -> _Work | None: ...
    def broadcast(self, tensors: list[Tensor], options: object) -> _Work | None: ...
    def _allgather_base(self, gathered: Tensor, x: Tensor, options: object) -> _Work | None: ...
    def _reduce_scatter_base(self, out: Tensor, x: Tensor, options: object) -> _Work | None: ...
    def alltoall_base(
        self, out: Tensor, x: Tensor, receive_sizes: list[int], send_sizes: list[int], options: object
    ) -> _Work | None: ...
    def abort(self) -> None: ...


class _TorchGroup(ABC):
    """A `Group` whose data a backend of torch.distributed moves; a lockstep tells who is in which collective."""

    def __init__(
        self, spec: GroupSpec, rank: int, device: torch.device, lockstep: Callable[[], Lockstep | RemoteLockstep]
    ) -> None:
        """Join; blocks until all ranks have. Raises what `lockstep` raises."""
        self.name = spec.name
        self.rank = spec.ranks.index(rank)
        self.size = spec.size
        self._device = device
        self._timeout_s = spec.timeout_s
        with ExitStack() as undo:
            self._lockstep = lockstep()
            undo.callback(self._lockstep.close)
            self._backend = self._connect(spec, undo)
            undo.callback(self._disconnect)
            self._ownership = undo.pop_all()

    @property
    def last(self) -> CollectiveRecord | None:
        return self._lockstep.last

    def all_reduce(self, x: Tensor) -> Tensor:
        options = c10d.AllreduceOptions()
        options.asyncOp = False
        options.reduceOp = _sum_of(x.dtype)
        with self._collective(described("all_reduce", x.dtype, x.shape)):
            carried = _addable(x)
            if x.numel():
                self._complete(self._backend.allreduce([carried], options))
            if carried is not x:
                x.copy_(carried)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        assert -x.dim() <= dim < x.dim(), dim
        options = c10d.AllgatherOptions()
        options.asyncOp = False
        with self._collective(described("all_gather", x.dtype, x.shape, dim % x.dim())):
            gathered = x.new_empty(self.size, *x.shape)
            if x.numel():
                bytes_in = _as_bytes(x.contiguous())
                self._complete(self._backend._allgather_base(_as_bytes(gathered), bytes_in, options))
            return torch.cat(gathered.unbind(), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, x.shape
        options = c10d.ReduceScatterOptions()
        options.asyncOp = False
        options.reduceOp = _sum_of(x.dtype)
        with self._collective(described("reduce_scatter", x.dtype, x.shape)):
            carried = _addable(x)
            part = carried.new_empty(x.shape[0] // self.size, *x.shape[1:])
            if x.numel():
                self._complete(self._backend._reduce_scatter_base(part, carried, options))
            return part.to(x.dtype)

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        counts = RowCounts(send_counts, receive_counts)
        counts.check(len(x), self.rank, self.size)
        options = c10d.AllToAllOptions()
        options.asyncOp = False
        with self._collective(described("all_to_all", x.dtype, x.shape[1:]), counts):
            received = x.new_empty(sum(receive_counts), *x.shape[1:])
            row_bytes = prod(x.shape[1:]) * x.element_size()
            if row_bytes:
                send_sizes, receive_sizes = ([num_rows * row_bytes for num_rows in of] for of in counts)
                bytes_out, bytes_in = _as_bytes(received), _as_bytes(x.contiguous())
                self._complete(self._backend.alltoall_base(bytes_out, bytes_in, receive_sizes, send_sizes, options))
            return received

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert 0 <= src < self.size, src
        options = c10d.BroadcastOptions()
        options.asyncOp = False
        options.rootRank = src
        options.rootTensor = 0
        with self._collective(described("broadcast", x.dtype, x.shape, src)):
            carried = x.contiguous()
            if x.numel():
                self._complete(self._backend.broadcast([_as_bytes(carried)], options))
            if carried is not x:
                x.copy_(carried)
        return x

    @abstractmethod
    def barrier(self) -> None: ...

    def close(self) -> None:
        self._ownership.close()

    @abstractmethod
    def _connect(self, spec: GroupSpec, ownership: ExitStack) -> _Backend:
        """Build the backend's connections. All ranks are there."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Tear them down without waiting for a peer."""

    @abstractmethod
    def _enter(self, descriptor: Descriptor, counts: RowCounts | None) -> None:
        """Begin a collective. `counts`: of an all_to_all."""

    @abstractmethod
    def _complete(self, work: _Work | None) -> None:
        """Let what comes after in this thread see the collective's result."""

    @contextmanager
    def _collective(self, descriptor: Descriptor, counts: RowCounts | None = None) -> Iterator[None]:
        try:
            self._enter(descriptor, counts)
            yield
        except BaseException as error:
            self._lockstep.abandon(error)
            raise


class GlooGroup(_TorchGroup):
    """CPU ranks of one host, over TCP. The ranks compare what they are about to do before the data moves."""

    _lockstep: Lockstep

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        super().__init__(spec, rank, torch.device("cpu"), partial(Lockstep, spec, rank))

    def barrier(self) -> None:
        with self._collective(Descriptor("barrier")):
            pass  # entering is all

    def _connect(self, spec: GroupSpec, ownership: ExitStack) -> _Backend:
        options = c10d.ProcessGroupGloo._Options()
        # The default is the address that the host's name resolves to: another interface, or none at all.
        options._devices = [c10d.ProcessGroupGloo.create_device(interface=_LOOPBACK)]
        options._timeout = timedelta(seconds=self._timeout_s)
        backend: _Backend = c10d.ProcessGroupGloo(_open_store(spec, ownership), self.rank, self.size, options)
        return backend

    def _disconnect(self) -> None:
        del self._backend

    def _enter(self, descriptor: Descriptor, counts: RowCounts | None) -> None:
        self._lockstep.issue(descriptor)
        if counts is None:
            self._lockstep.arrive()
        else:
            self._lockstep.arrive_with_rows(counts)

    def _complete(self, work: _Work | None) -> None:
        assert work is not None
        start = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lockstep.blame(error, time.monotonic() - start) from error
        self._lockstep.mark_finished()


class NcclGroup(_TorchGroup):
    """GPU ranks. Operations are enqueued on the current stream, also into a CUDA graph, and never wait on the host.

    So a mismatch, a dead or a late peer shows in `barrier`, and in NCCL's own watchdog after the group's timeout, and
    not in the operation itself. Between hosts a mismatch is not even seen there, unless it makes a rank wait in vain,
    and the counts of an all_to_all are compared nowhere. An all_to_all in a CUDA graph keeps the counts of its capture.
    """

    def __init__(self, spec: GroupSpec, rank: int, device: torch.device, exchange: Exchange | None) -> None:
        self._exchange = exchange
        if not spec.spans_hosts:
            super().__init__(spec, rank, device, partial(Lockstep, spec, rank))
        else:
            assert exchange is not None
            super().__init__(spec, rank, device, partial(RemoteLockstep, spec, rank, exchange))

    def barrier(self) -> None:
        """Wait on the host until the current stream has run all that this rank enqueued, then for every rank."""
        with self._collective(Descriptor("barrier")):
            if isinstance(self._lockstep, RemoteLockstep):
                self._meet()
            self._await_stream()
            if isinstance(self._lockstep, Lockstep):
                self._lockstep.arrive()

    def _connect(self, spec: GroupSpec, ownership: ExitStack) -> _Backend:
        if self._exchange is None:  # NCCL's own bootstrap must not depend on a network either
            os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK)
        else:
            _choose_network(self._exchange.node_address)
        # By default NCCL connects peers in the first collective that needs it, and there the host hangs, unseen by
        # NCCL's watchdog, when a peer does not come.
        os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
        if not isinstance(self._lockstep, RemoteLockstep):
            backend = self._build(_open_store(spec, ownership))
            nccl_files.remove_names()
            return backend
        assert self._exchange is not None
        start = time.monotonic()
        try:
            return connect_over(
                self._exchange,
                spec.name,
                self.rank == 0,
                spec.join_timeout_s,
                connect=self._build,
                check=self._lockstep.check_peers,
            )
        except PhalanxError:
            raise
        except (RuntimeError, TimeoutError) as error:
            raise self._lockstep.blame(error, time.monotonic() - start) from error

    def _build(self, store: object) -> _Backend:
        torch.cuda.set_device(self._device)  # of this thread
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s + _WATCHDOG_AFTER_S)
        backend: Any = c10d.ProcessGroupNCCL(store, self.rank, self.size, options)
        # At once, because the first collective may be inside a graph capture.
        backend.eager_connect_single_device(self._device)
        return cast(_Backend, backend)

    def _disconnect(self) -> None:
        # Not `shutdown`, which lets peers finish and so waits for dead ones. What is still enqueued is cut off.
        self._backend.abort()
        del self._backend

    def _enter(self, descriptor: Descriptor, counts: RowCounts | None) -> None:
        self._lockstep.issue(descriptor)
        self._lockstep.mark_issued()

    def _complete(self, work: _Work | None) -> None:
        # None: it runs on the current stream itself. Otherwise that stream waits, and not the host.
        if work is not None:
            work.wait()

    def _meet(self) -> None:
        options = c10d.AllreduceOptions()
        options.asyncOp = False
        self._complete(self._backend.allreduce([torch.zeros(1, device=self._device)], options))

    def _await_stream(self) -> None:
        done = cast(Any, torch.cuda).Event()  # untyped in torch's stubs
        done.record(torch.cuda.current_stream(self._device))
        start = time.monotonic()
        while not done.query():
            self._lockstep.check_peers()
            waited_s = time.monotonic() - start
            if waited_s > self._timeout_s:
                cause = TimeoutError("the GPU has not finished what was enqueued")
                raise self._lockstep.blame(cause, waited_s)
            os.sched_yield()


def _sum_of(dtype: torch.dtype) -> object:
    """What adds up `_addable` tensors: the backends cannot add bools."""
    return c10d.ReduceOp.MAX if dtype == torch.bool else c10d.ReduceOp.SUM


def _addable(x: Tensor) -> Tensor:
    return (x.to(torch.uint8) if x.dtype == torch.bool else x).contiguous()


def _as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor: every backend can move bytes, not every one each dtype."""
    return x.view(-1).view(torch.uint8)


def _choose_network(node_address: str) -> None:
    """Tell NCCL, once for the whole process, at which interface the other hosts reach this one."""
    for interface, address in interface_addresses():
        if address == node_address:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
            os.environ.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6" if ":" in address else "AF_INET")
            return
    raise ConfigError("node_address", node_address, "it must be an address of this host")


def _open_store(spec: GroupSpec, ownership: ExitStack) -> object:
    """The store of the group. This process keeps its file open: the brain may close it when all have joined."""
    assert spec.store is not None
    try:
        fd = os.open(spec.store.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise FrameError(f"the store of group {spec.name} was closed before this rank had joined") from error
    ownership.callback(os.close, fd)
    store: Any = c10d.FileStore(f"/proc/self/fd/{fd}", spec.size)
    store.set_timeout(timedelta(seconds=spec.join_timeout_s))
    return store

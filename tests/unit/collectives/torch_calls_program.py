"""Two ranks that go through everything that torch.distributed has, and say what their journals have of each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import all_reduce as imported_before

from phalanx.collectives import torch_hook
from phalanx.ledger.journal_reader import read
from phalanx.ledger.record import Kind

SIZE = 2


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each is called when the one before it is over."""
    rank, x = dist.get_rank(), torch.ones(4)
    parts = [torch.ones(4) for _ in range(SIZE)]
    yield "init_process_group", lambda: None  # by now it has been
    yield "all_reduce", lambda: imported_before(x)
    yield "async", lambda: dist.all_reduce(x, async_op=True).wait()
    yield "all_gather", lambda: dist.all_gather(parts, x)
    yield "all_gather_into_tensor", lambda: dist.all_gather_into_tensor(torch.ones(8), x)
    yield "reduce_scatter", lambda: dist.reduce_scatter(x, parts)
    yield "reduce_scatter_tensor", lambda: dist.reduce_scatter_tensor(x, torch.ones(8))
    yield "broadcast", lambda: dist.broadcast(x, 1)
    yield "all_to_all", lambda: dist.all_to_all(parts, [torch.ones(4) for _ in range(SIZE)])
    yield "all_to_all_single", lambda: dist.all_to_all_single(torch.ones(8), torch.ones(8))
    yield "gather", lambda: dist.gather(x, parts if rank == 0 else None, 0)
    yield "scatter", lambda: dist.scatter(x, parts if rank == 0 else None, 0)
    yield "reduce", lambda: dist.reduce(x, 0)
    yield "barrier", dist.barrier
    yield "monitored_barrier", dist.monitored_barrier
    yield "objects", lambda: dist.broadcast_object_list([rank], 0)
    yield "send", lambda: dist.send(x, 1, tag=3) if rank == 0 else dist.recv(x, 0, tag=3)
    yield "isend", lambda: (dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)).wait()  # type: ignore[union-attr]
    yield (
        "batch",
        lambda: [
            work.wait()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.ones(4), 1 - rank)]
            )
        ],
    )
    yield "coalesced", coalesced
    group = dist.new_group([0, 1], group_desc="pair")
    yield "group", lambda: dist.all_reduce(x, group=group)

    model = torch.nn.Linear(4, 4)
    parallel: list[torch.nn.Module] = []
    yield "ddp", lambda: parallel.append(torch.nn.parallel.DistributedDataParallel(model))
    yield "ddp backward", lambda: parallel[0](x).sum().backward()

    from torch.distributed import _functional_collectives as functional
    from torch.distributed.fsdp import fully_shard

    world = dist.group.WORLD
    yield "functional", lambda: functional.all_reduce(x, "sum", world).wait()  # type: ignore[attr-defined]
    yield "from python, still once", lambda: dist.all_reduce(x)
    sharded = torch.nn.Linear(4, 4)
    yield "fsdp", lambda: fully_shard(sharded)
    yield "fsdp backward", lambda: sharded(x).sum().backward()
    yield "failing", failing


def coalesced() -> None:
    with dist._coalescing_manager():
        dist.all_reduce(torch.ones(4))
        dist.all_reduce(torch.ones(3))


def failing() -> None:
    """The peer sends nothing."""
    work = dist.irecv(torch.ones(4), 1 - dist.get_rank(), tag=9)
    assert work is not None
    try:
        work.wait(timedelta(seconds=0.05))
    except RuntimeError:
        return
    raise AssertionError("it did not fail")


def main() -> None:
    store, rank = sys.argv[1], int(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch_hook.install()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    memory, newest, found = torch_hook.journal_memory(), 0, {}
    for name, call in cases():
        call()
        entries = read(memory)
        records = [one for one in entries.records if one.number > newest and one.kind == Kind.COLLECTIVE]
        newest = entries.records[-1].number
        found[name] = [(entries.texts[one.digest], one.group, one.sequence, one.is_done) for one in records]
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()

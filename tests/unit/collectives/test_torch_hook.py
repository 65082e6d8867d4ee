"""Everything that goes through torch.distributed is in the journal, once, and by the same name on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

PROGRAM = Path(__file__).parent / "torch_calls_program.py"
SIZE = 2

EXPECTED = {
    "init_process_group": ["init_process_group of 2 ranks"],
    "all_reduce": ["all_reduce of 4 float32"],
    "async": ["all_reduce of 4 float32"],
    "all_gather": ["all_gather of 8 float32"],
    "all_gather_into_tensor": ["all_gather_into_tensor of 4 float32"],
    "reduce_scatter": ["reduce_scatter of 8 float32"],
    "reduce_scatter_tensor": ["reduce_scatter_tensor of 8 float32"],
    "broadcast": ["broadcast of 4 float32 from rank 1"],
    "all_to_all": ["all_to_all of float32"],
    "all_to_all_single": ["all_to_all_single of float32"],
    "gather": ["gather of 4 float32 to rank 0"],
    "scatter": ["scatter of 4 float32 from rank 0"],
    "reduce": ["reduce of 4 float32 to rank 0"],
    "barrier": ["barrier"],
    "monitored_barrier": ["monitored_barrier"],
    "objects": ["broadcast of 1 int64 from rank 0", "broadcast of 5 uint8 from rank 0"],
    "send": ["send/recv of 4 float32"],
    "isend": ["send/recv of 4 float32"],
    "batch": ["send/recv of 4 float32", "send/recv of 4 float32"],
    "coalesced": ["all_reduce_coalesced of 7 float32"],
    "group": ["all_reduce of 4 float32"],
    "ddp backward": ["all_reduce of 20 float32"],
    "functional": ["all_reduce of 4 float32"],
    "from python, still once": ["all_reduce of 4 float32"],
    "fsdp": [],
}

Found = dict[str, list[tuple[str, int, int, bool]]]


@pytest.mark.slow
def test_all_that_there_is(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(SIZE)]
    try:
        outputs = [one.communicate(timeout=120)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    found = [msgspec.json.decode(output, type=Found) for output in outputs]
    for of_rank in found:
        assert {name: [one[0] for one in of_rank[name]] for name in EXPECTED} == EXPECTED
        assert of_rank["ddp"], "its parameters are compared, and broadcast"
        fully_sharded = [text.split(" of ")[0] for text, *_ in of_rank["fsdp backward"]]
        assert "all_gather_into_tensor" in fully_sharded and fully_sharded[-1] == "reduce_scatter_tensor"
        assert all(done for name, calls in of_rank.items() if name != "failing" for *_, done in calls)
        assert [done for *_, done in of_rank["failing"]] == [False], "whom it waited for stays to be seen"
        world = [sequence for calls in of_rank.values() for _, group, sequence, _ in calls if group == 1]
        assert world == list(range(1, len(world) + 1))
    lanes = {name: {group for _, group, *_ in calls} for name, calls in found[0].items()}
    assert lanes["send"] != lanes["isend"] < lanes["batch"], "a lane for each tag and direction"
    assert lanes["group"].isdisjoint(lanes["all_reduce"] | lanes["batch"])


def test_operators_that_cannot_be_caught_keep_nobody_from_going_on() -> None:
    """As with a torch whose internals are others; in a process of its own, which the hook changes."""
    program = (
        "import torch\n"
        "from phalanx.collectives import torch_hook\n"
        "def kernel(*_): raise RuntimeError('other internals')\n"
        "torch_hook.Hook._kernel = kernel\n"
        "torch_hook.install()\n"
        "from torch.distributed import _functional_collectives\n"
        "torch_hook._hook()._catch_operators()\n"  # as a DistributedDataParallel does
        "print('goes on')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "goes on\n", ended.stderr
    assert "collectives are not recorded any more" in ended.stderr and "other internals" in ended.stderr

"""Descriptors and the layout of the segment they stand in."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.collectives.descriptor import DESCRIPTOR_BYTES, CollectiveRecord, Descriptor
from phalanx.collectives.layout import AWAITED, MAX_RANKS, Layout
from phalanx.collectives.spec import pick_backend

_descriptors = st.builds(
    Descriptor,
    operation=st.sampled_from(["all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all"]),
    dtype=st.sampled_from(["float32", "bfloat16", "bool", "int64"]),
    shape=st.lists(st.integers(0, 2**40), max_size=8).map(tuple),
    argument=st.integers(0, 63),
)


@given(descriptor=_descriptors)
def test_a_descriptor_survives_encoding(descriptor: Descriptor) -> None:
    assert len(descriptor.encoded) == DESCRIPTOR_BYTES
    assert Descriptor.decode(descriptor.encoded) == descriptor


@given(one=_descriptors, other=_descriptors)
def test_digests_differ_where_descriptors_do(one: Descriptor, other: Descriptor) -> None:
    assert (one.digest == other.digest) == (one == other)


def test_trailing_dimensions_count() -> None:
    assert Descriptor("all_reduce", "float32", (2,)).digest != Descriptor("all_reduce", "float32", (2, 0)).digest


def test_descriptors_and_records_read_well() -> None:
    assert str(Descriptor("all_gather", "int32", (2, 3), 1)) == "all_gather int32 [2, 3] dim=1"
    assert str(Descriptor("barrier")) == "barrier"
    record = CollectiveRecord("tp", 4, 9, "all_reduce", "bfloat16", (15, 2))
    assert str(record) == "all_reduce bfloat16 [15, 2] (sequence 9 of group tp, epoch 4)"


@given(num_ranks=st.integers(1, MAX_RANKS), num_pages=st.integers(0, 5))
def test_nothing_in_the_segment_overlaps(num_ranks: int, num_pages: int) -> None:
    layout = Layout(num_ranks, num_pages * 4096)
    regions = [(0, 8), (AWAITED, num_ranks), (layout.size_bytes, 0)]
    for rank in range(num_ranks):
        regions += [(layout.header(rank, parity), 16 + DESCRIPTOR_BYTES) for parity in (0, 1)]
        regions += [(layout.finished(rank), 8), (layout.joined(rank), 24), (layout.bell(rank), 4)]
        regions += [(layout.counts(rank, parity), 16 * num_ranks) for parity in (0, 1)]
        regions += [(layout.slot(rank, parity), layout.slot_bytes) for parity in (0, 1)]
    regions.sort()
    for (start, length), (following, _) in pairwise(regions):
        assert start + length <= following
        assert start % 8 == 0


def test_ranks_write_on_cache_lines_of_their_own() -> None:
    layout = Layout(4, 4096)
    written = [
        {
            *(place // 64 for place in (layout.header(rank, 0), layout.header(rank, 1), layout.finished(rank))),
            *(layout.counts(rank, parity) // 64 for parity in (0, 1)),
        }
        for rank in range(4)
    ]
    assert not any(one & other for one, other in combinations(written, 2))


@pytest.mark.parametrize(
    ("device", "size", "one_host", "backend"),
    [
        ("cpu", 1, True, "single"),
        ("cuda", 1, False, "single"),
        ("cuda", 2, True, "nccl"),
        ("cuda", 8, False, "nccl"),
        ("cpu", 2, True, "shm"),
        ("cpu", 2, False, "gloo"),
    ],
)
def test_the_fastest_backend_is_picked(device: str, size: int, one_host: bool, backend: str) -> None:
    assert pick_backend(device, size, one_host) == backend


def test_the_brain_opens_a_rendezvous_without_torch() -> None:
    program = (
        "import sys; from phalanx.collectives.rendezvous import open_rendezvous\n"
        "for backend in ('shm', 'gloo', 'nccl'):\n"
        "    with open_rendezvous('tp', backend, (0, 1), 0, 1.0, 1.0) as rendezvous: assert rendezvous.spec.size == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

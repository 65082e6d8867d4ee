"""Names that NCCL gives away in /dev/shm, and that a killed process could not take back."""

from __future__ import annotations

import os
import tempfile

import pytest

from phalanx.collectives import nccl_files


def test_copy_engines_need_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_USE_CUDA_MEMCPY", "1")
    with tempfile.NamedTemporaryFile(prefix="nccl-", dir="/dev/shm") as file:
        nccl_files.remove_names()
        assert os.path.exists(file.name)


def test_names_of_what_is_open_here_go_and_its_memory_stays() -> None:
    number, path = tempfile.mkstemp(prefix="nccl-", dir="/dev/shm")
    elsewhere, of_others = tempfile.mkstemp(prefix="nccl-", dir="/dev/shm")
    not_of_nccl, other = tempfile.mkstemp(prefix="other-", dir="/dev/shm")
    os.close(elsewhere)
    try:
        os.write(number, b"work")
        nccl_files.remove_names()
        nccl_files.remove_names()
        assert not os.path.exists(path) and os.path.exists(of_others) and os.path.exists(other)
        assert os.pread(number, 4, 0) == b"work"
    finally:
        os.close(number)
        os.close(not_of_nccl)
        os.unlink(of_others)
        os.unlink(other)

"""What `phalanx doctor` looks at. Each check says how it is, and what to do if it is not well."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from phalanx.config import ServerConfig
from phalanx.errors import ConfigError, PhalanxError, UserError
from phalanx.version import __version__

GIB = 2**30
MIN_OPEN_FILES = 1024
"""A connection and some pipes for each of max_num_seqs clients, and room for a rank's queues."""
LITTLE_MEMORY_BYTES = 2 * GIB


class Check(msgspec.Struct, frozen=True):
    """`advice` says what to do, unless all is well. `table` has indented lines; `facts` are for programs."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str | None = None
    table: str | msgspec.UnsetType = msgspec.UNSET
    facts: msgspec.Struct | msgspec.UnsetType = msgspec.UNSET


def all_checks(model: str | None, server: ServerConfig) -> Iterator[Check]:
    """Run every check. Takes seconds: torch is imported. A check never raises."""
    checks: list[Callable[[], Iterable[Check]]] = [
        versions, gpus, cores, memory, memfd, futex, pidfd, open_files, partial(port, server)
    ]  # fmt: skip
    if server.api_key_file is not None:
        checks.append(partial(api_keys, server))
    for check in checks:
        yield from check()
    if model is not None:
        yield from checkpoint(model)


def without_effect(flags: Sequence[str]) -> Iterator[Check]:
    """What was given, as a command for `serve` may have it, and says nothing about this machine."""
    for flag in flags:
        yield Check("settings", "warn", f"{flag} has no effect here", "leave it out; phalanx serve alone reads it")


def versions() -> Iterator[Check]:
    """Python, this package and those that it needs."""
    machine = platform.machine()
    python = f"{platform.python_version()} on Linux {platform.release()} {machine}"
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        yield Check("python", "fail", python, "Phalanx runs on Linux on x86-64 or aarch64")
    elif not (3, 11) <= sys.version_info < (3, 14):
        yield Check("python", "fail", python, "use Python 3.11, 3.12 or 3.13")
    else:
        yield Check("python", "ok", python)
    yield Check("phalanx", "ok", __version__)
    for package in ("torch", "transformers"):
        try:
            yield Check(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "fail", "not installed", f"pip install {package}")


def gpus() -> Iterator[Check]:
    """GPUs, and whether torch can use them."""
    from phalanx.executor.platform import torch_has_cuda, visible_gpus

    found = len(visible_gpus())
    if found == 0:
        yield Check("gpus", "ok", "none; ranks compute on the CPU")
        return
    if not torch_has_cuda():
        advice = "install a torch with CUDA: https://pytorch.org/get-started/locally"
        yield Check("gpus", "warn", f"{found}, but torch is built without CUDA", advice)
        return
    import torch

    if not torch.cuda.is_available():
        driver = _nvidia_driver() or "unknown"
        advice = f"torch needs a driver for CUDA {torch.version.cuda}; update the driver"
        yield Check("gpus", "fail", f"{found}, but torch cannot use them (driver {driver})", advice)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {device.total_memory / GIB:.1f} GiB, driver {_nvidia_driver() or 'unknown'}"
        yield Check(f"gpu {index}", "ok", detail)


def cores() -> Iterator[Check]:
    """How many there are for ranks."""
    from phalanx.executor.platform import num_cores

    usable, present = num_cores(), os.cpu_count() or 1
    limited = "" if usable == present else " (limited by affinity or a control group)"
    detail = f"{usable} of {present} may be used{limited}"
    if usable < 2:
        yield Check("cores", "warn", detail, "server, engine and ranks share one core: expect pauses")
    else:
        yield Check("cores", "ok", detail)


def memory() -> Iterator[Check]:
    """How much is free."""
    free, total, is_limited = free_memory()
    detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}{' (limit of the control group)' if is_limited else ''}"
    if free < LITTLE_MEMORY_BYTES:
        yield Check("memory", "warn", detail, "free some, or use a small model and set --kv-cache-memory")
    else:
        yield Check("memory", "ok", detail)


def free_memory() -> tuple[int, int, bool]:
    """Bytes free, bytes in all, and whether a control group sets them."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None or used is None or limit >= total:
        return free, total, False
    return min(free, limit - used), limit, True


def memfd() -> Iterator[Check]:
    """Whether anonymous shared memory can be had."""
    from phalanx.transport.shared_memory import SharedSegment

    yield _trial(
        "shared memory",
        "memfd works",
        lambda: SharedSegment.create(4096, "doctor").close(),
        "allow memfd_create in the container's seccomp profile",
    )


def futex() -> Iterator[Check]:
    """Whether processes can wake each other."""
    from phalanx.transport.futex import Doorbell

    def try_it() -> None:
        bell = Doorbell(memoryview(bytearray(8))[:4])
        seen = bell.value()
        if bell.wait(seen, 0.001):
            raise OSError("a futex woke without being rung")
        bell.ring()
        if not bell.wait(seen, 1.0):
            raise OSError("a futex did not wake")

    yield _trial("futex", "works", try_it, "allow the futex system call in the container's seccomp profile")


def pidfd() -> Iterator[Check]:
    """Whether the end of a process can be awaited."""
    advice = "Linux 5.3 or later is needed, with pidfd_open allowed in the container's seccomp profile"
    yield _trial("pidfd", "works", lambda: os.close(os.pidfd_open(os.getpid())), advice)


def open_files() -> Iterator[Check]:
    """Whether there may be enough descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES:
        yield Check("open files", "warn", f"at most {soft} (could be {hard})", f"ulimit -n {hard}")
    else:
        yield Check("open files", "ok", f"at most {soft}")


def port(server: ServerConfig) -> Iterator[Check]:
    """Whether the server could listen where it is told to."""
    from phalanx.server.listen import listen

    where = f"{server.host}:{server.port}"
    try:
        listen(server.host, server.port).close()
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            yield Check("port", "warn", f"{where} is taken", "stop who listens there, or serve with another --port")
        else:
            yield Check("port", "fail", f"the server cannot listen on {where}", f"--{error.field}: {error.allowed}")
    else:
        yield Check("port", "ok", f"{where} is free")


def api_keys(server: ServerConfig) -> Iterator[Check]:
    """Whether there are keys in the file that is to have them."""
    from phalanx.server.api_keys import ApiKeys

    try:
        ApiKeys.load(server)
    except ConfigError as error:
        yield Check("api keys", "fail", f"{server.api_key_file}: {error.allowed}", "put a key on each line of it")
    else:
        yield Check("api keys", "ok", f"from {server.api_key_file}")


def checkpoint(model: str) -> Iterator[Check]:
    """Whether the model is here and can be run. Nothing is loaded, converted or fetched."""
    # Other than pathlib's, these two take a home that is unknown, or a name too long, as what is not there.
    path = Path(os.path.expanduser(model))
    if not os.path.exists(path):
        advice = "if it is the name of a hub model, it is fetched when it is first served; otherwise mind the spelling"
        yield Check("model", "warn", f"there is no file or directory {model}", advice)
    elif path.is_file():
        yield _file(path)
    else:
        yield _directory(path)


def _file(path: Path) -> Check:
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        return Check("model", "fail", f"{path} cannot be read: {error.strerror}", "let this user read it")
    if not is_gguf:
        return Check(
            "model", "fail", f"{path} is no GGUF file", "give a GGUF file, a checkpoint directory or a hub name"
        )
    return _fit("model", path.stat().st_size)


def _directory(path: Path) -> Check:
    from phalanx.models.checkpoint import resolve

    try:
        files = resolve(str(path)).weight_files
    except UserError as error:
        return Check("model", "fail", str(error), "give a complete checkpoint of a supported model")
    return _fit("model", sum(file.stat().st_size for file in files))


def _fit(name: str, size: int) -> Check:
    free, _, _ = free_memory()
    detail = f"{size / GIB:.2f} GiB of weights"
    if size > free:
        return Check(name, "warn", detail, "it does not fit into this machine's free memory; a GPU needs room too")
    return Check(name, "ok", detail)


def _trial(name: str, success: str, attempt: Callable[[], object], advice: str) -> Check:
    try:
        attempt()
    except (OSError, PhalanxError) as error:
        return Check(name, "fail", str(error), advice)
    return Check(name, "ok", success)


def _nvidia_driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:  # no such driver
        return None


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or `max`
        return None

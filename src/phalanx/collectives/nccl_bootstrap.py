"""How NCCL's ranks on several hosts come to know its unique id, without a store that has a server.

ProcessGroupNCCL has threads of its own that ask its store for as long as the group lives. So each rank gives it a store
in its own memory, and only what rank 0 of the group has put there at first, the id, goes over the `Exchange`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import msgspec
from torch._C._distributed_c10d import HashStore

from phalanx.collectives.exchange import Exchange

_KEY = "nccl"
_LOOK_S = 0.005
_Entries = dict[str, bytes]

Connected = TypeVar("Connected")


def connect_over(
    exchange: Exchange,
    group: str,
    is_first: bool,
    timeout_s: float,
    *,
    connect: Callable[[HashStore], Connected],
    check: Callable[[], None],
) -> Connected:
    """What `connect(store)` returns. It runs in a thread, as NCCL has no deadline for it, and the exchange is served.

    Meanwhile calls `check` again and again. Raises what either raises, and TimeoutError after `timeout_s`; then the
    thread is left behind.
    """
    start = time.monotonic()
    store = HashStore()
    if not is_first:
        _fill(store, exchange.wait(group, [_KEY], timeout_s), timeout_s)
    connected: Future[Connected] = Future()
    threading.Thread(target=_run, args=(connected, connect, store), name="phalanx-nccl", daemon=True).start()
    is_published = not is_first
    while not wait([connected], _LOOK_S).done:
        check()
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"NCCL was not connected within {timeout_s:.3g} s")
        if not is_published and store.num_keys():
            entries = {key: store.get(key) for key in store.list_keys()}
            exchange.publish(group, _KEY, msgspec.msgpack.encode(entries))
            is_published = True
    return connected.result()


def _fill(store: HashStore, found: dict[str, bytes], timeout_s: float) -> None:
    if _KEY not in found:
        raise TimeoutError(f"NCCL's id did not come within {timeout_s:.3g} s")
    for key, value in msgspec.msgpack.decode(found[_KEY], type=_Entries).items():
        store.set(key, value)  # type: ignore[arg-type]  # the stub knows only of str


def _run(connected: Future[Connected], connect: Callable[[HashStore], Connected], store: HashStore) -> None:
    try:
        connected.set_result(connect(store))
    except BaseException as error:
        connected.set_exception(error)

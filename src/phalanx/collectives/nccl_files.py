"""Files in /dev/shm that NCCL leaves behind when its process is killed.

For each communicator a rank makes one for the work of its proxy, of some 20 MB. It takes the name away when the ranks
of the host have connected, unless its memory is CUDA's virtual memory, as by default: then ranks that share resources
of a communicator could yet open it (NCCL 2.28, the end of initTransportsRank). It loses its name then with the
communicator, and so never if the process is killed. Our communicators share none.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_PREFIX = "/dev/shm/nccl-"
_OPEN_FILES = Path("/proc/self/fd")
_BY_COPY_ENGINE = "NCCL_P2P_USE_CUDA_MEMCPY"
"""With that ranks do open the pools of others, when an operation first comes to them."""


def remove_names() -> None:
    """Of all that this process has open. To be called when the ranks of a group have connected, and are all on this
    host, before those of any group that spans hosts connect: these may come to a local peer's proxy later on.
    """
    if os.environ.get(_BY_COPY_ENGINE, "0") != "0":
        return
    for number in os.listdir(_OPEN_FILES):
        with suppress(FileNotFoundError):  # of the listing itself, and a name that a peer has removed
            path = os.readlink(_OPEN_FILES / number)
            if path.startswith(_PREFIX):
                os.unlink(path)

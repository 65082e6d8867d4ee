"""Where a rank's weights and KV cache lie: in memory that others can hold and that can be given back, or in torch's."""

from __future__ import annotations

import logging

import torch

from phalanx.errors import ConfigError, DriverError
from phalanx.memory.arena import Arena
from phalanx.memory.cuda_driver import CudaDriver
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.worker")


def new_arena(spec: WorkerSpec, device: torch.device) -> Arena:
    """The rank's own. Raises ConfigError if a standby line was to have its memory, and cannot."""
    driver = _driver(spec, device) if device.type == "cuda" else None
    return Arena(f"memory of rank {spec.rank}", device, spec.held, driver=driver)


def _driver(spec: WorkerSpec, device: torch.device) -> CudaDriver | None:
    """None where a GPU's memory is torch's, ends with the process and is not given back before."""
    assert device.index is not None
    try:
        driver = CudaDriver(device.index)
        why_not = None if driver.can_share else "this GPU's driver has no memory with descriptors"
    except DriverError as error:
        why_not = str(error)
    if why_not is None:
        return driver
    if spec.keeps_memory and spec.config.healing.standby:
        raise ConfigError("standby", spec.config.healing.standby, f"0 here: {why_not}, which two lines could share")
    if spec.keeps_memory and spec.local_rank == 0:
        log.warning("after a fault, weights are read again and requests computed again: %s", why_not)
    return None

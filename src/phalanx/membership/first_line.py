"""The first line of a formation: none is before it, so it is no fault that is healed if it does not come up."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from phalanx.errors import DeviceRefusedError, WorkerError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.line_plan import Capacity
from phalanx.membership.lines import NO_MEMORY, Line, Lines, ShowLine
from phalanx.memory.held import HeldMemory

AGAIN_AFTER_S = 1.0

log = logging.getLogger("phalanx.membership")


def start_first_line(
    lines: Lines,
    on_progress: OnProgress,
    show: ShowLine,
    timeout_s: float,
    memory: Mapping[int, HeldMemory] = NO_MEMORY,
) -> tuple[Line, Capacity]:
    """As Lines.start; `memory` is what another engine has given. If a GPU's driver has refused a rank's process, once
    more with new ones, within the same time: it has done so while processes of somebody else ended, and what it has
    refused cannot ask again."""
    deadline = Deadline(timeout_s)
    try:
        return lines.start(on_progress, memory=memory, show=show)
    except WorkerError as error:
        if error.kind != DeviceRefusedError.__name__ or deadline.remaining_s <= AGAIN_AFTER_S:
            raise
        log.warning("%s; ranks are started once more", error)
    time.sleep(AGAIN_AFTER_S)
    return lines.start(on_progress, memory=memory, show=show, timeout_s=deadline.remaining_s)

"""The first line of a formation: none is before it, so it is no fault that is healed if it does not come up."""

from __future__ import annotations

import logging
import time

from phalanx.errors import DeviceRefusedError, WorkerError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.start import Capacity
from phalanx.membership.lines import Line, Lines, ShowLine

AGAIN_AFTER_S = 1.0

log = logging.getLogger("phalanx.membership")


def start_first_line(lines: Lines, on_progress: OnProgress, show: ShowLine, timeout_s: float) -> tuple[Line, Capacity]:
    """As Lines.start. If a GPU's driver has refused a rank's process, once more with new ones, within the same time:
    it has done so while processes of somebody else ended, and what it has refused cannot ask again."""
    deadline = Deadline(timeout_s)
    try:
        return lines.start(on_progress, show=show)
    except WorkerError as error:
        if error.kind != DeviceRefusedError.__name__ or deadline.remaining_s <= AGAIN_AFTER_S:
            raise
        log.warning("%s; ranks are started once more", error)
    time.sleep(AGAIN_AFTER_S)
    return lines.start(on_progress, show=show, timeout_s=deadline.remaining_s)

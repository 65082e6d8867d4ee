"""Where a rank finds the checkpoint, and that the ranks of all nodes have found the same one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phalanx.errors import CheckpointError, DeadlineError
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.models.hub import commit_of
from phalanx.models.progress import Progress
from phalanx.protocol.worker import CheckpointFound
from phalanx.topology.grid import Grid
from phalanx.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from phalanx.collectives.exchange import Exchange

FIRST_RANK = 0
"""The one that the others compare with."""

_BOARD = "checkpoint"
_KEY = f"rank {FIRST_RANK}"


def find_checkpoint(spec: WorkerSpec, progress: Progress) -> Checkpoint:
    """The checkpoint, which on another host than the brain's may have to be found or fetched there again.

    Blocks while it is fetched. Raises CheckpointError that names this host.
    """
    try:
        return _find(spec, progress)
    except CheckpointError as error:
        raise CheckpointError(f"on {os.uname().nodename}: {error}") from error


def check_same_checkpoint(checkpoint: Checkpoint, spec: WorkerSpec, exchange: Exchange | None) -> None:
    """See that this rank has the weights that rank 0 has. Blocks until rank 0 has said which those are.

    Raises CheckpointError naming both nodes, DeadlineError if rank 0 says nothing. Ranks of one host read the same
    files; where there is only one, nothing is compared.
    """
    if spec.ranks_on_host == Grid.of(spec.config.parallel).world_size:
        return
    assert exchange is not None
    own = CheckpointFound(os.uname().nodename, str(checkpoint.path), checkpoint.fingerprint)
    if spec.rank == FIRST_RANK:
        exchange.publish(_BOARD, _KEY, msgspec.msgpack.encode(own))
        return
    timeout_s = min(group.join_timeout_s for group in spec.groups)
    answer = exchange.wait(_BOARD, [_KEY], timeout_s)
    if not answer:
        raise DeadlineError("word of which weights it has", _KEY, timeout_s)
    first = msgspec.msgpack.decode(answer[_KEY], type=CheckpointFound)
    if first.fingerprint != own.fingerprint:
        raise CheckpointError(
            f"the nodes have different models: rank {spec.rank} on {own.node} has other weights, or another "
            f"config.json, in {own.path} than rank {FIRST_RANK} on {first.node} in {first.path}; give all nodes the "
            "same files"
        )


def _find(spec: WorkerSpec, progress: Progress) -> Checkpoint:
    model, commit = spec.config.model, commit_of(Path(spec.checkpoint))
    if os.path.isdir(spec.checkpoint):
        try:
            return resolve(spec.checkpoint)
        except CheckpointError:
            # In the hub's cache of this host it may be a download that was broken off.
            if commit is None or os.path.exists(os.path.expanduser(model.model)):
                raise
    # The brain's commit: a branch may be another one here, in an old cache or because it has moved on.
    return resolve(model.model, revision=commit or model.revision, progress=progress)

"""Models on the Hugging Face hub: downloaded into the hub's own cache, with progress. No torch here."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.errors import CheckpointError
from phalanx.models.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm as Bar

PHASE = "downloading"
REPORT_INTERVAL_S = 0.1
"""Progress is told this often: a fast network brings hundreds of chunks a second."""

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_NOT_DOWNLOADED = ("consolidated*", "original/*", "*.gguf")
"""Second copies of the weights that some repositories have."""

_COMMIT = re.compile("[0-9a-f]{40}")


def commit_of(directory: Path) -> str | None:
    """The commit that a directory of the hub's cache holds (.../snapshots/COMMIT); None if it is no such directory."""
    is_snapshot = directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name) is not None
    return directory.name if is_snapshot else None


def fetch(model: str, revision: str | None, check_settings: Callable[[Path], None], progress: Progress) -> Path:
    """A directory with all of a hub model's files that are needed. Blocks while those that are not there yet come.

    `check_settings` gets a directory with config.json alone, before gigabytes come. Raises CheckpointError, and what
    `check_settings` does.
    """
    progress(PHASE, 0, 0)
    described = Path(_ask_hub(model, revision, ("config.json",)))
    check_settings(described)
    revision = commit_of(described) or revision  # a branch may move on meanwhile
    meter = _Meter(progress, _missing_bytes(model, revision))
    return Path(_ask_hub(model, revision, _DOWNLOADED, meter.note))


class _Meter:
    """What has come of a download. The hub's threads use it all at once."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._reported_at = 0.0
        self._lock = threading.Lock()
        if total_bytes:
            self._report()

    def note(self, done_bytes: int) -> None:
        """Tell it. Also that more came which is not counted: whoever awaits the download must hear that it lives."""
        with self._lock:
            before = self._done_bytes
            # A file that has to be begun again takes back what it had.
            self._done_bytes = max(before, min(done_bytes, self._total_bytes))
            is_now_complete = before < self._done_bytes == self._total_bytes
            if is_now_complete or time.monotonic() >= self._reported_at + REPORT_INTERVAL_S:
                self._report()

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        self._progress(PHASE, self._done_bytes, self._total_bytes)


def _bar_class(note: Callable[[int], None]) -> type[Bar]:
    """What the hub's library makes its progress bars of: it adds up the bytes of all files in them.

    There are two, for what came over the network and for what was written, and a third one that counts files.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            options["disable"] = True  # nothing is drawn: progress is shown elsewhere
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if n:
                self.n += n
                if self._counts_bytes:
                    note(int(self.n))
            return None

    return SilentBar


def _ignore(done_bytes: int) -> None:
    """Of files that are too small to matter."""


def _missing_bytes(model: str, revision: str | None) -> int:
    """What is still to come; 0 if the hub cannot be reached, which need not matter to a model in the cache."""
    from huggingface_hub.errors import DryRunError

    try:
        planned = _ask_hub(model, revision, _DOWNLOADED, dry_run=True)
    except DryRunError:
        return 0
    return sum(file.file_size for file in planned if file.will_download)


def _ask_hub(
    model: str,
    revision: str | None,
    files: Sequence[str],
    note: Callable[[int], None] = _ignore,
    *,
    dry_run: bool = False,
) -> Any:
    """The directory of the commit in the hub's cache, with those of `files` that the model has; `note` hears of bytes.

    With `dry_run` what would be downloaded. Raises CheckpointError, and DryRunError if that cannot be found out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    tried = f"{model} is not a file or directory here, and"
    try:
        return snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(_NOT_DOWNLOADED),
            tqdm_class=_bar_class(note),
            dry_run=dry_run,
        )
    except DryRunError:
        raise
    except HFValidationError as error:
        raise CheckpointError(f"{tried} it cannot be the name of a hub model: {error}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{tried} the hub's model has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{tried} the hub has no such model, or it asks for a token (HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        raise CheckpointError(f"{tried} {reason}, and the hub's cache does not have it") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{tried} the hub did not give it: {error}") from error

"""The secret of a run. Whoever has it is a part of the run, so it travels through the launcher's own channel alone."""

from __future__ import annotations

import secrets

import msgspec

KEY_BYTES = 32


class RunKey(msgspec.Struct, frozen=True):
    """Made anew for each run. Does not show in logs, tracebacks and handles: its text is the same for all keys."""

    secret: bytes

    def __post_init__(self) -> None:
        assert len(self.secret) == KEY_BYTES

    @classmethod
    def new(cls) -> RunKey:
        """From the kernel's random numbers."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def __repr__(self) -> str:
        return "RunKey(...)"

"""Prompts from a file: a line of text each, or a line of JSON each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from phalanx.errors import ConfigError


class PromptLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line of a .jsonl file: a prompt or a conversation, and a name that comes back with its output."""

    id: str | int | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


def read_prompts(path: Path) -> list[PromptLine]:
    """Prompts of a .jsonl or text file; empty lines are passed over. Raises ConfigError naming the line."""
    try:
        # Only these: `splitlines` also cuts at separators that JSON may have within a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError("--file", str(path), f"it cannot be read: {reason}") from error
    is_json = path.suffix in (".jsonl", ".ndjson")
    prompts = [
        _parse(line, f"{path}:{number}") if is_json else PromptLine(prompt=line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise ConfigError("--file", str(path), "it has no prompts")
    return prompts


def _parse(line: str, where: str) -> PromptLine:
    try:
        prompt = msgspec.json.decode(line, type=PromptLine)
    except msgspec.DecodeError as error:
        raise ConfigError("--file", where, f'a line is {{"prompt": "..."}} or {{"messages": [...]}}: {error}') from None
    if (prompt.prompt is None) == (prompt.messages is None):
        raise ConfigError("--file", where, "a line has either prompt or messages")
    return prompt

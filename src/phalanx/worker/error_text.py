"""An error's message and traceback as text that a message can carry.

Names of files that are no UTF-8 are in Python's text as lone surrogates, which no message can carry: they are escaped.
"""

from __future__ import annotations

import traceback


def message_of(error: Exception) -> str:
    """What the error says, or what it is if it says nothing."""
    try:
        return sendable(str(error) or repr(error))
    except Exception as broken:  # of somebody else's class: its text must not end the run
        return f"its text cannot be had: {type(broken).__name__}"


def traceback_of(error: Exception) -> str:
    """As Python prints it."""
    return sendable("".join(traceback.format_exception(error)))


def sendable(text: str) -> str:
    """The text with what no message can carry escaped."""
    return text.encode(errors="backslashreplace").decode()

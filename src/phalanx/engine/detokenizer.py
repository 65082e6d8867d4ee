"""Token ids to text while they arrive, never showing half a character.

Most vocabularies write bytes: a byte-level one (GPT-2, Llama 3, Qwen) has a letter for each of the 256 bytes, one made
by sentencepiece (Llama 2, Mistral, Gemma) has text and tokens such as `<0xE2>`. There a token simply *is* bytes, and
text is their incremental UTF-8 decoding: exact, and constant work a token. Others go through `WindowDetokenizer`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import msgspec
from tokenizers import Tokenizer as Vocabulary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
UTF8_LONGEST_BYTES = 4


class Detokenizer(Protocol):
    """One request's text."""

    def feed(self, token_id: int) -> str:
        """Whole characters that this token completes; often none."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for each broken sequence."""


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes.

    `strip_space` drops one space from the very beginning: sentencepiece puts it before the first word of a text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def feed(self, token_id: int) -> str:
        text = self._decoder.decode(self._token_bytes(token_id))
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any vocabulary: decodes a short window of tokens without and with the new ones; the difference is new text.

    The algorithm is that of `detokenize_incrementally` in vLLM, which has it from Hugging Face's
    text-generation-inference. `textless` are tokens that `decode` passes over.
    """

    def __init__(self, decode: Callable[[list[int]], str], textless: Set[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._textless = textless
        self._known = list(context)
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        if token_id in self._textless:
            return ""
        self._pending.append(token_id)
        before, after = self._decode(self._known), self._decode(self._known + self._pending)
        # A character is at most so many tokens: what is broken after that stays broken.
        is_incomplete = after.endswith(REPLACEMENT) and len(self._pending) < UTF8_LONGEST_BYTES
        # A window without text would make the next token look like the beginning of one.
        if is_incomplete or len(after) <= len(before):
            return ""
        self._known, self._pending = self._pending, []
        return after[len(before) :]

    def flush(self) -> str:
        return self._decode(self._known + self._pending)[len(self._decode(self._known)) :]


def bytes_of_piece(vocabulary: Vocabulary) -> Callable[[str], bytes] | None:
    """How this vocabulary's pieces write bytes, read off its decoder; None if they do not."""
    parts = _decoder_parts(vocabulary)
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        return _byte_level_bytes
    if "Replace" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = [(part["pattern"].get("String", ""), part["content"]) for part in parts if part["type"] == "Replace"]
        strips_only_start = all(part["stop"] == 0 for part in parts if part["type"] == "Strip")
        if strips_only_start and all(len(pattern) == 1 for pattern, _ in replaced):
            return _SentencepieceBytes(dict(replaced), has_bytes="ByteFallback" in kinds)
    return None


def strips_leading_space(vocabulary: Vocabulary) -> bool:
    """Whether decoding drops the space that stands before a text's first word."""
    return any(part["type"] == "Strip" and part["start"] > 0 for part in _decoder_parts(vocabulary))


def _decoder_parts(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    if vocabulary.decoder is None:
        return []
    state: dict[str, Any] = msgspec.json.decode(vocabulary.decoder.__getstate__())
    parts: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return parts


class _SentencepieceBytes:
    def __init__(self, replaced: dict[str, str], has_bytes: bool) -> None:
        self._replaced = str.maketrans(replaced)
        self._has_bytes = has_bytes

    def __call__(self, piece: str) -> bytes:
        if self._has_bytes and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes.fromhex(byte[1])
        return piece.translate(self._replaced).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the rest follows from U+0100 on.

    Source: `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
    except KeyError:
        return piece.encode()  # an added token, which is written as plain text

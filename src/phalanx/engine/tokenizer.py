"""Text to token ids and back, with the checkpoint's own tokenizer and chat template. Needs no network and no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Vocabulary

from phalanx.engine.admission import check_unicode
from phalanx.engine.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    bytes_of_piece,
    strips_leading_space,
)
from phalanx.engine.generation_config import GenerationConfig
from phalanx.errors import CheckpointError, RequestError

CONTEXT_TOKENS = 6
"""Prompt tokens that a window detokenizer sees before the output: vLLM starts with as many."""

_NO_FILE = "there is no tokenizer.json in it; --tokenizer names a directory or hub model that has one"


class Tokenizer:
    """Thread-safe: nothing changes after loading but a cache."""

    def __init__(self, source: str, loaded: Any) -> None:
        """`loaded` is a transformers tokenizer that stands on the tokenizers library."""
        self.source = source
        self._loaded = loaded
        self._vocabulary: Vocabulary = loaded.backend_tokenizer
        # A file may carry the truncation and padding of its training run; a prompt must come through whole.
        self._vocabulary.no_truncation()
        self._vocabulary.no_padding()
        added = self._vocabulary.get_added_tokens_decoder()
        base_size: int = self._vocabulary.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max([base_size, *(token_id + 1 for token_id in added)])
        """Ids are below this, added tokens included. The model's embedding may have more rows."""
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes_of_piece = bytes_of_piece(self._vocabulary)
        self._strips_space = strips_leading_space(self._vocabulary)
        self._text_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Load from a checkpoint directory, or by hub name where there is a network. Blocks for a second or two.

        Raises CheckpointError if there is no tokenizer, or none that the tokenizers library can run.
        """
        source = os.path.expanduser(source)
        try:
            loaded = _load(source)
        except Exception as error:  # transformers and tokenizers raise anything, bare Exception too, for a broken file
            raise CheckpointError(f"{source} has no tokenizer that can be loaded: {_why(source, error)}") from error
        if not getattr(loaded, "is_fast", False):
            kind = type(loaded).__name__
            raise CheckpointError(f"{source}: {kind} has no tokenizer.json and cannot be made into one")
        if len(loaded) <= len(loaded.all_special_tokens):  # transformers makes one up for some models
            raise CheckpointError(f"{source} has no tokenizer: {_NO_FILE}")
        return cls(source, loaded)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token. What ends an output is `eos_token_ids(...)`."""
        token_id: int | None = self._loaded.eos_token_id
        return token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the model wants around it (such as BOS) unless told otherwise.

        Raises RequestError if `text` is not to be written in UTF-8.
        """
        try:
            return self._vocabulary.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # which does not say why
            check_unicode("prompt", text)
            raise

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of whole output. What is not UTF-8 becomes U+FFFD."""
        return self._vocabulary.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the checkpoint's chat template (Jinja, run in a sandbox).

        Raises RequestError if there is no template or it refuses the messages.
        """
        from jinja2 import TemplateError

        if self._loaded.chat_template is None:
            raise RequestError("messages", _roles(messages), "this model has no chat template; send a plain prompt")
        try:
            text = self._loaded.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_variables or {}),
            )
        # A template is code of the checkpoint's and stumbles over unforeseen messages in any of these ways.
        except (TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RequestError("messages", _roles(messages), f"the model's chat template says: {error}") from error
        check_unicode("messages", text)
        return self.encode(text, add_special_tokens=False)  # the template has written them

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """A fresh one for text that goes on from this prompt; special tokens have no text."""
        if self._bytes_of_piece is None:
            return WindowDetokenizer(self.decode, self._special_ids, prompt_token_ids[-CONTEXT_TOKENS:])
        starts_text = self._strips_space and all(token_id in self._special_ids for token_id in prompt_token_ids)
        return ByteDetokenizer(self._bytes_in_text, strip_space=starts_text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens as they are written; none for an id without a token."""
        piece = self._vocabulary.id_to_token(token_id)
        if piece is None:
            return b""
        if self._bytes_of_piece is None or token_id in self._special_ids:
            return piece.encode()
        return self._bytes_of_piece(piece)

    def _bytes_in_text(self, token_id: int) -> bytes:
        known = self._text_bytes.get(token_id)
        if known is None:
            known = b"" if token_id in self._special_ids else self.token_bytes(token_id)
            self._text_bytes[token_id] = known
        return known


def eos_token_ids(checkpoint: Path, tokenizer_source: str | Path) -> tuple[int, ...]:
    """Ids that end an output: the generation config's and the tokenizer's own. In chat models they often differ.

    Reads JSON only where it can, so that the engine's process need not load a tokenizer. Raises CheckpointError.
    """
    source = Path(os.path.expanduser(tokenizer_source))
    if (source / "tokenizer.json").is_file() and (source / "tokenizer_config.json").is_file():
        own = _read_eos_token_id(source)
    else:
        own = Tokenizer.load(tokenizer_source).eos_token_id
    return tuple(sorted({*GenerationConfig.read(checkpoint).eos_token_ids(), *([] if own is None else [own])}))


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _VocabularyFile(msgspec.Struct):
    """The part of `tokenizer.json` that is read; msgspec skips over the rest without building it."""

    added_tokens: tuple[_AddedToken, ...] = ()


def _read_eos_token_id(directory: Path) -> int | None:
    try:
        eos = json.loads((directory / "tokenizer_config.json").read_bytes()).get("eos_token")
        vocabulary = msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_VocabularyFile)
    except ValueError as error:
        raise CheckpointError(f"{directory}: its tokenizer's files are not right: {error}") from error
    text = eos["content"] if isinstance(eos, dict) else eos
    return next((token.id for token in vocabulary.added_tokens if token.content == text), None)


def _load(source: str) -> Any:
    if (Path(source) / "tokenizer.json").is_file():
        # This class takes tokenizer.json as it stands; AutoTokenizer brings torch into the process (2 s, 200 MB).
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    from transformers import AutoTokenizer

    # Unless it is told no, transformers asks on the terminal whether to run a checkpoint's own code, and waits.
    return AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir(), trust_remote_code=False)


def _why(source: str, error: Exception) -> str:
    """transformers' own words, except where they speak of something else than what is wrong."""
    path = Path(source)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return _NO_FILE
    if path.is_absolute() and not path.exists():
        return "there is no such directory"
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _roles(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [message.get("role") for message in messages]

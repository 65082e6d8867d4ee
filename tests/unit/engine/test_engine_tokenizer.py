from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_tiny_tokenizers as tiny
import pytest
from transformers import AutoConfig

from phalanx.engine.generation_config import GenerationConfig
from phalanx.engine.tokenizer import Tokenizer, eos_token_ids
from phalanx.errors import CheckpointError, RequestError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save(tiny.byte_level(), tmp_path, eos_token="<|im_end|>", chat_template=tiny.CHAT_TEMPLATE)


def test_encode_and_decode_give_the_text_back(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    text = "the naïve fox 🦊 你好\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_those_of_the_file_as_it_stands(checkpoint: Path) -> None:
    text = "the quick brown fox"
    assert Tokenizer.load(checkpoint).encode(text) == tiny.byte_level().encode(text).ids


def test_truncation_and_padding_of_the_file_do_not_touch_a_prompt(tmp_path: Path) -> None:
    trained = tiny.byte_level()
    trained.enable_truncation(max_length=2)
    trained.enable_padding(length=50)
    tokenizer = Tokenizer.load(tiny.save(trained, tmp_path))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_half_of_a_surrogate_pair_is_the_users_mistake(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    with pytest.raises(RequestError, match="surrogate") as caught:
        tokenizer.encode("fox \ud83e")
    assert (caught.value.field, caught.value.value) == ("prompt", "\ud83e")
    with pytest.raises(RequestError, match="surrogate") as caught:
        tokenizer.apply_chat([{"role": "user", "content": "\ud83e"}])
    assert caught.value.field == "messages"


def test_chat_is_written_by_the_template(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    ids = tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "bad", "content": "hi"}], "no such role"),
        ([], "empty conversation"),
    ],
)
def test_messages_that_the_template_refuses_are_the_users_mistake(
    checkpoint: Path, messages: list[dict[str, str]], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        Tokenizer.load(checkpoint).apply_chat(messages)
    assert caught.value.field == "messages"


def test_no_template_is_the_users_mistake(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.save(tiny.byte_level(), tmp_path))
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])


def test_no_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_called_that() -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        Tokenizer.load("/no/such/directory")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])  # transformers makes an empty one up for Qwen
def test_a_directory_without_a_tokenizer_says_what_to_do(tmp_path: Path, family: str) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in it; --tokenizer names"):
        Tokenizer.load(tmp_path)


def test_variables_too_deep_for_the_template_are_the_users_mistake(checkpoint: Path) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="recursion"):
        Tokenizer.load(checkpoint).apply_chat([{"role": "user", "content": "hi"}], template_variables={"deep": deep})


def test_a_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unheard"}}')
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.load(tmp_path)


def test_token_bytes_are_exact_even_for_parts_of_characters(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    text = "naïve 🦊"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    (added,) = tokenizer.encode("<think and go>")
    assert tokenizer.token_bytes(added) == b"<think and go>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_every_id_is_below_the_vocabulary_size(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.encode("<think and go>") == [tokenizer.vocab_size - 1]


def test_end_of_sequence_ids_come_from_both_files(checkpoint: Path) -> None:
    vocabulary = tiny.byte_level()
    own, other = vocabulary.token_to_id("<|im_end|>"), vocabulary.token_to_id("<|endoftext|>")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, 7]}))
    assert eos_token_ids(checkpoint, checkpoint) == tuple(sorted({own, other, 7}))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": other}))
    assert eos_token_ids(checkpoint, checkpoint) == tuple(sorted({own, other}))


def test_config_json_stands_in_for_a_missing_generation_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"eos_token_id": 5, "model_type": "llama"}))
    assert 5 in eos_token_ids(checkpoint, checkpoint)


def test_default_sampling_is_the_checkpoints_advice(tmp_path: Path) -> None:
    assert GenerationConfig.read(tmp_path).default_sampling().temperature == 1.0
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "transformers_version": "4.51"}'
    )
    sampling = GenerationConfig.read(tmp_path).default_sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 1.0)


def test_a_wrong_generation_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match="temperature"):
        GenerationConfig.read(tmp_path)


@pytest.mark.slow
def test_loading_brings_in_no_torch(checkpoint: Path) -> None:
    code = (
        "import sys; from phalanx.engine.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1])"
        ".apply_chat([{'role': 'user', 'content': 'hi'}]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True, timeout=60)

"""Flags come from the settings: names, help, checks, units."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from msgspec import Meta

from phalanx.cli.documentation import field_texts
from phalanx.cli.maintenance import reload
from phalanx.cli.options import engine_options, given, sampling_options, server_options, shown_name
from phalanx.cli.scale import scale
from phalanx.cli.setting_types import type_for
from phalanx.config import CacheConfig, SchedulerConfig, ServerConfig, settings_by_name
from phalanx.errors import ConfigError
from phalanx.protocol.sampling import SamplingParams


def test_every_setting_has_a_flag_and_a_text() -> None:
    engine = {option.name: option for option in engine_options()}
    assert set(engine) == set(settings_by_name()) - {"model"}
    assert {option.name for option in server_options()} == set(ServerConfig.__struct_fields__)
    assert {option.name for option in sampling_options()} == set(SamplingParams.__struct_fields__)
    assert all(option.help for option in engine.values())


def test_names_aliases_and_booleans() -> None:
    flags = {option.name: (option.opts, option.secondary_opts) for option in engine_options()}
    assert flags["max_num_seqs"] == (["--max-num-seqs"], [])
    assert flags["tensor_parallel_size"] == (["--tensor-parallel-size", "-tp"], [])
    assert flags["pipeline_parallel_size"] == (["--pipeline-parallel-size", "-pp"], [])
    assert flags["async_scheduling"] == (["--async-scheduling"], ["--no-async-scheduling"])


def test_help_is_the_text_under_the_field() -> None:
    texts = field_texts(SchedulerConfig)
    assert (
        texts["max_num_batched_tokens"] == "Most tokens that one step computes. A longer prompt is computed in chunks."
    )
    assert "\n" not in "".join(field_texts(CacheConfig).values())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 2**30),
        ("512MiB", 2**29),
        ("512mib", 2**29),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert type_for("kv_cache_memory", int | None).convert(text, None, None) == size


def test_lists_and_objects() -> None:
    assert type_for("ray_bundle_indices", tuple[int, ...] | None).convert("0, 2,1", None, None) == (0, 2, 1)
    assert type_for("ray_runtime_env", dict[str, Any] | None).convert('{"a": [1]}', None, None) == {"a": [1]}


@pytest.mark.parametrize(
    ("field", "hint", "text", "shown", "allowed"),
    [
        ("max_num_seqs", Annotated[int, Meta(ge=1)], "0", 0, "a whole number, at least 1"),
        ("max_num_seqs", Annotated[int, Meta(ge=1)] | None, "many", "many", "a whole number, at least 1"),
        ("port", Annotated[int, Meta(ge=0, le=65535)], "70000", 70000, "a whole number, at least 0 and at most 65535"),
        ("share", Annotated[float, Meta(gt=0.0, le=1.0)], "1.5", 1.5, "a number, above 0 and at most 1"),
        ("dtype", Literal["a", "b"], "c", "c", "one of a, b"),
        ("kv_cache_memory", Annotated[int, Meta(ge=1)], "5 apples", "5 apples", "512MiB or 2GB"),
        ("kv_cache_memory", Annotated[int, Meta(ge=1)], "0GB", 0, "at least 1"),
        ("kv_cache_memory", Annotated[int, Meta(ge=1)], "9" * 400, "9" * 400, "at least 1"),
        ("seed", int | None, "1.5", 1.5, "a whole number"),
    ],
)
def test_a_wrong_value_is_named(field: str, hint: object, text: str, shown: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        type_for(field, hint).convert(text, None, None)
    assert (caught.value.field, caught.value.value) == (field, shown)
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("flag", ["scale http://127.0.0.1:1 2 --drain-timeout", "reload http://127.0.0.1:1 --timeout"])
@pytest.mark.parametrize("text", ["nan", "-1", "inf"])
def test_what_is_no_number_of_seconds_is_refused_before_anybody_is_asked(flag: str, text: str) -> None:
    command = {"scale": scale, "reload": reload}[flag.split()[0]]
    found = CliRunner().invoke(command, [*flag.split()[1:], text])
    assert found.exit_code == 2 and flag.split()[-1] in found.output, found.output


def test_a_choice_is_one_for_click_too() -> None:
    assert isinstance(type_for("dtype", Literal["a", "b"]), click.Choice)


def test_only_what_was_set_is_passed_on() -> None:
    settings = {"port": None, "host": "h", "stop": (), "async_scheduling": False, "max_num_seqs": 0}
    assert given(settings) == {"host": "h", "async_scheduling": False, "max_num_seqs": 0}
    assert given(settings, ServerConfig) == {"host": "h"}


def test_errors_speak_of_flags() -> None:
    assert shown_name("max_num_seqs") == "--max-num-seqs"
    assert shown_name("temperature") == "--temperature"
    assert shown_name("model") == "MODEL"
    assert shown_name("prompt") == "prompt"

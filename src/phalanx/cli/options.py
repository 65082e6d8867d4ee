"""Flags made from settings: `max_num_seqs` is `--max-num-seqs`, its docstring the help, its constraint the check."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin, get_type_hints

import click
import msgspec
from click.core import ParameterSource

from phalanx.cli.documentation import field_texts
from phalanx.cli.setting_types import type_for
from phalanx.config import Config, ServerConfig
from phalanx.protocol.sampling import SamplingParams

SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "data_parallel_size_local": "-dpl",
}
"""vLLM's short names."""

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})
_TITLES = {
    "model": "Model",
    "parallel": "Parallelism",
    "cache": "KV cache",
    "scheduler": "Scheduling",
    "executor": "Execution",
    "cluster": "Cluster (with --launcher ray)",
    "healing": "Healing",
}


class SettingOption(click.Option):
    """A flag under the heading `section`."""

    def __init__(self, declarations: list[str], *, section: str, **settings: Any) -> None:
        super().__init__(declarations, default=None, **settings)
        self.section = section


class SectionedCommand(click.Command):
    """Lists its flags under their headings, and its own ones first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                rows.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)


def engine_options(*, leave_out: Collection[str] = ()) -> list[click.Parameter]:
    """A flag for each setting of the engine, but for the model itself."""
    hints, without = get_type_hints(Config), {"model", *leave_out}
    return [option for name, title in _TITLES.items() for option in _options(hints[name], title, leave_out=without)]


def server_options() -> list[click.Parameter]:
    """A flag for each setting of the server."""
    return _options(ServerConfig, "Server")


def sampling_options(
    defaults: Mapping[str, Any] = _NOTHING, *, leave_out: Collection[str] = ()
) -> list[click.Parameter]:
    """A flag for each sampling parameter; `defaults` are shown where they differ from the parameters' own."""
    return _options(SamplingParams, "Sampling", defaults=defaults, leave_out=leave_out)


def given(settings: Mapping[str, Any], kind: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    """The settings that the user has set; with `kind`, those that are its fields."""
    names = settings if kind is None else kind.__struct_fields__
    return {name: value for name in names if (value := settings.get(name)) is not None and value != ()}


def given_of(*names: str) -> list[str]:
    """The flags, of those with these names, that the command has."""
    context = click.get_current_context()
    return [flag(name) for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def shown_name(field: str) -> str:
    """How the command line calls a setting; the field itself if it is none."""
    if field == "model":
        return "MODEL"
    known = {option.name for option in (*engine_options(), *server_options(), *sampling_options())}
    return flag(field) if field in known else field


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _options(
    kind: type[msgspec.Struct],
    section: str,
    *,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] = _NOTHING,
) -> list[click.Parameter]:
    hints, texts = get_type_hints(kind, include_extras=True), field_texts(kind)
    return [
        _option(field.name, hints[field.name], texts[field.name], defaults.get(field.name, field.default), section)
        for field in msgspec.structs.fields(kind)
        if field.name not in leave_out
    ]


def _option(name: str, hint: Any, text: str, default: Any, section: str) -> SettingOption:
    if default not in (None, ()):
        text = f"{text} [default: {str(default).lower() if isinstance(default, bool) else default}]"
    if hint is bool:
        return SettingOption([f"{flag(name)}/--no-{flag(name)[2:]}"], section=section, help=text)
    declarations = [flag(name), SHORT[name]] if name in SHORT else [flag(name)]
    if get_origin(hint) is tuple:  # a flag that may be given several times
        kind = type_for(name, get_args(hint)[0])
        return SettingOption(declarations, section=section, help=f"{text} May be repeated.", type=kind, multiple=True)
    return SettingOption(declarations, section=section, help=text, type=type_for(name, hint))

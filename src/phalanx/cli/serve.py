"""`phalanx serve`: a model on an OpenAI-compatible port."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from phalanx.cli.options import SectionedCommand, engine_options, given, server_options
from phalanx.cli.setting_types import type_for
from phalanx.config import Config, ServerConfig, convert
from phalanx.version import __version__

if TYPE_CHECKING:
    from phalanx.server.run import Served


@click.command(cls=SectionedCommand, params=[*server_options(), *engine_options()])
@click.argument("model", type=type_for("model", str))
def serve(model: str, **settings: Any) -> None:
    """Serve MODEL on an OpenAI-compatible port.

    MODEL is a checkpoint directory, a GGUF file or the name of a model on the Hugging Face hub. The first Ctrl-C lets
    running requests finish, the second one does not.
    """
    server = convert(given(settings, ServerConfig), ServerConfig)
    engine_settings = {name: value for name, value in settings.items() if name not in ServerConfig.__struct_fields__}
    config = Config.build(model=model, **given(engine_settings))

    from phalanx.cli.progress import StartScreen
    from phalanx.executor.log_stream import log_to_stderr
    from phalanx.server.run import run_server

    log_to_stderr("phalanx: %(message)s", level=logging.WARNING)
    logging.getLogger("phalanx").setLevel(logging.INFO)
    with StartScreen() as screen:

        def announce(served: Served) -> None:
            screen.close()
            _say(announcement(served))

        run_server(config, server, on_progress=screen.note, on_ready=announce)


def announcement(served: Served) -> str:
    """What stands on the terminal when the server is ready, with a command to paste into a shell."""
    engine = served.engine
    ranks = "1 rank" if engine.world_size == 1 else f"{engine.world_size} ranks"
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "What is gravity?"}]}
    path, asked = ("chat/completions", question) if served.can_chat else ("completions", {"prompt": "Gravity is"})
    body = json.dumps({"model": served.model_name, **asked, "max_tokens": 100})
    headers = ["Content-Type: application/json"]
    if served.needs_key:
        headers.append("Authorization: Bearer YOUR_KEY")
    words = ["curl", f"{served.url}/v1/{path}", *(word for header in headers for word in ("-H", header)), "-d", body]
    return (
        f"Phalanx {__version__} serves {served.model_name} at {served.url}/v1\n"
        f"({engine.dtype} on {engine.device}, {ranks}, {engine.max_model_len} tokens of context, "
        f"{engine.num_blocks * engine.block_size} tokens of KV cache; Ctrl-C stops it). Try it:\n\n"
        f"  {shlex.join(words)}\n"
    )


def _say(text: str) -> None:
    """On stdout, if it takes it: what has no room for a text may have a server."""
    try:
        click.echo(text)
    except OSError as error:
        logging.getLogger("phalanx").warning("stdout cannot be written to: %s", error)
        with open(os.devnull, "wb") as nowhere:  # else Python tries to write the rest when it exits, and fails
            os.dup2(nowhere.fileno(), sys.stdout.fileno())

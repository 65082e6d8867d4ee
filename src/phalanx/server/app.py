"""The HTTP application: which path does what."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from phalanx.errors import PhalanxError, RequestError
from phalanx.server.api_error import as_api_error, json_response
from phalanx.server.api_keys import ApiKeys
from phalanx.server.attendance import ClientGoneError
from phalanx.server.chat import create_chat_completion
from phalanx.server.completions import create_completion
from phalanx.server.gate import Gate
from phalanx.server.health import health
from phalanx.server.maintenance import ReloadRequest, SleepRequest, Upkeep, WakeRequest
from phalanx.server.openapi import describe_bodies
from phalanx.server.request_body import read_request
from phalanx.server.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from phalanx.server.scaling import DrainRequest, ScaleRequest, Scaling
from phalanx.server.service import Service
from phalanx.server.status import StatusReader
from phalanx.server.status_page import HEADERS, page
from phalanx.server.tokenization import detokenize, tokenize, tokenize_chat
from phalanx.version import __version__

ACCEPTED = 202
CLIENT_CLOSED = 499
"""nginx's status for a client that left before its answer: nobody reads it."""

_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/scale": ScaleRequest,
    "/drain": DrainRequest,
    "/reload": ReloadRequest,
    "/sleep": SleepRequest,
    "/wake": WakeRequest,
}


def create_app(service: Service, keys: ApiKeys) -> ASGIApp:
    """The application for one engine. It starts and stops nothing."""
    app = FastAPI(title="Phalanx", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service, keys=keys)
    app.add_exception_handler(PhalanxError, _error_handler(service))
    app.add_exception_handler(HTTPException, _error_handler(service))
    app.add_exception_handler(Exception, _error_handler(service))
    _add_generation(app, service)
    _add_tokenization(app, service)
    _add_scaling(app, service)
    _add_maintenance(app, service)
    _add_information(app, service)
    describe_bodies(app, _BODIES)
    return app


def _error_handler(service: Service) -> Any:
    async def answer_error(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            return Response(status_code=CLIENT_CLOSED)
        reported = as_api_error(error)
        service.metrics.count_refused(reported.status)
        return reported.response()

    return answer_error


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await create_completion(request, service)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(request, service)


def _add_tokenization(app: FastAPI, service: Service) -> None:
    tokenizer = service.engine.tokenizer

    @app.post("/tokenize")
    async def tokenize_text(request: Request) -> Response:
        asked = await read_request(request, TokenizeRequest, service)
        service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("prompt", asked.prompt, "send either prompt or messages")
        if asked.prompt is not None:
            (tokens,) = await tokenize(tokenizer, [asked.prompt], add_special_tokens=asked.add_special_tokens)
        else:
            messages = asked.messages or []
            tokens = await tokenize_chat(tokenizer, messages, add_generation_prompt=asked.add_generation_prompt)
        limit = service.engine.info.max_model_len
        return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

    @app.post("/detokenize")
    async def detokenize_tokens(request: Request) -> Response:
        asked = await read_request(request, DetokenizeRequest, service)
        service.check_model(asked.model)
        for token in asked.tokens:
            if not 0 <= token < tokenizer.vocab_size:
                raise RequestError("tokens", token, f"this model's ids go from 0 to {tokenizer.vocab_size - 1}")
        (text,) = await detokenize(tokenizer, [asked.tokens], skip_special_tokens=False)
        return json_response({"prompt": text})


def _add_scaling(app: FastAPI, service: Service) -> None:
    scaling = Scaling(service)

    @app.post("/scale")
    async def scale(request: Request) -> Response:
        return json_response(await scaling.begin(await read_request(request, ScaleRequest, service)), ACCEPTED)

    @app.post("/drain")
    async def drain(request: Request) -> Response:
        return json_response(await scaling.drain(await read_request(request, DrainRequest, service)), ACCEPTED)

    @app.get("/scale")
    async def get_scale() -> Response:
        return json_response(scaling.report(), headers={"Cache-Control": "no-store"})

    @app.delete("/scale")
    async def cancel_scale() -> Response:
        return json_response(scaling.cancel(), ACCEPTED)


def _add_maintenance(app: FastAPI, service: Service) -> None:
    upkeep = Upkeep(service)

    @app.post("/reload")
    async def reload(request: Request) -> Response:
        return json_response(await upkeep.reload(await read_request(request, ReloadRequest, service)))

    @app.post("/sleep")
    async def sleep(request: Request) -> Response:
        return json_response(await upkeep.sleep(await read_request(request, SleepRequest, service)))

    @app.post("/wake")
    async def wake(request: Request) -> Response:
        return json_response(await upkeep.wake(await read_request(request, WakeRequest, service)))

    @app.get("/maintenance")
    async def get_maintenance() -> Response:
        return json_response(upkeep.report(), headers={"Cache-Control": "no-store"})


def _add_information(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "phalanx",
            "max_model_len": service.engine.info.max_model_len,  # an engine that is started again may have another
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return json_response(model())

    @app.get("/health")
    async def get_health() -> Response:
        # Nothing is awaited here, so that it always answers at once.
        found = health(service.engine.conditions(), service.refusal())
        return json_response(found.body, found.status)

    reader = StatusReader(service)

    @app.get("/status")
    async def status_page() -> Response:
        return Response(page(await reader.read()), headers=HEADERS, media_type="text/html; charset=utf-8")

    @app.get("/status.json")
    async def status() -> Response:
        return json_response(await reader.read(), headers={"Cache-Control": "no-store"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

"""/openapi.json: FastAPI knows the paths, msgspec the bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI


def describe_bodies(app: FastAPI, body_of: Mapping[str, type[msgspec.Struct]]) -> None:
    """Add to the app's OpenAPI document what each path of `body_of` takes. Call it when all routes are there."""
    references, schemas = msgspec.json.schema_components(body_of.values(), ref_template="#/components/schemas/{name}")
    document: dict[str, Any] = app.openapi()  # FastAPI keeps this one and serves it
    for path, reference in zip(body_of, references, strict=True):
        content = {"application/json": {"schema": reference}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)

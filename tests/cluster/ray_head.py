"""A server that speaks as much of the protocol of Ray's head as it takes to ask whether it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from tls_files import TlsFiles


@contextmanager
def head(
    token: str | None = None, *, is_ray: bool = True, delay_s: float = 0.0, tls: TlsFiles | None = None
) -> Iterator[str]:
    """The address of one that asks for `token` and answers after `delay_s`."""

    def answer(request: bytes, context: Any) -> bytes:
        time.sleep(delay_s)
        sent = dict(context.invocation_metadata()).get("authorization")
        if token is not None and sent != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(ThreadPoolExecutor(1))
    if is_ray:
        server.add_generic_rpc_handlers((handler,))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()

"""A program that a SPIFFE conformance suite can drive: harness contract version 1.

    SPIFFE_ENDPOINT_SOCKET=unix:/run/agent.sock python -m ztmtls.testing.harness

It takes its identity from the Workload API and opens two ports on 127.0.0.1, which it prints:

- ``SPIFFE_X509_PORT``: mutual TLS. The peer's SPIFFE ID and a newline are written to whoever presents a
  valid X.509-SVID; anybody else is dropped without a byte.
- ``SPIFFE_CONTROL_PORT``: HTTP/1.1 with JSON. ``POST /v1/x509/dial`` connects to an address as a client;
  ``POST /v1/jwt/validate`` and ``POST /v1/jwt/fetch`` do the same for JWT-SVIDs; ``GET /v1/info`` says what
  this is.

``READY`` follows once the first SVID has arrived. SIGTERM ends it. Every verified peer is accepted: what is
tested is authentication, so this never belongs into production. Needs ``ztmtls[client]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

from aiohttp import web

from ztmtls.audit import AuditLog
from ztmtls.ids import SpiffeId
from ztmtls.jwt_source import JwtSource, NoBundles
from ztmtls.reasons import Reason, Refusal
from ztmtls.source import Source, X509Source
from ztmtls.tls import client_context, connection_of, reason_of, server_context

HOST = "127.0.0.1"
ENDPOINTS = ("/v1/x509/dial", "/v1/jwt/validate", "/v1/jwt/fetch")

Operation = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""One control endpoint: takes the request's JSON object, returns the answer's. A `Refusal` is "rejected"."""

# These say that the dial did not come as far as a verdict on the server's certificate.
_NO_VERDICT = frozenset(
    {
        Reason.NO_IDENTITY,
        Reason.IDENTITY_EXPIRED,
        Reason.IDENTITY_DENIED,
        Reason.NOT_TLS,
        Reason.REFUSED_BY_SERVER,
        Reason.TLS_FAILURE,
    }
)


def anyone(peer: SpiffeId, /) -> None:
    """The authorizer of the contract: every verified peer."""


async def listen(source: Source, *, audit: AuditLog | None = None) -> asyncio.Server:
    """Serve the X.509 port on a free port of 127.0.0.1."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = connection_of(writer.get_extra_info("ssl_object")).peer
        with contextlib.suppress(OSError):
            writer.write(f"{peer.id}\n".encode())
            writer.close()
            await writer.wait_closed()

    return await asyncio.start_server(
        greet,
        HOST,
        0,
        ssl=server_context(source, audit=audit),
        ssl_handshake_timeout=5,
        ssl_shutdown_timeout=1,
    )


async def dial(source: Source, address: str) -> SpiffeId:
    """Connect to ``host:port`` by mutual TLS and return the server's verified ID.

    Raises `ssl.SSLError` (`tls.reason_of` tells why) when it is refused, `OSError` when nobody answers, and
    `ValueError` for what is no address.
    """
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(
        host.strip("[]"),
        int(port),
        ssl=client_context(source, anyone),
        ssl_handshake_timeout=5,
        ssl_shutdown_timeout=1,
    )
    try:
        return connection_of(writer.get_extra_info("ssl_object")).peer.id
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def control(operations: Mapping[str, Operation]) -> web.Application:
    """The control port. An endpoint that has no operation answers 501."""

    async def info(request: web.Request) -> web.Response:
        return web.json_response(
            {
                "sdk": "ztmtls",
                "sdk_version": version("ztmtls"),
                "language": f"python {platform.python_version()}",
            }
        )

    async def run(request: web.Request) -> web.Response:
        operation = operations.get(request.path)
        if operation is None:
            return _answer(501, "unsupported", f"{request.path} is not supported")
        try:
            body = await request.json()
            return web.json_response({"status": "ok"} | await operation(body))
        except Refusal as refusal:
            return _answer(422, "rejected", str(refusal))
        except Exception as error:
            # The contract's answer to anything that is no verdict. The text may quote the request only.
            return _answer(500, "error", f"{type(error).__name__}: {error}")

    application = web.Application()
    application.add_routes([web.get("/v1/info", info), *(web.post(path, run) for path in ENDPOINTS)])
    return application


def _answer(code: int, status: str, message: str) -> web.Response:
    return web.json_response({"status": status, "message": message}, status=code)


def x509_dial(source: Source) -> Operation:
    """The operation ``/v1/x509/dial`` for `source`."""

    async def operation(body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"spiffe_id": str(await dial(source, body["address"]))}
        except ssl.SSLError as error:
            reason = reason_of(error)
            if reason in _NO_VERDICT:
                raise
            raise Refusal(reason, str(error)) from error

    return operation


def jwt_validate(source: JwtSource) -> Operation:
    """The operation ``/v1/jwt/validate`` for `source`."""

    async def operation(body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            svid = await source.validate(body["token"], body["audience"])
        except NoBundles as refusal:  # no verdict on the token
            raise RuntimeError(str(refusal)) from refusal
        return {"spiffe_id": str(svid.id), "claims": dict(svid.claims)}

    return operation


def jwt_fetch(source: JwtSource) -> Operation:
    """The operation ``/v1/jwt/fetch`` for `source`."""

    async def operation(body: Mapping[str, Any]) -> dict[str, Any]:
        svid = await source.fetch(*body["audience"], spiffe_id=body.get("spiffe_id") or None, fresh=True)
        return {"svids": [{"spiffe_id": str(svid.id), "token": svid.token, "hint": ""}]}

    return operation


async def run() -> None:
    """Serve until SIGTERM."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with X509Source() as source, JwtSource() as jwt_source:
        operations = {
            "/v1/x509/dial": x509_dial(source),
            "/v1/jwt/validate": jwt_validate(jwt_source),
            "/v1/jwt/fetch": jwt_fetch(jwt_source),
        }
        runner = web.AppRunner(control(operations), access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, HOST, 0, shutdown_timeout=1)
            await site.start()
            server = await listen(source)
            await source.ready()
            print("SPIFFE_HARNESS_VERSION=1")
            print(f"SPIFFE_X509_PORT={server.sockets[0].getsockname()[1]}")
            print(f"SPIFFE_CONTROL_PORT={runner.addresses[0][1]}")
            print("READY", flush=True)
            # Not serve_forever: from Python 3.12 on it waits for connections that are still open.
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


def main() -> int:
    """The exit status: 0 after SIGTERM, 2 when the Workload API's address can't be used."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        asyncio.run(run())
    except asyncio.CancelledError:
        return 0
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

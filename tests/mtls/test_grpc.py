"""gRPC: what `ztmtls.grpc` refuses, each next to the call that it lets through."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.mtls.conftest import CALLER, SERVER, STRANGER
from ztmtls import Policy, Reason, StaticSource, X509Svid
from ztmtls.audit import AuditLog
from ztmtls.grpc import Guard, _copy, _presented, channel, peer, server_credentials
from ztmtls.material import load_svid
from ztmtls.testing import CertificateAuthority
from ztmtls.verify import PeerRefused

HELLO, WATCH, COUNT = (f"/greeter.Greeter/{name}" for name in ("Hello", "Watch", "Count"))
POLICY = Policy.parse(
    {
        "version": 1,
        "rules": [
            {
                "name": "caller-greets",
                "callers": [CALLER],
                "methods": ["POST"],
                "paths": [HELLO, WATCH, COUNT],
            }
        ],
    }
)


@dataclass
class Served:
    """A gRPC server on a free port, and what it saw."""

    source: StaticSource
    port: int = 0
    audit_stream: io.StringIO = field(default_factory=io.StringIO)
    handled: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def denied(self) -> list[str]:
        lines = [json.loads(line) for line in self.audit_stream.getvalue().splitlines()]
        return [line["reason"] for line in lines if line["decision"] == "deny"]

    async def hello(self, request: bytes, context: Any) -> bytes:
        self.handled.append(str(peer().id))
        return f"hello, {peer().id}".encode()

    async def watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.handled.append(str(peer().id))
        yield b"watching"
        await asyncio.Event().wait()

    async def count(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return str(len([request async for request in requests])).encode()


@contextlib.asynccontextmanager
async def serving(source: StaticSource) -> AsyncIterator[Served]:
    served = Served(source)
    guard = Guard(source, policy=POLICY, audit=AuditLog("server", served.audit_stream))
    server = grpc.aio.server(interceptors=[guard])
    handlers = {
        "Hello": grpc.unary_unary_rpc_method_handler(served.hello),
        "Watch": grpc.unary_stream_rpc_method_handler(served.watch),
        "Count": grpc.stream_unary_rpc_method_handler(served.count),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("greeter.Greeter", handlers),))
    served.port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    await server.start()
    try:
        yield served
    finally:
        await server.stop(0)


@pytest.fixture
async def served(server_source: StaticSource) -> AsyncIterator[Served]:
    async with serving(server_source) as server:
        yield server


async def call(served: Served, source: StaticSource, method: str = HELLO, expected: str = SERVER) -> bytes:
    async with channel(source, served.target, peer=expected) as opened:
        answer: bytes = await opened.unary_unary(method)(b"", timeout=10)
        return answer


async def refusal(served: Served, source: StaticSource, **more: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(served, source, **more)
    return refused.value.code(), refused.value.details() or ""


async def test_a_handler_knows_its_verified_caller(served: Served, caller: StaticSource) -> None:
    assert await call(served, caller) == f"hello, {CALLER}".encode()


async def test_each_kind_of_rpc_is_served(served: Served, caller: StaticSource) -> None:
    async with channel(caller, served.target, peer=SERVER) as opened:
        assert await opened.stream_unary(COUNT)(iter([b"a", b"b"]), timeout=10) == b"2"
        stream = opened.unary_stream(WATCH)(b"")
        assert await stream.read() == b"watching"
        stream.cancel()


async def test_chains_with_intermediates_are_verified() -> None:
    ca = CertificateAuthority("zt.example", upstream=True)
    async with serving(StaticSource(ca.context(ca.issue(SERVER)))) as served:
        assert await call(served, StaticSource(ca.context(ca.issue(CALLER)))) == f"hello, {CALLER}".encode()


async def test_a_caller_no_rule_names_is_refused(
    served: Served, ca: CertificateAuthority, caller: StaticSource
) -> None:
    assert await call(served, caller)

    code, said = await refusal(served, StaticSource(ca.context(ca.issue(STRANGER))))

    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert said.startswith(Reason.CALLER_NOT_ALLOWED)
    assert served.denied == [Reason.CALLER_NOT_ALLOWED]
    assert served.handled == [CALLER]


@pytest.mark.parametrize("method", ["/greeter.Greeter/Absent", "/other.Service/Hello"])
async def test_a_method_no_rule_allows_is_refused_whether_or_not_it_exists(
    served: Served, caller: StaticSource, method: str
) -> None:
    assert await call(served, caller)

    code, said = await refusal(served, caller, method=method)

    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert said.startswith(Reason.ROUTE_NOT_ALLOWED)


Forge = Callable[[CertificateAuthority, CertificateAuthority], X509Svid]
FORGED: dict[str, tuple[Forge, Reason]] = {
    "by the authority of another domain": (lambda ca, other: other.issue(CALLER), Reason.UNTRUSTED_AUTHORITY),
    "with two URI SANs": (
        lambda ca, other: ca.issue(CALLER, uris=[CALLER, STRANGER]),
        Reason.MULTIPLE_URI_SANS,
    ),
    "that may sign certificates": (
        lambda ca, other: ca.issue(CALLER, key_usage={"digital_signature", "key_cert_sign"}),
        Reason.LEAF_CAN_SIGN_CERTIFICATES,
    ),
}


@pytest.mark.parametrize("what", FORGED)
async def test_certificates_that_gRPC_itself_accepts_are_verified(  # noqa: N802
    ca: CertificateAuthority, what: str
) -> None:
    other = CertificateAuthority("other.example")
    forge, reason = FORGED[what]
    async with serving(StaticSource(ca.context(ca.issue(SERVER), federates_with=[other]))) as served:
        assert await call(served, StaticSource(ca.context(ca.issue(CALLER))))

        code, said = await refusal(served, StaticSource(ca.context(forge(ca, other))))

        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert said.startswith(reason)
        assert served.handled == [CALLER]


async def test_a_stranger_to_every_authority_fails_in_tls(
    served: Served, ca: CertificateAuthority, caller: StaticSource
) -> None:
    assert await call(served, caller)
    stranger = CertificateAuthority("zt.example")

    code, _ = await refusal(served, StaticSource(stranger.context(stranger.issue(CALLER))))

    assert code is grpc.StatusCode.UNAVAILABLE
    assert served.handled == [CALLER]


async def test_a_caller_without_tls_is_not_served(served: Served, caller: StaticSource) -> None:
    assert await call(served, caller)
    async with grpc.aio.insecure_channel(served.target) as opened:
        with pytest.raises(grpc.aio.AioRpcError):
            await opened.unary_unary(HELLO)(b"", timeout=10)
    assert served.handled == [CALLER]


async def test_a_port_without_tls_serves_nobody(server_source: StaticSource) -> None:
    served = Served(server_source)
    server = grpc.aio.server(
        interceptors=[Guard(server_source, policy=POLICY, audit=AuditLog("s", io.StringIO()))]
    )
    handlers = {"Hello": grpc.unary_unary_rpc_method_handler(served.hello)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("greeter.Greeter", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            with pytest.raises(grpc.aio.AioRpcError, match=Reason.NO_CERTIFICATE):
                await opened.unary_unary(HELLO)(b"", timeout=10)
    finally:
        await server.stop(0)
    assert served.handled == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
async def test_tls_1_3_is_demanded(
    served: Served, caller: StaticSource, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cadata=b"".join(b.der() for b in caller.context.bundles.values()))
    context.check_hostname = False
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    load_svid(context, caller.context.svid)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
        await asyncio.gather(_copy(reader, far[1]), _copy(far[0], writer), return_exceptions=True)

    async with (
        await asyncio.start_unix_server(forward, tmp_path / "s"),
        grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as opened,
    ):
        if version is ssl.TLSVersion.TLSv1_3:
            assert await opened.unary_unary(HELLO)(b"", timeout=10)
        else:
            with pytest.raises(grpc.aio.AioRpcError, match=Reason.TLS_FAILURE):
                await opened.unary_unary(HELLO)(b"", timeout=10)
            assert served.handled == []


def test_a_connection_gRPC_says_too_little_about_is_refused() -> None:  # noqa: N802
    facts: dict[str, list[bytes]] = {
        "transport_security_type": [b"ssl"],
        "x509_pem_cert": [b"leaf"],
        "ssl_tls_version": [b"TLSv1.3"],
        "ssl_session_reused": [b"false"],
    }
    assert _presented(facts)
    with pytest.raises(PeerRefused) as refused:
        _presented(facts | {"ssl_session_reused": [b"true"]})
    assert refused.value.reason is Reason.SESSION_RESUMED
    for missing in facts:
        with pytest.raises(PeerRefused):
            _presented({name: values for name, values in facts.items() if name != missing})


async def test_new_connections_use_the_newest_svid(
    served: Served, ca: CertificateAuthority, caller: StaticSource
) -> None:
    assert await call(served, caller)
    ca.prepare()
    ca.activate()
    old = ca.authorities[0]
    served.source.set(ca.context(ca.issue(SERVER)))
    caller.set(ca.context(ca.issue(CALLER)))
    ca.retire(old)
    caller.set(ca.context(caller.context.svid))  # knows the new authority alone

    assert await call(served, caller) == f"hello, {CALLER}".encode()


async def test_without_an_identity_of_its_own_a_server_serves_nothing(
    served: Served, caller: StaticSource
) -> None:
    assert await call(served, caller)
    served.source.deny()

    code, said = await refusal(served, caller)

    assert code is grpc.StatusCode.UNAVAILABLE
    assert said.startswith(Reason.IDENTITY_DENIED)


async def test_a_stream_ends_when_its_caller_is_no_longer_acceptable(
    served: Served, ca: CertificateAuthority, caller: StaticSource
) -> None:
    async with channel(caller, served.target, peer=SERVER) as opened:
        stream = opened.unary_stream(WATCH)(b"")
        assert await stream.read() == b"watching"
        ca.prepare()
        ca.activate()
        ca.revoke(ca.authorities[0])

        served.source.set(ca.context(ca.issue(SERVER)))

        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async with asyncio.timeout(10):
                await stream.read()
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (ended.value.details() or "").startswith(Reason.UNTRUSTED_AUTHORITY)
    assert served.denied == [Reason.UNTRUSTED_AUTHORITY]


async def test_a_server_with_another_identity_receives_nothing(
    served: Served, caller: StaticSource, caplog: pytest.LogCaptureFixture
) -> None:
    assert await call(served, caller)
    audit = io.StringIO()

    with caplog.at_level(logging.WARNING, "ztmtls.grpc"):
        async with channel(caller, served.target, peer=STRANGER, audit=AuditLog("caller", audit)) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await opened.unary_unary(HELLO)(b"", timeout=10)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert Reason.WRONG_SERVER_IDENTITY in caplog.text
    assert json.loads(audit.getvalue().splitlines()[0])["reason"] == Reason.WRONG_SERVER_IDENTITY
    assert served.handled == [CALLER]


async def test_a_client_leaves_a_server_that_is_no_longer_acceptable(
    served: Served, ca: CertificateAuthority, caller: StaticSource
) -> None:
    async with channel(caller, served.target, peer=SERVER) as opened:
        stream = opened.unary_stream(WATCH)(b"")
        assert await stream.read() == b"watching"
        ca.prepare()
        ca.activate()
        ca.revoke(ca.authorities[0])

        caller.set(ca.context(ca.issue(CALLER)))

        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async with asyncio.timeout(10):
                await stream.read()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_closing_a_channel_is_quiet(
    served: Served, caller: StaticSource, caplog: pytest.LogCaptureFixture
) -> None:
    async with channel(caller, served.target, peer=SERVER) as opened:
        stream = opened.unary_stream(WATCH)(b"")
        assert await stream.read() == b"watching"
    await asyncio.sleep(0)
    assert caplog.records == []


async def test_another_process_cannot_use_the_channel(
    served: Served, caller: StaticSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = """
import sys, grpc
with grpc.insecure_channel("unix:" + sys.argv[1]) as opened:
    try:
        print(opened.unary_unary("/greeter.Greeter/Hello")(b"", timeout=10))
    except grpc.RpcError as error:
        print(error.code().name)
"""
    async with channel(caller, served.target, peer=SERVER) as opened:
        assert await opened.unary_unary(HELLO)(b"", timeout=10)
        [path] = tmp_path.glob("ztmtls-*/h2")
        assert os.stat(path.parent).st_mode & 0o077 == 0

        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(path), stdout=subprocess.PIPE
        )
        said, _ = await other.communicate()

    assert re.fullmatch(rb"UNAVAILABLE|DEADLINE_EXCEEDED", said.strip())
    assert served.handled == [CALLER]


async def test_a_handler_that_is_not_asynchronous_is_not_run(
    server_source: StaticSource, caller: StaticSource
) -> None:
    served = Served(server_source)

    def blocking(request: bytes, context: Any) -> bytes:
        served.handled.append("blocking")
        return b""

    server = grpc.aio.server(
        interceptors=[Guard(server_source, policy=POLICY, audit=AuditLog("s", io.StringIO()))]
    )
    handlers = {
        "Hello": grpc.unary_unary_rpc_method_handler(blocking),
        "Count": grpc.stream_unary_rpc_method_handler(served.count),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("greeter.Greeter", handlers),))
    served.port = server.add_secure_port("127.0.0.1:0", server_credentials(server_source))
    await server.start()
    try:
        async with channel(caller, served.target, peer=SERVER) as opened:
            assert await opened.stream_unary(COUNT)(iter([b"a"]), timeout=10) == b"1"
            with pytest.raises(grpc.aio.AioRpcError):
                await opened.unary_unary(HELLO)(b"", timeout=10)
    finally:
        await server.stop(0)
    assert served.handled == []

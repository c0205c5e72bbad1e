"""Trouble with key material and TLS contexts: stale trust, keys on disk, contexts that change or pile up."""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import signal
import socket
import ssl
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.conformance.clauses import BOTH
from tests.conformance.conftest import PEER, OurSide, agent, our_side
from tests.conformance.peers import HOST, plain_context
from tests.mtls.conftest import CALLER, DOMAIN, SERVER, serving, until
from tests.processes import open_files
from tests.spire.load import load_on
from ztmtls.client import AsyncClient, Client, hop
from ztmtls.reasons import Reason
from ztmtls.server import _loop_factory
from ztmtls.source import StaticSource
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority, WorkloadApi
from ztmtls.testing.harness import anyone, dial
from ztmtls.tls import GenerationContext, RotatingContext, client_context, connection_of, server_context

from .conftest import identity, leaf_of, service
from .test_whose_identity import REPOSITORY, keywords

# --- trust that is renewed ----------------------------------------------------------------------------


async def test_new_authority_is_loaded_and_the_old_one_dropped_in_both_directions(
    ca: CertificateAuthority,
) -> None:
    """Handlers looked at the leaf only, so a new CA was not loaded; contexts only add, so an old one stayed.

    Here a change of the bundle alone is a change, and each one makes a new context with exactly its CAs.
    """
    async with agent(ca) as workload, our_side(workload) as ours:
        server, client = server_context(ours.source), client_context(ours.source, anyone)

        async def accepted(old: X509Svid, new: X509Svid) -> list[str | Reason]:
            verdicts = [await ours.verdict(role, svid) for role in BOTH for svid in (old, new)]
            for context in (server, client):
                assert isinstance(context, RotatingContext)
                assert len(context.newest().get_ca_certs()) == len(ca.bundle.authorities)
            return verdicts

        first = ca.active
        svid = workload.svid
        second = ca.prepare()
        await bundle_arrived(ours)
        assert ours.source.context.svid.serial == svid.serial, "only the bundle has changed"
        old, new = ca.issue(PEER, authority=first), ca.issue(PEER, authority=second)
        assert await accepted(old, new) == [PEER] * 4

        ca.activate()
        ca.retire(first)
        await bundle_arrived(ours)
        untrusted = Reason.UNTRUSTED_AUTHORITY
        assert await accepted(old, new) == [untrusted, PEER] * 2

        for _ in range(50):
            former = ca.active
            ca.prepare()
            ca.activate()
            ca.retire(former)
        await bundle_arrived(ours)
        assert await accepted(new, ca.issue(PEER)) == [untrusted, PEER] * 2


async def bundle_arrived(ours: OurSide) -> None:
    await until(lambda: ours.source.context.bundles[ours.ca.trust_domain] == ours.ca.bundle, 15)


@pytest.mark.parametrize("partial_chain", [True, False])
async def test_intermediates_are_sent_by_both_sides_and_may_rotate(partial_chain: bool) -> None:
    """Below an upstream root, peers failed with "unable to get local issuer": only the leaf was sent.

    Here both sides send the whole chain, to plain OpenSSL that knows the root alone; and no request fails
    while the intermediate is replaced.
    """
    ca = CertificateAuthority(DOMAIN, upstream=True)
    caller, server = StaticSource(ca.context(ca.issue(CALLER))), StaticSource(ca.context(ca.issue(SERVER)))
    (root,) = ca.bundle.authorities
    assert caller.context.svid.leaf.issuer != root.subject

    def stock(side: ssl._SSLMethod) -> ssl.SSLContext:
        context = plain_context(side, ca.issue(PEER), ca.bundle)
        context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        if partial_chain:
            context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        return context

    accepted = asyncio.Event()

    def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        writer.transport.abort()

    stock_server = await asyncio.start_server(take, HOST, 0, ssl=stock(ssl.PROTOCOL_TLS_SERVER))
    async with stock_server:
        await dial(caller, f"{HOST}:{stock_server.sockets[0].getsockname()[1]}")
        async with asyncio.timeout(5):
            await accepted.wait()

    async with serving(server) as served:
        context = stock(ssl.PROTOCOL_TLS_CLIENT)
        _, writer = await asyncio.open_connection(HOST, served.port, ssl=context)
        writer.transport.abort()

        async with served.client(caller) as client, load_on(client) as load:
            for _ in range(5):
                ca.prepare(new_root=False)
                ca.activate()
                server.set(ca.context(ca.issue(SERVER)))
                caller.set(ca.context(ca.issue(CALLER)))
                new = {source.context.svid.serial for source in (server, caller)}
                await until(lambda: new <= load.caller_serials | load.server_serials)  # noqa: B023
        assert load.failed == {}
        assert ca.bundle.authorities == (root,)


# --- keys ---------------------------------------------------------------------------------------------


async def test_private_key_reaches_no_file_however_often_it_rotates(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    """`load_cert_chain` wants a file, so keys lay in temporary files that outlived a crash.

    Here they go through memory: over 1,000 rotations nothing is opened for writing, so a read-only file
    system will do, and no file descriptor is left.
    """
    opened: list[str] = []
    active = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(args[0], str):
            mode, flags = args[1], args[2]
            if (mode and set(mode) & set("wax+")) or (flags & (os.O_WRONLY | os.O_RDWR)):
                opened.append(args[0])

    svids = [ca.issue(SERVER) for _ in range(20)]
    source = StaticSource(ca.context(svids[0]))
    context = server_context(source)
    assert isinstance(context, RotatingContext)
    context.newest()
    before = open_files()
    sys.addaudithook(hook)
    (tmp_path / "seen").write_text("the hook sees what is written")
    for turn in range(1000):
        source.set(ca.context(svids[turn % len(svids)]))
        context.newest()
    active = False
    assert opened == [str(tmp_path / "seen")]
    assert open_files() - before == set()


def test_where_the_key_needs_a_file_it_is_private_and_removed_at_once(
    ca: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key files had the mode that the umask happened to give. This is the way for systems without memfd."""
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes: list[int] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, path: Any, *more: Any) -> None:
        modes.extend(stat.S_IMODE(each.stat().st_mode) for each in (Path(path), Path(path).parent))
        load(self, path, *more)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    context = server_context(StaticSource(ca.context(ca.issue(SERVER))))
    umask = os.umask(0)
    try:
        context.newest()  # type: ignore[attr-defined]
    finally:
        os.umask(umask)
    assert modes == [0o600, 0o700]
    assert list(tmp_path.iterdir()) == []


async def test_process_that_is_killed_while_it_rotates_leaves_no_key(
    api: WorkloadApi, ca: CertificateAuthority, tmp_path: Path
) -> None:
    """A crash between writing a key file and removing it left the key for whoever came next."""
    workload = await api.add_workload("server", SERVER, ca=ca)
    async with service(workload.endpoint, workload=workload, TMPDIR=str(tmp_path)) as running:
        await running.answers("/readyz", 200)
        served: set[x509.Certificate] = set()
        async with asyncio.timeout(30):
            while len(served) < 20:
                workload.rotate()
                served.add(await leaf_of(running, ca))
        workload.rotate()
        running.process.send_signal(signal.SIGKILL)
        await running.ended()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "PRIVATE KEY" not in running.said


# --- contexts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_rotation_amid_handshakes_breaks_none_and_mixes_no_updates(loop: Any) -> None:
    """A context that was changed while handshakes ran crashed the interpreter, or paired key and leaf wrong.

    Here a context is built per update and never changed: each of thousands of new connections has the leaf,
    the key and the CAs of one and the same update.
    """

    async def main() -> None:
        async with WorkloadApi() as api:
            ca = CertificateAuthority(DOMAIN)
            friend = [CertificateAuthority("friend.example") for _ in range(3)]
            async with identity(api, ca, "both", SERVER) as (workload, source):
                sent: dict[str, set[bytes]] = {}
                server = await asyncio.start_server(
                    lambda _, writer: writer.close(), HOST, 0, ssl=server_context(source)
                )
                context = client_context(source, anyone)
                done = 0
                stop = False

                async def connect() -> None:
                    nonlocal done
                    while not stop:
                        _, writer = await asyncio.open_connection(
                            *server.sockets[0].getsockname(), ssl=context
                        )
                        tls = writer.get_extra_info("ssl_object")
                        serial = connection_of(tls).own.serial
                        writer.transport.abort()
                        if serial in sent:  # not the very first one
                            assert set(tls.context.get_ca_certs(binary_form=True)) == sent[serial]
                            done += 1

                async with server, asyncio.TaskGroup() as group:
                    for _ in range(12):
                        group.create_task(connect())
                    for turn in range(60):
                        svid = ca.issue(SERVER)
                        other = friend[turn % len(friend)].bundle
                        sent[svid.serial] = {
                            authority.public_bytes(Encoding.DER)
                            for authority in ca.bundle.authorities + other.authorities
                        }
                        workload.push(svid, federated={str(other.trust_domain.id): other.der()})
                        await asyncio.sleep(0.05)  # the pace of the updates, not a wait
                    stop = True
                assert done > 200
                assert source.context.generation > 30

    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())


def live_contexts() -> set[GenerationContext]:
    gc.collect()
    return {each for each in gc.get_objects() if isinstance(each, GenerationContext)}


def resident() -> int:
    """Bytes of memory that are resident (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_contexts_of_former_rotations_are_not_kept(ca: CertificateAuthority) -> None:
    """A context per request or per rotation, never let go, cost megabytes each, and sockets with them.

    Here there is one per side and generation: after hundreds of rotations memory, contexts, connections and
    file descriptors are what they were.
    """
    others = live_contexts()  # what tests before this one left
    caller, server = StaticSource(ca.context(ca.issue(CALLER))), StaticSource(ca.context(ca.issue(SERVER)))
    async with serving(server) as served, served.client(caller) as client:

        async def rotate(times: int) -> None:
            for _ in range(times):
                caller.set(ca.context(ca.issue(CALLER)))
                server.set(ca.context(ca.issue(SERVER)))
                assert (await client.get("/thing")).status_code == 200
            served.seen.clear()
            await until(lambda: served.connections == 1)

        async def requests(times: int) -> set[str]:
            return {hop(await client.get("/thing")).connection for _ in range(times)}

        await rotate(30)
        contexts, memory, files = len(live_contexts() - others), resident(), open_files()
        assert len(await requests(100)) == 1, "one connection, so one context"
        await rotate(200)
        assert len(live_contexts() - others) <= contexts
        assert contexts <= 4
        assert resident() - memory < 20 << 20
        assert len(open_files() - files) <= 2  # the connection of now


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_answer_does_not_wait_for_an_acknowledgement(loop: Any) -> None:
    """Calls over TLS took 40 ms and more for no visible reason: Nagle's algorithm met delayed ACKs."""

    async def main() -> None:
        ca = CertificateAuthority(DOMAIN)
        caller = StaticSource(ca.context(ca.issue(CALLER)))
        async with (
            serving(StaticSource(ca.context(ca.issue(SERVER)))) as served,
            served.client(caller) as client,
        ):
            assert (await client.get("/thing")).status_code == 200
            assert served.probes is not None
            assert served.probes._collector.live is not None
            (transport,) = served.probes._collector.live._all
            accepted: socket.socket = transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())


def test_client_certificate_is_not_lost_between_settings(ca: CertificateAuthority) -> None:
    """With `verify` as a path, httpx made its context without the certificate named by `cert`.

    Here a client is made from a ready context alone, and nothing in the tree uses that pair.
    """
    folders = [REPOSITORY / name for name in ("libs", "services", "dev", "tests", "bench")]
    found = [each for folder in folders for each in keywords(folder)]
    assert any(keyword.arg == "verify" for _, keyword in found), "it finds"
    assert [place for place, keyword in found if keyword.arg == "cert"] == []
    texts = [
        place
        for place, keyword in found
        if keyword.arg == "verify"
        and isinstance(keyword.value, ast.Constant)
        and isinstance(keyword.value.value, str)
    ]
    assert texts == []

    source = StaticSource(ca.context(ca.issue(CALLER)))

    async def make() -> None:
        async with AsyncClient(source, peer=SERVER):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        with Client(source, peer=SERVER):
            pass
        asyncio.run(make())

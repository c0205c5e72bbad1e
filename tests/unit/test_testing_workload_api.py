"""The Workload API of `ztmtls.testing`, driven by a plain gRPC client as any workload would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc as pb_grpc

from tests.processes import open_files
from ztmtls.ids import SpiffeId, TrustDomain
from ztmtls.svid import X509Bundle, X509Svid
from ztmtls.testing import (
    Attestation,
    CertificateAuthority,
    Workload,
    WorkloadApi,
    WorkloadIdentity,
    with_broken_signature,
)
from ztmtls.testing.attestation import PeerCredentials, Registrations, process_start_time

ORDERS = "spiffe://zt.example/ns/zt-demo/sa/orders"
HEADER = (("workload.spiffe.io", "true"),)


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
async def api() -> AsyncIterator[WorkloadApi]:
    async with WorkloadApi() as started:
        yield started


@pytest.fixture
async def orders(api: WorkloadApi, ca: CertificateAuthority) -> Workload:
    workload = await api.add_workload("orders", ORDERS, ca=ca)
    workload.allow(pid=os.getpid())
    return workload


@contextlib.asynccontextmanager
async def client(endpoint: str) -> AsyncIterator[Any]:
    # A pool of its own, or channels of one process to one address share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(endpoint, options=options) as channel:
        yield pb_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]


@contextlib.asynccontextmanager
async def svid_stream(endpoint: str) -> AsyncIterator[Any]:
    async with client(endpoint) as stub:
        call = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        yield call
        call.cancel()


async def read(call: Any) -> Any:
    async with asyncio.timeout(5):
        return await call.read()


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(5):
        return await call.code(), await call.details()


async def first_message(endpoint: str) -> pb.X509SVIDResponse:
    async with svid_stream(endpoint) as call:
        message = await read(call)
        assert isinstance(message, pb.X509SVIDResponse)
        return message


async def refusal(endpoint: str, metadata: Any = HEADER) -> tuple[grpc.StatusCode, str]:
    async with client(endpoint) as stub:
        call = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=metadata)
        return await status_of(call)


def svid_in(message: pb.X509SVIDResponse) -> X509Svid:
    entry = message.svids[0]
    return X509Svid.from_der(entry.x509_svid, entry.x509_svid_key, entry.hint)


REFUSED = (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


# -- What is delivered ------------------------------------------------------------------------------


async def test_delivers_the_svid_its_key_and_the_bundle(ca: CertificateAuthority, orders: Workload) -> None:
    message = await first_message(orders.endpoint)

    assert [entry.spiffe_id for entry in message.svids] == [ORDERS]
    assert svid_in(message) == orders.svid
    assert X509Bundle.from_der(ca.trust_domain, message.svids[0].bundle) == ca.bundle
    assert not message.federated_bundles
    assert orders.calls["FetchX509SVID"] == 1


async def test_sends_intermediates_after_the_leaf(api: WorkloadApi) -> None:
    ca = CertificateAuthority("zt.example", upstream=True)
    workload = await api.add_workload("orders", ORDERS, ca=ca)
    workload.allow(pid=os.getpid())

    svid = svid_in(await first_message(workload.endpoint))

    assert svid.chain[1:] == (ca.active.certificate,)


async def test_delivers_every_identity_in_order_with_its_hint(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    other = WorkloadIdentity(SpiffeId.parse("spiffe://zt.example/other"), hint="external")
    workload = await api.add_workload("two", ORDERS, other, ca=ca)
    workload.allow(pid=os.getpid())

    message = await first_message(workload.endpoint)

    assert [(entry.spiffe_id, entry.hint) for entry in message.svids] == [
        (ORDERS, ""),
        ("spiffe://zt.example/other", "external"),
    ]


async def test_bundles_are_keyed_by_the_id_of_the_trust_domain(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    partner = CertificateAuthority("partner.example")
    workload = await api.add_workload("orders", ORDERS, ca=ca, federates_with=[partner])
    workload.allow(pid=os.getpid())

    message = await first_message(workload.endpoint)
    assert dict(message.federated_bundles) == {"spiffe://partner.example": partner.bundle.der()}

    async with client(workload.endpoint) as stub:
        call = stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=HEADER)
        bundles = await read(call)
        assert dict(bundles.bundles) == {
            "spiffe://zt.example": ca.bundle.der(),
            "spiffe://partner.example": partner.bundle.der(),
        }
        workload.set_federation()
        assert dict((await read(call)).bundles) == {"spiffe://zt.example": ca.bundle.der()}


# -- Rotation and changes of the authority ----------------------------------------------------------


async def test_rotate_reaches_every_open_stream(orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as one, svid_stream(orders.endpoint) as two:
        before = svid_in(await read(one))
        await read(two)
        await orders.wait_for_streams(2)

        rotated = orders.rotate()

        assert rotated.serial != before.serial
        assert svid_in(await read(one)) == rotated
        assert svid_in(await read(two)) == rotated
        await orders.wait_for_delivery()
    await orders.wait_for_streams(0)


async def test_prepared_authority_is_sent_at_once_with_the_same_svid(
    ca: CertificateAuthority, orders: Workload
) -> None:
    async with svid_stream(orders.endpoint) as call:
        before = await read(call)
        ca.prepare()
        after = await read(call)

    assert after.svids[0].x509_svid == before.svids[0].x509_svid
    assert len(X509Bundle.from_der(ca.trust_domain, after.svids[0].bundle).authorities) == 2


async def test_revoked_authority_takes_its_svids_along(ca: CertificateAuthority, orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        before = svid_in(await read(call))
        ca.revoke()
        message = await read(call)

    after = svid_in(message)
    assert after.serial != before.serial
    assert message.svids[0].bundle == ca.bundle.der()
    after.leaf.verify_directly_issued_by(ca.active.certificate)


async def test_authority_may_change_in_another_thread(ca: CertificateAuthority, orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)
        thread = threading.Thread(target=ca.prepare)
        thread.start()
        message = await read(call)
        thread.join()

    assert message.svids[0].bundle == ca.bundle.der()


# -- Scripted trouble -------------------------------------------------------------------------------


async def test_redacted_identity_ends_streams_and_comes_back(orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)
        orders.redact()
        assert await status_of(call) == REFUSED
    assert await refusal(orders.endpoint) == REFUSED

    orders.restore()

    assert svid_in(await first_message(orders.endpoint)) == orders.svid


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
    ],
)
async def test_stream_ends_with_any_status_after_what_was_pushed(
    orders: Workload, code: grpc.StatusCode
) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)
        rotated = orders.rotate()
        assert orders.end(code, "for a test") == 1
        assert svid_in(await read(call)) == rotated
        got, details = await status_of(call)
        assert got is code
        if code is not grpc.StatusCode.OK:
            assert details == "for a test"
    await first_message(orders.endpoint)


async def test_fail_next_counts_and_then_calls_work(orders: Workload) -> None:
    orders.fail_next(grpc.StatusCode.UNAVAILABLE, 2, details="workload attestation failed")

    expected = (grpc.StatusCode.UNAVAILABLE, "workload attestation failed")
    assert await refusal(orders.endpoint) == expected
    assert await refusal(orders.endpoint) == expected
    await first_message(orders.endpoint)
    assert orders.calls["FetchX509SVID"] == 3


async def test_failing_for_ever_ends_on_demand_and_is_of_one_method(orders: Workload) -> None:
    orders.fail_next(grpc.StatusCode.INTERNAL, None, method="FetchX509SVID")

    for _ in range(3):
        assert (await refusal(orders.endpoint))[0] is grpc.StatusCode.INTERNAL
    async with client(orders.endpoint) as stub:
        assert await read(stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=HEADER))

    orders.stop_failing()
    await first_message(orders.endpoint)


async def test_hanging_call_is_answered_after_resume(orders: Workload) -> None:
    orders.hang()
    async with svid_stream(orders.endpoint) as call:
        reading = asyncio.ensure_future(read(call))
        await orders.wait_for_calls(1)
        assert orders.streams == 0
        assert not reading.done()

        orders.resume()

        assert svid_in(await reading) == orders.svid


async def test_socket_vanishes_and_comes_back_at_the_same_path(orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)

        await orders.stop()

        assert not orders.path.exists()
        assert (await status_of(call))[0] is grpc.StatusCode.UNAVAILABLE
    await orders.wait_for_streams(0)
    assert (await refusal(orders.endpoint))[0] is grpc.StatusCode.UNAVAILABLE

    await orders.start()
    await first_message(orders.endpoint)


async def test_pushed_message_arrives_as_it_is_and_rotate_ends_it(orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)
        spoilt = orders.build_response()
        spoilt.svids[0].spiffe_id = ""
        orders.push_raw(spoilt)
        assert await read(call) == spoilt
        assert await first_message(orders.endpoint) == spoilt
        assert orders.pinned

        rotated = orders.rotate()

        assert svid_in(await read(call)) == rotated
        assert not orders.pinned


async def test_pushed_message_is_not_mixed_up_with_changes_of_the_authority(
    ca: CertificateAuthority, orders: Workload
) -> None:
    bad = with_broken_signature(orders.svid)
    orders.push(bad, bundle=b"")
    ca.prepare()

    message = await first_message(orders.endpoint)

    assert message.svids[0].x509_svid == bad.chain_der()
    assert message.svids[0].bundle == b""


async def test_pushed_bundles_arrive_as_they_are(orders: Workload) -> None:
    async with client(orders.endpoint) as stub:
        call = stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=HEADER)
        good = await read(call)
        orders.push_raw(pb.X509BundlesResponse(bundles={"spiffe://zt.example": b"rubbish"}))
        assert (await read(call)).bundles["spiffe://zt.example"] == b"rubbish"
        orders.unpin()
        assert await read(call) == good


async def test_expired_svid_is_renewed_for_who_calls_again(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    workload = await api.add_workload("orders", ORDERS, ca=ca, svid_ttl=-5)
    workload.allow(pid=os.getpid())
    first = workload.svid
    workload.svid_ttl = 60

    assert svid_in(await first_message(workload.endpoint)).serial != first.serial


async def test_waiting_in_vain_says_what_was_there_instead(orders: Workload) -> None:
    with pytest.raises(TimeoutError, match=r"2 open streams did not come about in 0.05 s; orders has 0"):
        await orders.wait_for_streams(2, timeout=0.05)


# -- Who is served ----------------------------------------------------------------------------------


async def test_call_without_security_header_is_invalid(orders: Workload) -> None:
    await first_message(orders.endpoint)
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")

    assert await refusal(orders.endpoint, metadata=()) == expected
    assert await refusal(orders.endpoint, metadata=(("workload.spiffe.io", "false"),)) == expected
    assert await refusal(orders.endpoint, metadata=(*HEADER, *HEADER)) == expected
    assert orders.calls_without_header == 3


async def test_nobody_is_served_before_somebody_is_registered(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    workload = await api.add_workload("orders", ORDERS, ca=ca)

    assert await refusal(workload.endpoint) == REFUSED
    assert workload.denied_calls == 1

    workload.allow(uid=os.geteuid())
    await first_message(workload.endpoint)


CALL = """
import sys, grpc
from spiffe._proto import workload_pb2 as pb, workload_pb2_grpc as rpc
sys.stdin.readline()
with grpc.insecure_channel(sys.argv[1]) as channel:
    call = rpc.SpiffeWorkloadAPIStub(channel).FetchX509SVID(
        pb.X509SVIDRequest(), metadata=(("workload.spiffe.io", "true"),), timeout=10)
    try:
        print("served", next(call).svids[0].spiffe_id)
    except grpc.RpcError as error:
        print("refused", error.code().name, error.details())
"""


async def test_another_process_is_refused_and_the_registered_one_served(
    ca: CertificateAuthority,
) -> None:
    decisions: list[Attestation] = []
    async with WorkloadApi(on_attest=decisions.append) as api:
        workload = await api.add_workload("orders", ORDERS, ca=ca)

        def spawn() -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-c", CALL, workload.endpoint],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

        registered, stranger = spawn(), spawn()
        workload.allow(pid=registered.pid)
        served, refused = await asyncio.gather(
            asyncio.to_thread(registered.communicate, "\n", timeout=20),
            asyncio.to_thread(stranger.communicate, "\n", timeout=20),
        )

    assert served[0] == f"served {ORDERS}\n"
    assert refused[0] == "refused PERMISSION_DENIED no identity issued\n"
    assert {(d.pid, d.allowed, d.uid) for d in decisions} == {
        (registered.pid, True, os.geteuid()),
        (stranger.pid, False, os.geteuid()),
    }
    assert all(d.workload == "orders" and str(d.pid) in d.reason for d in decisions)


async def test_the_servers_own_socket_serves_nobody(api: WorkloadApi, orders: Workload) -> None:
    await first_message(orders.endpoint)

    assert await refusal(f"unix:{api.directory}/.api") == REFUSED


async def test_one_workloads_process_is_a_stranger_to_another_workload(
    api: WorkloadApi, ca: CertificateAuthority, orders: Workload
) -> None:
    payments = await api.add_workload("payments", "spiffe://zt.example/payments", ca=ca)
    await first_message(orders.endpoint)

    assert await refusal(payments.endpoint) == REFUSED


async def test_disallowed_process_loses_its_open_stream(orders: Workload) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)

        await orders.disallow(pid=os.getpid())

        assert (await status_of(call))[0] is grpc.StatusCode.UNAVAILABLE
    assert await refusal(orders.endpoint) == REFUSED


async def test_callback_that_fails_neither_serves_nor_breaks_anything(ca: CertificateAuthority) -> None:
    def fail(decision: Attestation) -> None:
        raise OSError("disk full")

    async with WorkloadApi(on_attest=fail) as api:
        workload = await api.add_workload("orders", ORDERS, ca=ca)
        assert await refusal(workload.endpoint) == REFUSED
        workload.allow(pid=os.getpid())
        await first_message(workload.endpoint)


def test_reused_process_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registrations = Registrations()
    registrations.allow(pid=os.getpid())
    peer = PeerCredentials(os.getpid(), os.getuid(), os.getgid())
    assert registrations.decide(peer)[0]

    started = process_start_time(os.getpid())
    assert started is not None
    monkeypatch.setattr("ztmtls.testing.attestation.process_start_time", lambda pid: started + 1)

    allowed, reason = registrations.decide(peer)
    assert not allowed
    assert "another process" in reason


@pytest.mark.parametrize("pid", [0, -1])
def test_process_outside_our_pid_namespace_is_refused(pid: int) -> None:
    registrations = Registrations()
    registrations.allow(pid=os.getpid())

    assert not registrations.decide(PeerCredentials(pid, os.getuid(), os.getgid()))[0]


def test_user_that_stands_for_all_unknown_users_cannot_be_registered() -> None:
    registrations = Registrations()
    registrations.allow(uid=1000)
    assert registrations.decide(PeerCredentials(1, 1000, 1000))[0]

    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    with pytest.raises(ValueError, match="look alike"):
        registrations.allow(uid=overflow)
    assert not registrations.decide(PeerCredentials(1, overflow, overflow))[0]


def test_unreadable_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registrations = Registrations()
    registrations.allow(pid=os.getpid())
    monkeypatch.setattr("ztmtls.testing.attestation.process_start_time", lambda pid: None)

    assert not registrations.decide(PeerCredentials(os.getpid(), os.getuid(), os.getgid()))[0]
    with pytest.raises(ProcessLookupError):
        registrations.allow(pid=os.getpid())


def test_process_that_is_gone_cannot_be_registered() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    with pytest.raises(ProcessLookupError):
        Registrations().allow(pid=gone.pid)


# -- Sockets, directories, life cycle ---------------------------------------------------------------


async def test_directory_and_sockets_are_private_and_removed_again(
    tmp_path: Path, ca: CertificateAuthority
) -> None:
    directory = tmp_path / "a"
    async with WorkloadApi(directory) as api:
        workload = await api.add_workload("orders", ORDERS, ca=ca)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert workload.path.stat().st_mode & 0o777 == 0o600
        assert workload.endpoint == f"unix:{directory}/orders.sock"
    assert not directory.exists()


async def test_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    directory.mkdir(mode=0o700)
    async with WorkloadApi(directory):
        pass
    directory.chmod(0o755)

    with pytest.raises(PermissionError, match="mode 700, not 755"):
        await WorkloadApi(directory).start()
    assert directory.exists()


async def test_too_long_path_is_refused_with_its_length(tmp_path: Path, ca: CertificateAuthority) -> None:
    with pytest.raises(ValueError, match=r"bytes, at most 100 can be used"):
        await WorkloadApi(tmp_path / ("x" * 100)).start()
    async with WorkloadApi() as api:
        with pytest.raises(ValueError, match=r"bytes, at most 100 can be used"):
            await api.add_workload("x" * 100, ORDERS, ca=ca)
        assert not api.workloads


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".api", "a b", "a\n"])
async def test_name_that_is_no_file_name_is_refused(
    api: WorkloadApi, ca: CertificateAuthority, name: str
) -> None:
    with pytest.raises(ValueError, match="can't be a workload's name"):
        await api.add_workload(name, ORDERS, ca=ca)


async def test_socket_of_a_dead_server_is_replaced_and_of_a_live_one_kept(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    path = api.directory / "orders.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    workload = await api.add_workload("orders", ORDERS, ca=ca)
    workload.allow(pid=os.getpid())
    await first_message(workload.endpoint)

    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(api.directory / "other.sock"))
        live.listen()
        with pytest.raises(FileExistsError, match="another server"):
            await api.add_workload("other", ORDERS, ca=ca)


async def test_second_server_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    async with WorkloadApi(directory):
        with pytest.raises(FileExistsError, match="another server"):
            await WorkloadApi(directory).start()
        assert (directory / ".api").exists()


async def test_workload_can_be_removed_and_registered_again(
    api: WorkloadApi, ca: CertificateAuthority, orders: Workload
) -> None:
    async with svid_stream(orders.endpoint) as call:
        await read(call)
        await api.remove_workload("orders")
        assert (await status_of(call))[0] is grpc.StatusCode.UNAVAILABLE

    again = await api.add_workload("orders", ORDERS, ca=ca)
    again.allow(pid=os.getpid())
    await first_message(again.endpoint)


async def test_half_closed_and_silent_connections_are_let_go(orders: Workload) -> None:
    reader, writer = await asyncio.open_unix_connection(orders.path)
    await orders.wait_until(lambda: orders.connections == 1)
    writer.write_eof()
    async with asyncio.timeout(5):
        assert await reader.read() is not None  # the server hangs up in its turn
    writer.close()
    await orders.wait_until(lambda: orders.connections == 0)


async def test_strangers_cannot_use_up_the_connections(
    api: WorkloadApi, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztmtls.testing.attestation.MAX_STRANGERS", 2)
    workload = await api.add_workload("orders", ORDERS, ca=ca)
    kept = [await asyncio.open_unix_connection(workload.path) for _ in range(2)]
    await workload.wait_until(lambda: workload.connections == 2)

    reader, writer = await asyncio.open_unix_connection(workload.path)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    assert workload.connections == 2

    workload.allow(pid=os.getpid())
    await first_message(workload.endpoint)
    for _, open_writer in (*kept, (reader, writer)):
        open_writer.close()


async def test_nothing_is_kept_of_connections_that_come_and_go(orders: Workload) -> None:
    await first_message(orders.endpoint)
    await orders.wait_until(lambda: orders.connections == 0)
    before = open_files()

    for _ in range(30):
        async with svid_stream(orders.endpoint) as call:
            await read(call)
            orders.rotate()
        del call  # holds the client's connection
    await orders.wait_until(lambda: orders.connections == 0 and orders.streams == 0)

    assert len(open_files() - before) <= 5


async def test_message_larger_than_any_buffer_passes_whole(orders: Workload) -> None:
    big = orders.build_response(federated={f"spiffe://td{i}.example": os.urandom(40_000) for i in range(80)})
    orders.push_raw(big)

    assert await first_message(orders.endpoint) == big


async def test_no_task_is_left_behind(ca: CertificateAuthority) -> None:
    before = asyncio.all_tasks()
    async with WorkloadApi() as api:
        workload = await api.add_workload("orders", ORDERS, ca=ca)
        workload.allow(pid=os.getpid())
        api.keep_rotating(ca)
        async with svid_stream(workload.endpoint) as call:
            await read(call)
    await asyncio.sleep(0)

    left = {t for t in asyncio.all_tasks() - before if "guard" in t.get_name() or "rotation" in t.get_name()}
    assert not left


# -- JWT-SVIDs --------------------------------------------------------------------------------------


async def test_jwt_svid_is_issued_and_validated(
    api: WorkloadApi, ca: CertificateAuthority, orders: Workload
) -> None:
    async with client(orders.endpoint) as stub:
        fetched = await stub.FetchJWTSVID(pb.JWTSVIDRequest(audience=["payments"]), metadata=HEADER)
        (svid,) = fetched.svids
        assert svid.spiffe_id == ORDERS

        answer = await stub.ValidateJWTSVID(
            pb.ValidateJWTSVIDRequest(audience="payments", svid=svid.svid), metadata=HEADER
        )
        assert answer.spiffe_id == ORDERS
        assert list(answer.claims["aud"]) == ["payments"]

        for audience, token in [
            ("other", svid.svid),
            ("payments", svid.svid[:-4] + "AAAA"),
            ("payments", "rubbish"),
            ("payments", ca.issue_jwt(ORDERS, ["payments"], ttl=-1)),
            ("payments", CertificateAuthority("zt.example").issue_jwt(ORDERS, ["payments"])),
            ("payments", ca.issue_jwt("spiffe://other.example/x", ["payments"])),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ValidateJWTSVID(
                    pb.ValidateJWTSVIDRequest(audience=audience, svid=token), metadata=HEADER
                )
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_jwt_svid_of_an_identity_it_has_not_is_denied(orders: Workload) -> None:
    async with client(orders.endpoint) as stub:
        own = pb.JWTSVIDRequest(audience=["a"], spiffe_id=ORDERS)
        assert (await stub.FetchJWTSVID(own, metadata=HEADER)).svids
        for spiffe_id, audience, code in [
            ("spiffe://zt.example/other", ["a"], grpc.StatusCode.PERMISSION_DENIED),
            ("rubbish", ["a"], grpc.StatusCode.INVALID_ARGUMENT),
            (ORDERS, [], grpc.StatusCode.INVALID_ARGUMENT),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.FetchJWTSVID(
                    pb.JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id), metadata=HEADER
                )
            assert caught.value.code() is code


async def test_jwt_bundles_follow_the_authority(ca: CertificateAuthority, orders: Workload) -> None:
    async with client(orders.endpoint) as stub:
        call = stub.FetchJWTBundles(pb.JWTBundlesRequest(), metadata=HEADER)
        assert dict((await read(call)).bundles) == {"spiffe://zt.example": ca.jwt_bundle()}
        ca.prepare()
        assert dict((await read(call)).bundles) == {"spiffe://zt.example": ca.jwt_bundle()}


def test_trust_domain_is_accepted_as_object_or_name() -> None:
    assert CertificateAuthority(TrustDomain("zt.example")).trust_domain == TrustDomain("zt.example")

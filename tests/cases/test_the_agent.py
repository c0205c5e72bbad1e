"""Trouble with the agent: it ends streams, goes away, comes late, denies for a moment, is misaddressed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from tests.mtls.conftest import CALLER, SERVER, serving, until
from tests.spire.load import Load, load_on
from ztmtls.client import NoIdentityError
from ztmtls.probes import Probes, identity_fault
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity, SourceState, StaticSource, X509Source
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi
from ztmtls.testing.ca import with_other_key

from .conftest import Service, identity, service

# A good agent is followed again within this many seconds.
RECOVERY = 15.0


@contextlib.asynccontextmanager
async def traffic(source: X509Source, caller: StaticSource) -> AsyncIterator[Load]:
    """Requests to a server with the identity of `source`; none of them may fail."""
    async with serving(source) as served, served.client(caller) as client, load_on(client, 2) as load:
        await until(lambda: load.served > 5)
        yield load
        before = load.served
        await until(lambda: load.served > before + 5)
    assert load.failed == {}


async def follows(source: X509Source, workload: Workload) -> None:
    """The source gets a new SVID in time: the proof that it still lives."""
    async with asyncio.timeout(RECOVERY):
        await workload.wait_for_streams(1, RECOVERY)
        new = workload.rotate().serial
        await until(lambda: source.status().serial == new, RECOVERY)
    assert source.state is SourceState.SERVING


def _broken_der(workload: Workload) -> None:
    response = workload.build_response(workload.ca.issue(SERVER))
    response.svids[0].x509_svid = b"\x30\x82\xff\xff no certificate"
    workload.push_raw(response)


def _no_svids(workload: Workload) -> None:
    response = workload.build_response()
    response.ClearField("svids")
    workload.push_raw(response)


ENDINGS: dict[str, Callable[[Workload], object]] = {
    "ended with OK": lambda w: w.end(grpc.StatusCode.OK),
    "ended with CANCELLED": lambda w: w.end(grpc.StatusCode.CANCELLED),
    "ended with INVALID_ARGUMENT": lambda w: w.end(grpc.StatusCode.INVALID_ARGUMENT),
    "ended with UNAVAILABLE": lambda w: w.end(grpc.StatusCode.UNAVAILABLE),
    "ended with INTERNAL": lambda w: w.end(grpc.StatusCode.INTERNAL),
    "broken DER": _broken_der,
    "no SVIDs": _no_svids,
    "another key": lambda w: w.push_raw(w.build_response(with_other_key(w.ca.issue(SERVER)))),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_rotation_goes_on_after_whatever_the_agent_sent(
    api: WorkloadApi, ca: CertificateAuthority, caller: StaticSource, ending: str
) -> None:
    """A watcher took the end of its stream for success, or one bad update for the end, and never asked again.

    Days later every call failed at once. Here whatever arrives leaves the good SVID in use, is counted and
    said, and the next good update is taken; no request fails.
    """
    async with identity(api, ca, "server", SERVER) as (workload, source), traffic(source, caller):
        before, failures = source.context.svid.serial, source.status().failures
        ENDINGS[ending](workload)
        await until(lambda: source.status().failures > failures)
        assert source.context.svid.serial == before
        assert identity_fault(source) is None, "ready while the SVID is good"
        await follows(source, workload)


async def test_rotation_goes_on_after_the_agent_was_away(
    api: WorkloadApi, ca: CertificateAuthority, caller: StaticSource
) -> None:
    """Clients that reconnected to a new agent were never sent an update, or asked ever more seldom."""
    async with identity(api, ca, "server", SERVER) as (workload, source), traffic(source, caller):
        before = source.context.svid.serial
        await workload.stop()
        await until(lambda: source.status().failures >= 4, 30)
        assert source.state is SourceState.DEGRADED
        assert source.context.svid.serial == before
        await workload.start()
        await follows(source, workload)


async def test_rotation_goes_on_after_file_descriptors_ran_out(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    """The one reconnect that met "too many open files" ended a watcher for good."""
    async with identity(api, ca, "server", SERVER) as (workload, source):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        failures = source.status().failures
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            workload.end(grpc.StatusCode.UNAVAILABLE)
            await until(lambda: source.status().failures >= failures + 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await follows(source, workload)


async def test_svid_that_runs_out_while_the_agent_is_away_fails_closed_and_heals(
    api: WorkloadApi, ca: CertificateAuthority, caller: StaticSource
) -> None:
    """After a night of sleep everything that was bound to time had run out, and probes still showed green.

    Here calls are refused with the reason, readiness is red and names it, liveness is not touched, and all
    of it ends by itself when the agent is back.
    """
    async with (
        identity(api, ca, "caller", CALLER, ttl=2) as (workload, source),
        serving(StaticSource(ca.context(ca.issue(SERVER)))) as served,
        served.client(source) as client,
    ):
        probes = Probes("127.0.0.1", 0, source=source)
        probes.serving = True
        assert (await client.get("/thing")).status_code == 200
        await workload.stop()
        await until(lambda: source.state is SourceState.EXPIRED, 10)
        with pytest.raises(NoIdentityError) as refused:
            await client.get("/thing")
        assert refused.value.reason is Reason.IDENTITY_EXPIRED
        assert (await probes.readiness())["identity"].startswith("expired: the Workload API can't be reached")
        await workload.start()
        await until(lambda: source.state is SourceState.SERVING, RECOVERY)
        workload.rotate(ttl=600)
        await until(lambda: identity_fault(source) is None)
        assert (await client.get("/thing")).status_code == 200


# --- the socket ---------------------------------------------------------------------------------------


async def test_mounted_socket_file_goes_stale_and_a_mounted_directory_does_not(
    api: WorkloadApi, ca: CertificateAuthority, tmp_path: Path
) -> None:
    """A mount of the socket file holds the inode: after the agent made a new socket, nobody answered there.

    A second name of the file does the same as such a mount. Here the source asks by name each time, so a
    directory is enough; on a dead socket it says so, and goes on as soon as the name leads to a live one.
    """
    workload = await api.add_workload("server", SERVER, ca=ca)
    workload.allow(pid=os.getpid())
    file = workload.path.parent / "file.sock"
    os.link(workload.path, file)
    folder = tmp_path / "folder"
    folder.symlink_to(workload.path.parent)
    async with X509Source(f"unix:{folder}/server.sock") as by_folder, X509Source(f"unix:{file}") as by_file:
        await by_folder.ready(RECOVERY)
        await by_file.ready(RECOVERY)
        await workload.stop()
        await workload.start()  # another socket by the same name
        workload.rotate()
        new = workload.svid.serial

        await until(lambda: by_folder.context.svid.serial == new, RECOVERY)
        await until(lambda: "nobody answers there" in by_file.status().reason, RECOVERY)
        assert by_file.state is SourceState.DEGRADED
        assert by_file.context.svid.serial != new

        file.unlink()
        os.link(workload.path, file)
        await until(lambda: by_file.context.svid.serial == new, RECOVERY)


async def test_wrong_socket_address_ends_the_start_with_one_line() -> None:
    """Clients differed in the forms that they took, and waited for ever on one that could not be meant."""
    async with service("/run/agent.sock") as running:
        assert await running.ended() == 1
    lines = running.said.splitlines()
    assert len(lines) == 1, running.said
    assert lines[0].startswith(str(Reason.INVALID_ENDPOINT))
    assert "unix:" in lines[0], "it says what to write"


async def test_each_form_of_the_address_reaches_the_agent_whatever_the_proxy_variables_say(
    api: WorkloadApi, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy variable captured the call to a local socket, and of two forms of one address one worked."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "grpc_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    workload = await api.add_workload("server", SERVER, ca=ca)
    workload.allow(pid=os.getpid())
    for address in (f"unix:{workload.path}", f"unix://{workload.path}"):
        async with X509Source(address) as source:
            assert str((await source.ready(RECOVERY)).svid.id) == SERVER


async def fault(running: Service) -> str:
    """What readiness says about the identity."""
    report = (await running.answers("/readyz", 503)).json()
    return str(report["checks"]["identity"])


async def test_start_that_gets_no_identity_is_alive_and_not_ready_and_ends_in_time(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    """Without an agent, with one that keeps silent, or without an entry, a process hung in its start.

    Here it answers its probes meanwhile, listens to nobody, and gives up when told to, naming the cause.
    """
    nobody, silent, denying = [await api.add_workload(n, SERVER, ca=ca) for n in ("nobody", "silent", "deny")]
    await nobody.stop()
    silent.hang()

    async def start(workload: Workload, state: str, cause: str, registered: bool = True) -> None:
        allowed = workload if registered else None
        async with service(workload.endpoint, startup_timeout=6, workload=allowed) as running:
            await running.answers("/livez", 200)
            async with asyncio.timeout(15):
                while not (await fault(running)).startswith(state):
                    await asyncio.sleep(0.05)
            assert not await running.listens()
            assert await running.ended() == 1
        assert cause in running.said.splitlines()[-1]

    async with asyncio.TaskGroup() as together:
        together.create_task(start(nobody, "starting: ", "there is no socket"))
        together.create_task(start(silent, "starting: ", str(Reason.NO_IDENTITY)))
        together.create_task(start(denying, "denied: ", "no entry for this workload", registered=False))


# --- the entry ----------------------------------------------------------------------------------------


async def test_entry_that_comes_after_the_start_is_waited_for(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    """A workload asked seconds before its entry had reached the agent, and died; or served without an SVID.

    Here it stays up, not ready and not listening, says why without a flood, and serves when the entry is
    there. An entry that is deleted and made again needs no restart either.
    """
    workload = await api.add_workload("server", SERVER, ca=ca)
    async with service(workload.endpoint) as running:
        await running.answers("/livez", 200)
        await api_denies(workload, 3)
        assert "no entry for this workload" in await fault(running)
        assert not await running.listens()
        said = [line for line in running.said.splitlines() if "no entry" in line]
        assert len(said) == 1, "the same again is counted, not logged"
        assert workload.endpoint in said[0]

        workload.allow(pid=running.process.pid)
        await running.answers("/readyz", 200, RECOVERY)
        assert await running.listens()

        workload.redact()
        await running.answers("/readyz", 503, RECOVERY)
        workload.restore()
        await running.answers("/readyz", 200, RECOVERY)
        assert running.process.returncode is None


async def api_denies(workload: Workload, times: int) -> None:
    await workload.wait_until(lambda: workload.denied_calls >= times, RECOVERY, f"{times} denials")


async def test_entry_that_flaps_fails_no_request_and_one_that_is_gone_takes_the_identity(
    api: WorkloadApi, ca: CertificateAuthority, caller: StaticSource
) -> None:
    """Servers lost entries for a moment, and established workloads were told "no identity issued".

    Here a denial must hold for two seconds before it counts: the standard wants a withdrawn identity gone,
    so a longer one takes it away, though its SVID be valid, and gives it back by itself.
    """
    async with identity(api, ca, "server", SERVER) as (workload, source):
        states: list[SourceState] = []
        unsubscribe = source.subscribe(lambda: states.append(source.state))
        async with traffic(source, caller):
            failures = source.status().failures
            for number in range(1, 5):
                workload.redact()
                await until(lambda: source.status().failures >= failures + number)  # noqa: B023
                workload.restore()
                await until(lambda: source.state is SourceState.SERVING)
        assert SourceState.DENIED not in states
        unsubscribe()

        workload.redact()
        await until(lambda: source.state is SourceState.DENIED, 5)
        with pytest.raises(NoIdentity) as refused:
            _ = source.context
        assert refused.value.reason is Reason.IDENTITY_DENIED
        workload.restore()
        await follows(source, workload)

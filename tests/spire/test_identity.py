"""Our source and a real agent: first SVID, renewal, withdrawal, restarts, outages."""

from __future__ import annotations

from datetime import UTC, datetime

import httpx
import pytest

from tests.mtls.conftest import CALLER, SERVER, serving, until
from ztmtls.client import NoIdentityError, hop
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity, SourceState, X509Source
from ztmtls.verify import verify_peer

from .conftest import source_of
from .spire import TRUST_DOMAIN, Spire

# A caller that may do what the policy in tests/mtls allows, and serves as well.
ALONE = CALLER


async def test_source_holds_the_identity_of_its_entry(spire: Spire) -> None:
    await spire.register(SERVER)

    async with source_of(spire) as source:
        context = source.context

    assert str(context.svid.id) == SERVER
    assert [str(domain) for domain in context.bundles] == [TRUST_DOMAIN]
    assert str(verify_peer(context.svid.chain, context.bundles, datetime.now(UTC)).id) == SERVER
    assert 0 < (context.svid.not_after - datetime.now(UTC)).total_seconds() <= 60


async def test_unregistered_process_is_denied_and_served_once_it_is_registered(spire: Spire) -> None:
    async with X509Source(spire.endpoint) as source:
        await until(lambda: source.state is SourceState.DENIED)
        with pytest.raises(NoIdentity) as denied:
            _ = source.context
        assert denied.value.reason is Reason.IDENTITY_DENIED
        assert "no identity issued" in source.status().reason

        await spire.register(SERVER)

        await source.ready(15)
        assert str(source.context.svid.id) == SERVER


async def test_expected_identity_is_chosen_among_several(spire: Spire) -> None:
    await spire.register(SERVER)
    await spire.register(CALLER)

    async with source_of(spire, SERVER) as server, source_of(spire, CALLER) as caller:
        assert str(server.context.svid.id) == SERVER
        assert str(caller.context.svid.id) == CALLER
        assert {str(svid.id) for svid in server.context.svids} == {SERVER, CALLER}


async def test_svid_of_one_minute_is_renewed_long_before_its_end(spire: Spire) -> None:
    await spire.register(SERVER, ttl=60)
    async with source_of(spire) as source:
        first, failures = source.context.svid, source.status().failures

        await until(lambda: source.context.svid.serial != first.serial, timeout=55)

        assert (first.not_after - datetime.now(UTC)).total_seconds() > 10
        assert source.context.svid.not_after > first.not_after
        assert source.context.svid.key.public_key() != first.key.public_key()
        assert source.state is SourceState.SERVING
        assert source.status().failures == failures


async def test_deleted_entry_withdraws_the_identity_and_a_new_one_brings_it_back(spire: Spire) -> None:
    entry = await spire.register(ALONE)
    async with (
        source_of(spire) as source,
        serving(source) as served,
        served.client(source, peer=ALONE) as client,
    ):
        assert (await client.get("/thing")).status_code == 200

        failures = source.status().failures
        await spire.unregister(entry)

        await until(lambda: source.status().failures > failures, timeout=20)  # the agent has told us
        await until(lambda: source.state is SourceState.DENIED, timeout=5)
        with pytest.raises(NoIdentityError) as refused:
            await client.get("/thing")
        assert refused.value.reason is Reason.IDENTITY_DENIED

        await spire.register(ALONE)

        await until(lambda: source.state is SourceState.SERVING, timeout=20)
        assert (await client.get("/thing")).status_code == 200


async def test_deleted_entry_withdraws_one_identity_of_several(spire: Spire) -> None:
    entry = await spire.register(SERVER)
    await spire.register(CALLER)
    async with (
        source_of(spire, SERVER) as server,
        source_of(spire, CALLER) as caller,
        serving(server) as served,
        served.client(caller) as client,
    ):
        assert (await client.get("/thing")).status_code == 200

        await spire.unregister(entry)

        # The agent goes on naming the other one: an update without ours withdraws it, too.
        await until(lambda: server.state is SourceState.DENIED, timeout=20)
        assert caller.state is SourceState.SERVING
        with pytest.raises(httpx.ConnectError):
            await client.get("/thing")

        await spire.register(SERVER)

        await until(lambda: server.state is SourceState.SERVING, timeout=20)
        assert (await client.get("/thing")).status_code == 200


async def test_agent_restart_interrupts_nothing(spire: Spire) -> None:
    await spire.register(ALONE)
    async with (
        source_of(spire) as source,
        serving(source) as served,
        served.client(source, peer=ALONE) as client,
    ):
        first = await client.get("/thing")
        assert first.status_code == 200

        await spire.stop_agent()

        await until(lambda: source.state is SourceState.DEGRADED)
        assert (await client.get("/thing")).status_code == 200
        async with served.client(source, peer=ALONE) as newcomer:
            assert (await newcomer.get("/thing")).status_code == 200

        await spire.start_agent()

        # An agent that has started anew issues a new SVID.
        await until(lambda: source.state is SourceState.SERVING, timeout=20)
        second = await client.get("/thing")
        assert second.status_code == 200
        assert hop(second).peer.serial != hop(first).peer.serial


@pytest.mark.parametrize("who", ["agent", "server"])
async def test_outage_longer_than_the_svid_lives_heals_by_itself(who: str, spire: Spire) -> None:
    stop = {"agent": spire.stop_agent, "server": spire.stop_server}[who]
    start = {"agent": spire.start_agent, "server": spire.start_server}[who]
    await spire.register(ALONE, ttl=12)
    async with (
        source_of(spire) as source,
        serving(source) as served,
        served.client(source, peer=ALONE) as client,
    ):
        assert (await client.get("/thing")).status_code == 200

        await stop()

        try:
            await until(lambda: source.state is SourceState.EXPIRED, timeout=20)
            with pytest.raises(NoIdentityError) as refused:
                await client.get("/thing")
            assert refused.value.reason is Reason.IDENTITY_EXPIRED
        finally:
            await start()

        # An agent whose server was away asks again ever later, up to 48 s.
        await until(lambda: source.state is SourceState.SERVING, timeout=60)
        assert (await client.get("/thing")).status_code == 200

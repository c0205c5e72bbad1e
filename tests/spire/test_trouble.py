"""Trouble that others had, which only a real SPIRE shows: see tests/cases/README.md."""

from __future__ import annotations

import os
import time

import pytest

from tests.mtls.conftest import CALLER, SERVER, serving, until
from ztmtls.client import NoIdentityError
from ztmtls.reasons import Reason
from ztmtls.source import SourceState
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import server_context

from .conftest import running, source_of
from .load import load_on
from .spire import TRUST_DOMAIN, Spire, SpireError
from .test_rotation import _signed_by

# A caller that may do what the policy in tests/mtls allows, and serves as well.
ALONE = CALLER


async def test_another_program_of_the_same_user_has_no_identity(spire: Spire) -> None:
    """A user ID matched a foreign process just as well as the workload that was meant.

    Here an entry names the program, too; one by the user alone is given to any of the user's programs.
    """
    by_user = await spire.register(SERVER)
    async with source_of(spire, SERVER) as source:
        assert SERVER in await spire.fetch()
        await spire.unregister(by_user)
        await until(lambda: source.state is SourceState.DENIED, 20)

    await spire.register(SERVER, selector=f"unix:path:{os.path.realpath('/proc/self/exe')}")
    async with source_of(spire, SERVER) as source:
        assert source.state is SourceState.SERVING
        with pytest.raises(SpireError, match="no identity issued"):
            await spire.fetch()


async def test_frozen_agent_is_not_taken_for_a_quiet_one(spire: Spire) -> None:
    """An agent that hung kept its connections open, and nobody noticed until the SVID had run out."""
    await spire.register(ALONE, ttl=20)
    async with (
        source_of(spire) as source,
        serving(source) as served,
        served.client(source, peer=ALONE) as client,
        load_on(client) as load,
    ):
        await until(lambda: load.served > 20)
        spire.freeze()
        try:
            await until(lambda: "silent" in source.status().reason, 30)
            assert source.state is SourceState.DEGRADED, "it is noticed before the SVID runs out"
        finally:
            spire.thaw()
        serial = source.context.svid.serial
        await until(lambda: source.status().serial not in (None, serial), 15)
    assert load.failed == {}


@pytest.mark.timeout(300)
async def test_outage_in_which_all_expired_ends_with_one_new_join_token() -> None:
    """After a night of sleep SVIDs, the agent's own, and the authorities had expired, and nothing came back.

    Here calls are refused with the reason meanwhile. A join token can't be used again, so the agent needs a
    new one; the services need nothing.
    """
    with running(ca_ttl="40s", agent_ttl="30s") as spire:
        await spire.start()
        await spire.register(ALONE, ttl=10)
        async with (
            source_of(spire) as source,
            serving(source) as served,
            served.client(source, peer=ALONE) as client,
        ):
            assert (await client.get("/thing")).status_code == 200
            (bundle,) = source.context.bundles.values()
            spire.freeze()
            bundle_ends = max(each.not_valid_after_utc.timestamp() for each in bundle.authorities)
            await until(lambda: source.state is SourceState.EXPIRED, 20)
            with pytest.raises(NoIdentityError) as refused:
                await client.get("/thing")
            assert refused.value.reason is Reason.IDENTITY_EXPIRED
            await until(lambda: time.time() > bundle_ends, 90)
            spire.thaw()

            await spire.stop_agent()
            await spire.join()

            await until(lambda: source.state is SourceState.SERVING, 60)
            assert (await client.get("/thing")).status_code == 200


async def test_intermediate_below_an_upstream_root_rotates_under_load() -> None:
    """With an upstream authority SPIRE signs by an intermediate, which peers did not send."""
    root = CertificateAuthority(TRUST_DOMAIN).active
    with running(root=root) as spire:
        await spire.start()
        await spire.register(SERVER)
        await spire.register(CALLER)
        async with (
            source_of(spire, SERVER) as server,
            source_of(spire, CALLER) as caller,
            serving(server) as served,
            served.client(caller) as client,
            load_on(client) as load,
        ):
            await until(lambda: load.served > 20)
            for source in (server, caller):
                assert len(source.context.svid.chain) == 2
                assert source.context.svid.leaf.issuer != root.certificate.subject
                (bundle,) = source.context.bundles.values()
                assert bundle.authorities == (root.certificate,)
            context = server_context(server)
            assert len(context.newest().get_ca_certs()) == 1  # type: ignore[attr-defined]

            await spire.authority("prepare")
            prepared = (await spire.authorities()).prepared
            await spire.authority("activate", prepared)
            await until(lambda: _signed_by(server, prepared) and _signed_by(caller, prepared), 60)
            serials = {source.context.svid.serial for source in (server, caller)}
            await until(lambda: serials <= load.caller_serials | load.server_serials, 15)
            (bundle,) = server.context.bundles.values()
            assert bundle.authorities == (root.certificate,)
    assert load.failed == {}

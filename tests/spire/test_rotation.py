"""Requests between two identities while SVIDs and authorities change underneath."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from cryptography import x509

from tests.mtls.conftest import CALLER, SERVER, serving, until
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource, X509Source
from ztmtls.svid import X509Context

from .conftest import source_of
from .load import load_on
from .spire import TRUST_DOMAIN, Spire


async def test_no_request_fails_while_both_sides_rotate(spire: Spire) -> None:
    await spire.register(SERVER, ttl=20)
    await spire.register(CALLER, ttl=20)
    async with (
        source_of(spire, SERVER) as server,
        source_of(spire, CALLER) as caller,
        serving(server) as served,
        served.client(caller) as client,
        load_on(client) as load,
    ):
        await until(lambda: len(load.caller_serials) >= 4 and len(load.server_serials) >= 4, timeout=60)

    assert load.failed == {}
    assert load.served > 100


async def test_authority_is_replaced_under_load_and_then_revoked(spire: Spire) -> None:
    await spire.register(SERVER)
    await spire.register(CALLER)
    async with (
        source_of(spire, SERVER) as server,
        source_of(spire, CALLER) as caller,
        serving(server) as served,
        served.client(caller) as client,
        load_on(client) as load,
    ):
        left_behind = caller.context.svids

        # Both trust the next authority before anything is signed with it.
        await spire.authority("prepare")
        prepared = (await spire.authorities()).prepared
        await until(lambda: _authorities(server) == _authorities(caller) == 2, timeout=20)
        assert not _signed_by(server, prepared)

        await spire.authority("activate", prepared)
        now = await spire.authorities()
        assert now.active == prepared

        # Tainting the old one makes the agent renew at once, without waiting for half of the life.
        await spire.authority("taint", now.old)
        await until(lambda: _signed_by(server, prepared) and _signed_by(caller, prepared), timeout=30)

        # An SVID of the old authority is still good. From here on its holder knows the new one, too.
        old_source = StaticSource(X509Context(1, left_behind, caller.context.bundles))
        async with served.client(old_source) as old:
            assert (await old.get("/thing")).status_code == 200

            # The server renews its own certificate some seconds later. An agent that meets the old one after
            # that authority was revoked ends for good: a join token is good for once.
            async with asyncio.timeout(30):
                while await spire.own_authority() != prepared:
                    await asyncio.sleep(0.2)
            await spire.authority("revoke", now.old)
            await until(lambda: _authorities(server) == _authorities(caller) == 1, timeout=20)

            # The connection that was open is refused once, with the reason, and closed ...
            last = await old.get("/thing")
            assert last.status_code == 401
            assert last.json()["reason"] == Reason.UNTRUSTED_AUTHORITY
            # ... and there is no new one.
            with pytest.raises(httpx.ReadError):
                await old.get("/thing")
            refusal = served.audit("deny")[-1]
            assert (refusal["event"], refusal["reason"]) == ("handshake", Reason.UNTRUSTED_AUTHORITY)

        served_before = load.served
        await until(lambda: load.served > served_before + 20)
    assert load.failed == {}


def _authorities(source: X509Source) -> int:
    return source.status().authorities[TRUST_DOMAIN]


def _signed_by(source: X509Source, authority_id: str) -> bool:
    names = source.context.svid.leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    identifier = names.value.key_identifier
    return identifier is not None and identifier.hex() == authority_id

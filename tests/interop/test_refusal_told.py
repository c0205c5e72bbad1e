"""A server of others that refuses our certificate and hangs up: the client says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.mtls.conftest import CALLER, SERVER, STRANGER
from ztmtls.client import AsyncClient
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority

from .conftest import bundle_file, pem_file
from .envoy import identity_from_files, only_tls
from .test_envoy import envoy_before_an_application


async def test_refusal_by_envoy_is_told_from_a_broken_connection(
    caller: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    """Envoy hangs up with a reset. On asyncio's own loops a few alerts are lost in it, most must not be."""
    identity = identity_from_files(
        pem_file(tmp_path, "server", ca.issue(SERVER)), bundle_file(tmp_path, "callers", ca.bundle), CALLER
    )
    stranger = StaticSource(ca.context(ca.issue(STRANGER)))
    outcomes: Counter[str] = Counter()
    async with (
        envoy_before_an_application(only_tls("TLSv1_3", identity), tmp_path) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
        AsyncClient(stranger, peer=SERVER, base_url=url) as refused,
    ):
        assert (await client.get("/thing")).status_code == 200

        for _ in range(40):
            with pytest.raises(httpx.ReadError) as error:
                await refused.get("/thing")
            outcomes[type(error.value).__name__] += 1

    assert outcomes["RefusedByServer"] >= 32, outcomes

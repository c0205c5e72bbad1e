"""The pytest plugin of `ztmtls.testing`, and the Workload API without an event loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc as pb_grpc

import ztmtls.testing
from ztmtls.source import StaticSource
from ztmtls.testing import BackgroundWorkloadApi, CertificateAuthority, WorkloadApi

HEADER = (("workload.spiffe.io", "true"),)


def test_every_public_name_can_be_imported() -> None:
    for name in ztmtls.testing.__all__:
        assert getattr(ztmtls.testing, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ztmtls.testing.Nothing  # noqa: B018


def test_plugin_imports_nothing_that_the_package_does_not() -> None:
    code = """
import sys, pytest, ztmtls
before = set(sys.modules)
import ztmtls.testing.fixtures
print(sorted(set(sys.modules) - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "['ztmtls.testing', 'ztmtls.testing.fixtures']\n"


def test_fixtures_work_without_an_asynchronous_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        """
import asyncio, os

def test_user(workload_api, spiffe_ca):
    async def main():
        async with workload_api as api:
            orders = await api.add_workload("orders", "spiffe://example.test/orders", ca=spiffe_ca)
            orders.allow(pid=os.getpid())
            assert orders.path.exists()
    asyncio.run(main())
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:anyio", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in result.stdout, result.stdout


def test_static_source_holds_an_svid_of_the_authority(
    static_source: Callable[[str], StaticSource], spiffe_ca: CertificateAuthority
) -> None:
    source = static_source("spiffe://example.test/me")

    assert str(source.context.svid.id) == "spiffe://example.test/me"
    assert source.context.bundles[spiffe_ca.trust_domain] == spiffe_ca.bundle


def call(endpoint: str) -> pb.X509SVIDResponse:
    with grpc.insecure_channel(endpoint) as channel:
        stub = pb_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]
        message = next(stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER, timeout=10))
        assert isinstance(message, pb.X509SVIDResponse)
        return message


def test_synchronous_code_uses_the_api_in_the_background(spiffe_ca: CertificateAuthority) -> None:
    with BackgroundWorkloadApi() as background:
        orders = background.run(
            lambda: background.api.add_workload("orders", "spiffe://example.test/orders", ca=spiffe_ca)
        )
        background.run(lambda: orders.allow(pid=os.getpid()))
        assert call(orders.endpoint).svids[0].spiffe_id == "spiffe://example.test/orders"

        rotated = background.run(orders.rotate)

        assert call(orders.endpoint).svids[0].x509_svid == rotated.chain_der()
        with pytest.raises(ValueError, match="already"):
            background.run(
                lambda: background.api.add_workload("orders", "spiffe://example.test/x", ca=spiffe_ca)
            )
        directory = background.api.directory
    assert not directory.exists()


def test_background_api_that_cannot_start_leaves_no_thread(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    background = BackgroundWorkloadApi(tmp_path)
    with pytest.raises(PermissionError), background:
        pass
    with pytest.raises(RuntimeError, match="not started"):
        background.run(lambda: None)


async def test_workload_api_fixture_is_entered_by_the_test(workload_api: WorkloadApi) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = workload_api.directory
    async with workload_api as api:
        assert api.directory.is_dir()

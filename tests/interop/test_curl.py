"""curl as a caller. It checks host names, so the server's SVID has a DNS name beside its SPIFFE ID."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.mtls.conftest import CALLER, DOMAIN, SERVER, STRANGER, Served, serving, until
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority

from .conftest import Ended, bundle_file, expired, pem_file, program, run

HOST = "server.zt.example"


class Curl:
    """`curl`, which trusts the server's authority and expects `HOST`."""

    def __init__(self, served: Served, folder: Path, ca: CertificateAuthority) -> None:
        self._served = served
        self._folder = folder
        self._bundle = bundle_file(folder, "trusted", ca.bundle)

    async def get(self, svid: X509Svid | None, *options: str, path: str = "/thing") -> Ended:
        port = self._served.port
        certificate = ["--cert", pem_file(self._folder, "caller", svid)] if svid is not None else []
        return await run(
            program("curl", "install Debian's package curl"),
            *("--silent", "--show-error", "--disable", "--noproxy", "*", "--cacert", self._bundle),
            *("--resolve", f"{HOST}:{port}:127.0.0.1", "--write-out", "\n%{http_code} %{http_version}"),
            *certificate,
            *options,
            f"https://{HOST}:{port}{path}",
        )


@pytest.fixture
async def named(ca: CertificateAuthority) -> AsyncIterator[Served]:
    """A server that curl can name."""
    async with serving(StaticSource(ca.context(ca.issue(SERVER, dns_names=[HOST])))) as served:
        yield served


@pytest.fixture
async def curl(named: Served, tmp_path: Path, ca: CertificateAuthority) -> Curl:
    """curl, after it was seen to be served as the rightful caller."""
    curl = Curl(named, tmp_path, ca)
    body, status = outcome(await curl.get(ca.issue(CALLER)))
    assert status == "200 1.1"
    assert json.loads(body)["hop"]["peer"]["id"] == CALLER
    return curl


def outcome(answer: Ended) -> tuple[str, str]:
    assert answer.status == 0, answer
    body, _, status = answer.out.rpartition("\n")
    return body, status


async def test_curl_posts_a_large_body(curl: Curl, ca: CertificateAuthority, tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(b"x" * 500_000)

    body, status = outcome(await curl.get(ca.issue(CALLER), "--data-binary", f"@{payload}"))

    assert status == "200 1.1"
    assert json.loads(body)["body"] == 500_000


async def test_curl_that_may_not_make_the_call_reads_why(curl: Curl, ca: CertificateAuthority) -> None:
    stranger, status = outcome(await curl.get(ca.issue(STRANGER)))
    assert (status, json.loads(stranger)["reason"]) == ("403 1.1", Reason.CALLER_NOT_ALLOWED)

    elsewhere, status = outcome(await curl.get(ca.issue(CALLER), path="/unlisted"))
    assert (status, json.loads(elsewhere)["reason"]) == ("403 1.1", Reason.ROUTE_NOT_ALLOWED)


@pytest.mark.parametrize(
    ("who", "alert", "reason"),
    [
        ("nobody", "certificate required", Reason.NO_CERTIFICATE),
        ("another domain", "unknown ca", Reason.UNTRUSTED_AUTHORITY),
        ("another authority", "unknown ca", Reason.UNTRUSTED_AUTHORITY),
        ("expired", "certificate expired", Reason.EXPIRED),
        ("TLS 1.2", "protocol version", Reason.TLS_FAILURE),
    ],
)
async def test_curl_is_refused_in_the_handshake(
    who: str, alert: str, reason: Reason, curl: Curl, named: Served, ca: CertificateAuthority
) -> None:
    svids = {
        "nobody": None,
        "another domain": CertificateAuthority("other.example").issue("spiffe://other.example/caller"),
        "another authority": CertificateAuthority(DOMAIN).issue(CALLER),
        "expired": expired(ca, CALLER),
        "TLS 1.2": ca.issue(CALLER),
    }

    answer = await curl.get(svids[who], *(["--tls-max", "1.2"] if who == "TLS 1.2" else []))

    assert answer.status != 0
    assert f"alert {alert}" in answer.error
    await until(lambda: named.audit("deny"))
    assert named.audit("deny")[-1]["reason"] == reason
    assert len(named.seen) == 1


async def test_curl_refuses_a_server_whose_name_is_not_in_its_certificate(
    served: Served, tmp_path: Path, ca: CertificateAuthority
) -> None:
    """SPIFFE IDs take the place of host names; what checks host names needs one in the certificate."""
    answer = await Curl(served, tmp_path, ca).get(ca.issue(CALLER))

    assert answer.status == 60
    assert served.seen == []

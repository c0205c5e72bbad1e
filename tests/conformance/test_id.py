"""ID: SPIFFE IDs as they come in certificates. Parsing alone is in tests/unit/test_ids.py."""

from __future__ import annotations

import pytest

from ztmtls.reasons import Reason
from ztmtls.testing import CertificateAuthority

from .clauses import BOTH
from .conftest import PEER, OurSide, agent, conformance, our_side

INVALID = {
    "empty trust domain": "spiffe:///peer",
    "port": "spiffe://zt.example:8080/peer",
    "user info": "spiffe://user@zt.example/peer",
    "query": "spiffe://zt.example/peer?x=1",
    "fragment": "spiffe://zt.example/peer#f",
    "percent-encoded path": "spiffe://zt.example/%70eer",
    "percent-encoded trust domain": "spiffe://%7At.example/peer",
    "empty segment": "spiffe://zt.example/a//b",
    "dot segment": "spiffe://zt.example/a/./b",
    "two-dot segment": "spiffe://zt.example/a/../b",
    "trailing slash": "spiffe://zt.example/peer/",
    "path of a slash": "spiffe://zt.example/",
    "character in the path": "spiffe://zt.example/pe!er",
    "character in the trust domain": "spiffe://zt$.example/peer",
    "other scheme": "sparfe://zt.example/peer",
    # Where the standard leaves a choice, see ADR 7.
    "upper-case scheme": "SPIFFE://zt.example/peer",
    "upper-case trust domain": "spiffe://ZT.example/peer",
}

VALID = {
    "dots, dashes, underscores and both cases": "spiffe://zt.example/A.b-C_d/...",
    "trust domain with underscore and digits": "spiffe://zt_0-1.example/peer",
    "trust domain like an IPv4 address": "spiffe://10.0.0.1/peer",
    "2048 bytes": "spiffe://zt.example/" + "p" * (2048 - len("spiffe://zt.example/")),
    "trust domain of 255 bytes": "spiffe://" + "t" * 255 + "/peer",
}


@conformance("ID-1")
@pytest.mark.parametrize("case", INVALID)
async def test_certificate_with_an_invalid_id_is_refused(ours: OurSide, case: str) -> None:
    for role in BOTH:
        assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER

        assert await ours.verdict(role, ours.ca.issue(PEER, uris=[INVALID[case]])) is Reason.INVALID_SPIFFE_ID


@conformance("ID-2")
@pytest.mark.parametrize("case", VALID)
async def test_certificate_with_an_unusual_id_is_accepted(case: str) -> None:
    domain = VALID[case].removeprefix("spiffe://").partition("/")[0]
    async with (
        agent(CertificateAuthority(domain), f"spiffe://{domain}/ours") as workload,
        our_side(workload) as ours,
    ):
        for role in BOTH:
            assert await ours.verdict(role, ours.ca.issue(VALID[case])) == VALID[case]

"""What a SPIFFE library has to do, clause by clause, and what our tests found.

IDs are those of the public conformance suite, so that its results and ours can be laid side by side.
Sections: ID = SPIFFE-ID, WE = Workload Endpoint, WA = Workload API, XS = X509-SVID, FD = Federation, JS =
JWT-SVID, TB = Trust Domain and Bundle; HD is hardening that no section asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BOTH = ("server", "client")
WORKLOAD = ("workload",)


@dataclass(frozen=True)
class Clause:
    """One requirement. `roles` are the sides of a connection that it is tested on."""

    id: str
    source: str
    statement: str
    roles: tuple[str, ...] = WORKLOAD


CLAUSES = (
    Clause("EP-1", "WE 4", "finds the endpoint in SPIFFE_ENDPOINT_SOCKET; explicit configuration goes first"),
    Clause("EP-2", "WE 3", "every call carries the metadata workload.spiffe.io: true"),
    Clause("EP-3", "WE 3, 4", "speaks to an endpoint on TCP"),
    Clause("EP-4", "WE 4", "an address with parts that its scheme does not have is refused without a call"),
    Clause("EP-5", "WE 6, A", "asks again after Unavailable, with pauses"),
    Clause("EP-6", "WE 6, A", "asks again after PermissionDenied, with pauses"),
    Clause("EP-7", "WE 6, A", "does not keep asking after InvalidArgument"),
    Clause("EP-8", "WE 6", "waits for an endpoint that is not there yet"),
    Clause("WA-1", "WA 4.2", "a stream that the agent ended is opened anew"),
    Clause("WA-2", "WA 4.5", "an update that lacks a mandatory field is discarded, the last good one kept"),
    Clause("WA-3", "WA 8", "the first SVID of a response is the default identity"),
    Clause("WA-4", "WA 5.2.1", "an identity that the agent withdrew is no longer presented"),
    Clause("XS-1", "WA 5.2.1", "presents the SVID that the agent delivered"),
    Clause("XS-2", "WA 5.1", "presents the whole chain, leaf first"),
    Clause("XS-3", "WA 4.3", "new connections use the rotated SVID, without a restart"),
    Clause("XS-4", "WA 5.1", "trusts every authority of a bundle"),
    Clause("XS-5", "WA 4.3, 4.4", "an authority that left the bundle is no longer trusted"),
    Clause("XV-1", "XS 5.1", "a valid SVID is accepted", BOTH),
    Clause("XV-2", "XS 5.1", "a valid SVID below an intermediate is accepted", BOTH),
    Clause("XV-3", "XS 2", "DNS names beside the SPIFFE ID do no harm", BOTH),
    Clause("XV-4", "XS 3.1", "an empty subject with a critical SAN is accepted", BOTH),
    Clause("XV-5", "XS 5.1", "another authority for the same trust domain name is refused", BOTH),
    Clause("XV-6", "XS 5.1", "an expired SVID is refused", BOTH),
    Clause("XV-7", "XS 5.1", "an SVID that is not valid yet is refused", BOTH),
    Clause("XV-8", "XS 5.2", "a CA certificate is refused as a leaf", BOTH),
    Clause("XV-9", "XS 5.2", "a leaf that may sign certificates is refused", BOTH),
    Clause("XV-10", "XS 5.2", "a leaf that may sign CRLs is refused", BOTH),
    Clause("XV-11", "XS 2, 5.2", "more than one URI name is refused", BOTH),
    Clause("XV-12", "XS 2", "a certificate without a URI name is refused", BOTH),
    Clause("XV-13", "XS 5.2", "a URI of another scheme is refused", BOTH),
    Clause("XV-14", "XS 3.1, 5.2", "the ID of a trust domain itself is refused", BOTH),
    Clause(
        "XV-15", "WA 4.6, FD 7.3", "an ID of a domain without a bundle is refused, whoever signed it", BOTH
    ),
    Clause("XF-1", "WA 4.6", "a workload of a federated domain is accepted", BOTH),
    Clause("XF-2", "WA 4.6, FD 4.2, 7.3", "an authority vouches for its own trust domain only", BOTH),
    Clause("XF-3", "WA 4.4", "a domain that later updates leave out is no longer trusted", BOTH),
    Clause("ID-1", "ID 2, 2.1, 2.2", "what is not a SPIFFE ID is refused"),
    Clause("ID-2", "ID 2.1, 2.2, 2.3", "unusual SPIFFE IDs are accepted"),
    Clause("HX-1", "HD", "an own SVID with a broken signature is discarded"),
    Clause("HX-2", "HD", "an own SVID of an authority outside its bundle is discarded"),
    Clause("HX-3", "HD", "an own SVID that has expired is discarded"),
    Clause("HX-4", "HD", "an own SVID that is a CA certificate is discarded"),
    Clause("HX-5", "HD", "an own SVID that may sign certificates is discarded"),
    Clause("HX-6", "HD", "an own SVID with two URI names is discarded"),
    Clause("HX-7", "HD", "an own SVID whose URI is of another scheme is discarded"),
    Clause("HX-8", "HD", "an own SVID with a key of another certificate is discarded"),
    Clause("HX-9", "HD", "an own SVID whose name differs from the one announced is discarded"),
    Clause("JV-1", "JS 4, WA 6.3", "a valid token is accepted and its subject is the identity"),
    Clause("JV-2", "JS 2.1", "each algorithm of the list is accepted"),
    Clause("JV-3", "JS 2.1", "a token with algorithm none is refused"),
    Clause("JV-4", "JS 2.1", "HMAC is refused, also keyed with a public key of the bundle"),
    Clause("JV-5", "JS 2.1", "a signature outside the list is refused, although its key is in the bundle"),
    Clause("JV-6", "JS 4; RFC 7518 3.4", "an algorithm that is not the key's is refused"),
    Clause("JV-7", "JS 3.2", "a token without audience is refused"),
    Clause("JV-8", "JS 3.2", "a token for another audience is refused"),
    Clause("JV-9", "JS 3.2", "a token for several audiences is accepted by each"),
    Clause("JV-10", "JS 4; RFC 7519 4.1.3", "an audience that is a single string is accepted"),
    Clause("JV-11", "JS 3.3", "a token without expiry is refused"),
    Clause("JV-12", "JS 3.3", "an expired token is refused"),
    Clause("JV-13", "JS 4; RFC 7519 4.1.5", "a token that is not valid yet is refused"),
    Clause("JV-14", "JS 4", "a changed signature is refused"),
    Clause("JV-15", "JS 4", "a changed payload is refused"),
    Clause("JV-16", "JS 4, WA 6.3", "a signature by a key outside the bundle is refused"),
    Clause("JV-17", "WA 6.3", "a key of one trust domain does not vouch for a subject of another"),
    Clause("JV-18", "WA 6.3", "a subject whose trust domain has no bundle is refused"),
    Clause("JV-19", "JS 3.1", "a subject that is no SPIFFE ID of a workload is refused"),
    Clause("JV-20", "JS 2.3", "type JWT, JOSE or none at all is accepted"),
    Clause("JV-21", "JS 2.3", "any other type is refused"),
    Clause("JV-22", "JS 2.2", "a token without key ID is accepted"),
    Clause("JV-23", "JS 2, JS 4; RFC 7515 4.1.11", "a critical header that is not known is refused"),
    Clause("JV-24", "JS 5.1", "JSON serialization is refused"),
    Clause("JV-25", "JS 5.1", "what is no compact token is refused"),
    Clause("JB-1", "WA 4.3", "a key that an update brings is used"),
    Clause("JB-2", "WA 4.4", "a key that an update leaves out is not used any more"),
    Clause("JB-3", "WA 4.4, 6.2.2", "a trust domain that an update leaves out is not trusted any more"),
    Clause("JB-4", "JS 6.2; RFC 7515 4.1.4", "the key is chosen by its ID"),
    Clause("JB-5", "JS 6.2, TB 4.2.2", "keys of another use are ignored, the others work on"),
    Clause("JB-6", "TB 4.1.3, 4.2.1", "keys of an unknown type are ignored, the others work on"),
    Clause("JB-7", "TB 4.1.3", "a bundle without keys trusts nothing"),
    Clause("JB-8", "WA 6.2.2, 6.3", "a federated trust domain's token is accepted by that domain's bundle"),
    Clause("JF-1", "WA 6.2.1", "the audience is asked for, and the agent's token is what comes back"),
    Clause("JF-2", "WA 6.2.1", "several audiences are asked for unchanged"),
    Clause("JF-3", "WA 6.2.1", "an identity that is asked for is passed on, and its token comes back"),
    Clause("JF-4", "WA 6.2.1", "a denial is an error, although an older token is still valid"),
)

EXPECTED = {(clause.id, role): clause for clause in CLAUSES for role in clause.roles}


class Results:
    """The outcome of each test by clause and role. A clause passes when all its tests did."""

    def __init__(self) -> None:
        self._passed: dict[tuple[str, str], bool] = {}

    def add(self, clause: str, role: str, passed: bool) -> None:
        """Count one test; anything but a pass fails the clause."""
        self._passed[clause, role] = passed and self._passed.get((clause, role), True)

    def rows(self, *, complete: bool) -> list[dict[str, str]]:
        """Results in the order of the table. `complete` lists clauses without a test too, as failed."""
        return [
            {"id": clause, "role": role, "result": "pass" if self._passed.get((clause, role)) else "fail"}
            for clause, role in EXPECTED
            if complete or (clause, role) in self._passed
        ]

    def write(self, path: Path) -> None:
        """Write every expected row as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows(complete=True), indent=1) + "\n")


def table(rows: Iterable[dict[str, str]]) -> list[str]:
    """The rows as lines of text."""
    return [
        f"{row['id']:<6} {row['role']:<9} {row['result']:<5} {EXPECTED[row['id'], row['role']].statement}"
        f" ({EXPECTED[row['id'], row['role']].source})"
        for row in rows
    ]

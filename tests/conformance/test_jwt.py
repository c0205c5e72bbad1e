"""JWT-SVIDs: one test for each JV, JB and JF of the SPIFFE conformance catalogue.

The code under test is a `JwtSource` on a real Workload API: what is not refused by it is accepted by our
services. Each refusal comes after the same source has accepted the rightful token, and an update that must
not matter is followed by one that does.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from spiffe._proto import workload_pb2 as pb

from ztmtls.ids import TrustDomain
from ztmtls.jwt_source import JwtSource
from ztmtls.jwt_svid import JwtBundle, JwtRefused
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi
from ztmtls.testing.jose import SigningKey, base64url, jwks, public_jwk, sign_jwt
from ztmtls.testing.workload_api import FETCH_JWT_BUNDLES, FETCH_JWT_SVID

DOMAIN = "spiffe://zt.example"
OTHER = "spiffe://other.example"
SUBJECT = f"{DOMAIN}/caller"
OURS = f"{DOMAIN}/validator"
AUDIENCE = "conformance"

P256, P384, P521 = (ec.generate_private_key(c) for c in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()))
RSA = rsa.generate_private_key(65537, 2048)
ED25519 = ed25519.Ed25519PrivateKey.generate()
STRANGER = ec.generate_private_key(ec.SECP256R1())
KEYS: Mapping[str, SigningKey] = {"p256": P256, "p384": P384, "p521": P521, "rsa": RSA, "ed25519": ED25519}


def token(
    key: SigningKey | bytes | None = P256,
    *,
    algorithm: str | None = None,
    header: Mapping[str, Any] | None = None,
    claims: Mapping[str, Any] | None = None,
) -> str:
    """A valid token but for what is given; None leaves a member out."""
    now = int(time.time())
    whole_header = {"alg": "ES256", "kid": "p256", "typ": "JWT", **(header or {})}
    whole_claims = {"sub": SUBJECT, "aud": [AUDIENCE], "exp": now + 300, "iat": now, **(claims or {})}
    return sign_jwt(
        {name: value for name, value in whole_header.items() if value is not None},
        {name: value for name, value in whole_claims.items() if value is not None},
        key,
        algorithm=algorithm,
    )


@dataclass
class Validator:
    """A source whose bundles the test sets, asked as a service asks it."""

    workload: Workload
    source: JwtSource

    async def knows(self, bundles: Mapping[str, bytes]) -> None:
        """Send these bundles, and return when they are in force."""
        expected = {
            TrustDomain.parse(name): JwtBundle.from_jwks(TrustDomain.parse(name), document)
            for name, document in bundles.items()
        }
        changed = asyncio.Event()
        unsubscribe = self.source.subscribe(changed.set)
        try:
            self.workload.push_raw(pb.JWTBundlesResponse(bundles=bundles))
            async with asyncio.timeout(10):
                while dict(self.source.bundles) != expected:
                    await changed.wait()
                    changed.clear()
        finally:
            unsubscribe()

    async def accepts(self, value: str) -> str:
        return str((await self.source.validate(value, AUDIENCE)).id)

    async def reason(self, value: str, rightful: str | None = None) -> Reason:
        """Why `value` is refused, after the rightful token was accepted."""
        assert await self.accepts(rightful or token())
        with pytest.raises(JwtRefused) as caught:
            await self.source.validate(value, AUDIENCE)
        return caught.value.reason


@pytest.fixture
async def workload() -> AsyncIterator[Workload]:
    async with WorkloadApi() as api:
        workload = await api.add_workload(
            "validator", OURS, f"{DOMAIN}/second", ca=CertificateAuthority("zt.example")
        )
        workload.allow(pid=os.getpid())
        yield workload


@pytest.fixture
async def source(workload: Workload) -> AsyncIterator[JwtSource]:
    async with JwtSource(workload.endpoint) as source:
        await source.ready(10)
        yield source


@pytest.fixture
async def validator(workload: Workload, source: JwtSource) -> Validator:
    validator = Validator(workload, source)
    await validator.knows({DOMAIN: jwks(*(public_jwk(key, kid) for kid, key in KEYS.items()))})
    return validator


# -- Validation -------------------------------------------------------------------------------------


@pytest.mark.conformance("JV-1")
async def test_valid_token_is_accepted(validator: Validator) -> None:
    assert await validator.accepts(token()) == SUBJECT


@pytest.mark.conformance("JV-2")
@pytest.mark.parametrize(
    ("algorithm", "kid"),
    [
        ("ES256", "p256"),
        ("ES384", "p384"),
        ("ES512", "p521"),
        *((f"{family}{bits}", "rsa") for family in ("RS", "PS") for bits in (256, 384, 512)),
    ],
)
async def test_every_algorithm_of_the_standard_is_accepted(
    validator: Validator, algorithm: str, kid: str
) -> None:
    assert await validator.accepts(token(KEYS[kid], header={"alg": algorithm, "kid": kid})) == SUBJECT


@pytest.mark.conformance("JV-3")
async def test_unsigned_token_is_refused(validator: Validator) -> None:
    assert await validator.reason(token(None, header={"alg": "none"})) is Reason.JWT_ALGORITHM


@pytest.mark.conformance("JV-4")
@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_hmac_is_refused_also_with_a_public_key_as_secret(validator: Validator, algorithm: str) -> None:
    public = P256.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for secret in (b"secret" * 16, public):
        assert await validator.reason(token(secret, header={"alg": algorithm})) is Reason.JWT_ALGORITHM


@pytest.mark.conformance("JV-5")
async def test_edwards_curve_is_refused_although_the_key_is_published(validator: Validator) -> None:
    forged = token(ED25519, header={"alg": "EdDSA", "kid": "ed25519"})

    assert await validator.reason(forged) is Reason.JWT_ALGORITHM


@pytest.mark.conformance("JV-6")
async def test_algorithm_that_is_not_the_key_s_is_refused(validator: Validator) -> None:
    for algorithm, signed_by in (("RS256", "ES256"), ("ES384", "ES384")):
        forged = token(header={"alg": algorithm, "kid": "p256"}, algorithm=signed_by)
        assert await validator.reason(forged) is Reason.JWT_ALGORITHM


@pytest.mark.conformance("JV-7")
async def test_token_without_audience_is_refused(validator: Validator) -> None:
    assert await validator.reason(token(claims={"aud": None})) is Reason.JWT_AUDIENCE


@pytest.mark.conformance("JV-8")
async def test_token_for_another_audience_is_refused(validator: Validator) -> None:
    for audience in (["other"], "other", []):
        assert await validator.reason(token(claims={"aud": audience})) is Reason.JWT_AUDIENCE


@pytest.mark.conformance("JV-9")
async def test_token_for_several_audiences_is_accepted(validator: Validator) -> None:
    assert await validator.accepts(token(claims={"aud": ["other", AUDIENCE]})) == SUBJECT


@pytest.mark.conformance("JV-10")
async def test_audience_may_be_one_string(validator: Validator) -> None:
    assert await validator.accepts(token(claims={"aud": AUDIENCE})) == SUBJECT


@pytest.mark.conformance("JV-11")
async def test_token_without_expiry_is_refused(validator: Validator) -> None:
    assert await validator.reason(token(claims={"exp": None})) is Reason.JWT_CLAIM


@pytest.mark.conformance("JV-12")
async def test_expired_token_is_refused(validator: Validator) -> None:
    for ago in (300, 1):
        expired = token(claims={"exp": int(time.time()) - ago})
        assert await validator.reason(expired) is Reason.JWT_EXPIRED


@pytest.mark.conformance("JV-13")
async def test_token_of_the_future_is_refused(validator: Validator) -> None:
    now = int(time.time())
    assert await validator.accepts(token(claims={"nbf": now}))

    assert await validator.reason(token(claims={"nbf": now + 200})) is Reason.JWT_NOT_YET_VALID


@pytest.mark.conformance("JV-14")
async def test_changed_signature_is_refused(validator: Validator) -> None:
    header, claims, signature = token().split(".")
    changed = bytearray(base64.urlsafe_b64decode(signature + "=="))
    changed[20] ^= 1

    forged = f"{header}.{claims}.{base64url(bytes(changed))}"

    assert await validator.reason(forged, f"{header}.{claims}.{signature}") is Reason.JWT_SIGNATURE


@pytest.mark.conformance("JV-15")
async def test_changed_payload_is_refused(validator: Validator) -> None:
    rightful = token()
    header, claims, signature = rightful.split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"sub": f"{DOMAIN}/admin"}

    forged = f"{header}.{base64url(json.dumps(changed).encode())}.{signature}"

    assert await validator.reason(forged, rightful) is Reason.JWT_SIGNATURE


@pytest.mark.conformance("JV-16")
async def test_signature_by_an_unknown_key_is_refused(validator: Validator) -> None:
    unknown = token(STRANGER, header={"kid": "stranger"})
    unnamed = token(STRANGER, header={"kid": None})

    assert await validator.reason(unknown) is Reason.JWT_UNKNOWN_KEY
    assert await validator.reason(unnamed) is Reason.JWT_SIGNATURE


@pytest.mark.conformance("JV-17")
async def test_key_of_one_domain_does_not_vouch_for_another(validator: Validator) -> None:
    await validator.knows(
        {DOMAIN: jwks(public_jwk(P256, "p256")), OTHER: jwks(public_jwk(STRANGER, "theirs"))}
    )
    theirs = token(STRANGER, header={"kid": "theirs"}, claims={"sub": f"{OTHER}/x"})

    crossed = token(P256, claims={"sub": f"{OTHER}/x"})
    unnamed = token(P256, header={"kid": None}, claims={"sub": f"{OTHER}/x"})

    assert await validator.reason(crossed, theirs) is Reason.JWT_UNKNOWN_KEY
    assert await validator.reason(unnamed, theirs) is Reason.JWT_SIGNATURE


@pytest.mark.conformance("JV-18")
async def test_subject_of_an_unknown_domain_is_refused(validator: Validator) -> None:
    assert await validator.reason(token(claims={"sub": f"{OTHER}/x"})) is Reason.UNKNOWN_TRUST_DOMAIN


@pytest.mark.conformance("JV-19")
async def test_subject_that_is_no_workload_s_id_is_refused(validator: Validator) -> None:
    for subject in (None, "caller", "https://zt.example/caller", DOMAIN, f"{DOMAIN}/", f"{DOMAIN}/a//b"):
        assert await validator.reason(token(claims={"sub": subject})) is Reason.JWT_SUBJECT


@pytest.mark.conformance("JV-20")
@pytest.mark.parametrize("kind", ["JWT", "JOSE", None])
async def test_known_type_or_none_is_accepted(validator: Validator, kind: str | None) -> None:
    assert await validator.accepts(token(header={"typ": kind})) == SUBJECT


@pytest.mark.conformance("JV-21")
@pytest.mark.parametrize("kind", ["at+jwt", "jwt", "", "JWT "])
async def test_other_type_is_refused(validator: Validator, kind: str) -> None:
    assert await validator.reason(token(header={"typ": kind})) is Reason.JWT_TYPE


@pytest.mark.conformance("JV-22")
async def test_token_without_key_id_is_accepted(validator: Validator) -> None:
    assert await validator.accepts(token(header={"kid": None})) == SUBJECT


@pytest.mark.conformance("JV-23")
async def test_critical_header_is_refused(validator: Validator) -> None:
    critical = token(header={"crit": ["https://zt.example/unknown"], "https://zt.example/unknown": True})

    assert await validator.reason(critical) is Reason.JWT_HEADER


@pytest.mark.conformance("JV-24")
async def test_json_serialization_is_refused(validator: Validator) -> None:
    rightful = token()
    header, claims, signature = rightful.split(".")
    signed = {"protected": header, "signature": signature}
    for document in ({"payload": claims, **signed}, {"payload": claims, "signatures": [signed]}):
        assert await validator.reason(json.dumps(document), rightful) is Reason.JWT_MALFORMED


@pytest.mark.conformance("JV-25")
async def test_malformed_token_is_refused(validator: Validator) -> None:
    rightful = token()
    header, claims, signature = rightful.split(".")
    for malformed in (
        "",
        "..",
        f"{header}.{claims}",
        f"{rightful}.{signature}",
        f"!{header[1:]}.{claims}.{signature}",
        f"{header}.{claims}.{signature}=",
        f"{base64url(b'not JSON')}.{claims}.{signature}",
        f"{header}.{base64url(b'[]')}.{signature}",
    ):
        assert await validator.reason(malformed, rightful) is Reason.JWT_MALFORMED


# -- Bundles ----------------------------------------------------------------------------------------


@pytest.mark.conformance("JB-1")
async def test_key_of_an_update_is_used(validator: Validator) -> None:
    new = token(STRANGER, header={"kid": "new"})
    assert await validator.reason(new) is Reason.JWT_UNKNOWN_KEY

    await validator.knows({DOMAIN: jwks(public_jwk(P256, "p256"), public_jwk(STRANGER, "new"))})

    assert await validator.accepts(new) == SUBJECT


@pytest.mark.conformance("JB-2")
async def test_key_that_an_update_leaves_out_is_not_used_any_more(validator: Validator) -> None:
    old, other = token(), token(P384, header={"alg": "ES384", "kid": "p384"})
    assert await validator.accepts(old) == SUBJECT

    await validator.knows({DOMAIN: jwks(public_jwk(P384, "p384"))})

    assert await validator.reason(old, other) is Reason.JWT_UNKNOWN_KEY


@pytest.mark.conformance("JB-3")
async def test_domain_that_an_update_leaves_out_is_not_trusted_any_more(validator: Validator) -> None:
    own = jwks(public_jwk(P256, "p256"))
    theirs = token(STRANGER, header={"kid": "theirs"}, claims={"sub": f"{OTHER}/x"})
    await validator.knows({DOMAIN: own, OTHER: jwks(public_jwk(STRANGER, "theirs"))})
    assert await validator.accepts(theirs) == f"{OTHER}/x"

    await validator.knows({DOMAIN: own})

    assert await validator.reason(theirs) is Reason.UNKNOWN_TRUST_DOMAIN


@pytest.mark.conformance("JB-4")
async def test_key_is_chosen_by_its_id(validator: Validator) -> None:
    second, third = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    keys = {"first": P256, "second": second, "third": third}
    await validator.knows({DOMAIN: jwks(*(public_jwk(key, kid) for kid, key in keys.items()))})
    rightful = token(second, header={"kid": "second"})

    assert await validator.accepts(rightful) == SUBJECT
    assert await validator.reason(token(second, header={"kid": "third"}), rightful) is Reason.JWT_SIGNATURE


@pytest.mark.conformance("JB-5")
async def test_key_of_another_use_is_ignored(validator: Validator) -> None:
    await validator.knows(
        {
            DOMAIN: jwks(
                public_jwk(STRANGER, "x509", use="x509-svid"),
                public_jwk(P256, "p256", use="jwt-svid"),
            )
        }
    )

    assert await validator.reason(token(STRANGER, header={"kid": "x509"})) is Reason.JWT_UNKNOWN_KEY


@pytest.mark.conformance("JB-5")
async def test_key_without_use_is_ignored_in_a_spiffe_bundle_and_taken_from_the_agent(
    validator: Validator,
) -> None:
    # TB 4.2.2 is about SPIFFE bundles. The Workload API sends a plain JWK Set that may hold nothing but
    # JWT-SVID keys (WA 6.2.2), and SPIRE's agents send it without `use`.
    document = jwks(public_jwk(STRANGER, "without"), public_jwk(P256, "p256", use="jwt-svid"))

    bundle = JwtBundle.from_spiffe_bundle(TrustDomain("zt.example"), document)
    await validator.knows({DOMAIN: document})

    assert [authority.key_id for authority in bundle.authorities] == ["p256"]
    assert await validator.accepts(token(STRANGER, header={"kid": "without"})) == SUBJECT


@pytest.mark.conformance("JB-6")
async def test_key_of_an_unknown_type_is_ignored(validator: Validator) -> None:
    await validator.knows({DOMAIN: jwks(public_jwk(STRANGER, "barrier"))})

    await validator.knows(
        {DOMAIN: jwks({"kty": "UNHEARD-OF", "kid": "new", "use": "jwt-svid"}, public_jwk(P256, "p256"))}
    )

    assert await validator.accepts(token()) == SUBJECT


@pytest.mark.conformance("JB-7")
async def test_empty_bundle_trusts_nothing(validator: Validator) -> None:
    theirs = token(STRANGER, header={"kid": "theirs"}, claims={"sub": f"{OTHER}/x"})
    before = token()
    assert await validator.accepts(before) == SUBJECT

    await validator.knows({DOMAIN: jwks(), OTHER: jwks(public_jwk(STRANGER, "theirs"))})

    assert await validator.reason(before, theirs) is Reason.JWT_UNKNOWN_KEY


@pytest.mark.conformance("JB-8")
async def test_token_of_a_federated_domain_is_accepted(workload: Workload, source: JwtSource) -> None:
    federated = CertificateAuthority("other.example")
    theirs = federated.issue_jwt(f"{OTHER}/x", [AUDIENCE])
    with pytest.raises(JwtRefused):
        await source.validate(theirs, AUDIENCE)
    changed = asyncio.Event()
    source.subscribe(changed.set)

    workload.set_federation(federated)
    async with asyncio.timeout(10):
        await changed.wait()

    assert str((await source.validate(theirs, AUDIENCE)).id) == f"{OTHER}/x"
    own = workload.ca.issue_jwt(SUBJECT, [AUDIENCE])
    assert str((await source.validate(own, AUDIENCE)).id) == SUBJECT


# -- Fetching ---------------------------------------------------------------------------------------


@pytest.mark.conformance("JF-1")
async def test_token_for_the_audience_is_fetched(workload: Workload, source: JwtSource) -> None:
    svid = await source.fetch("reports")

    assert list(workload.jwt_requests[-1].audience) == ["reports"]
    assert (str(svid.id), svid.audience) == (OURS, ("reports",))
    assert (await source.validate(svid.token, "reports")).id == svid.id


@pytest.mark.conformance("JF-2")
async def test_several_audiences_are_passed_on(workload: Workload, source: JwtSource) -> None:
    audience = ["reports", f"{DOMAIN}/ledger", "third"]

    svid = await source.fetch(*audience)

    assert list(workload.jwt_requests[-1].audience) == audience
    assert list(svid.audience) == audience


@pytest.mark.conformance("JF-3")
async def test_identity_that_is_asked_for_is_fetched(workload: Workload, source: JwtSource) -> None:
    svid = await source.fetch("reports", spiffe_id=f"{DOMAIN}/second")

    assert workload.jwt_requests[-1].spiffe_id == f"{DOMAIN}/second"
    assert str(svid.id) == f"{DOMAIN}/second"


@pytest.mark.conformance("JF-4")
async def test_denial_is_an_error_although_a_token_is_left(workload: Workload, source: JwtSource) -> None:
    left = await source.fetch("reports")
    workload.fail_next(grpc.StatusCode.PERMISSION_DENIED, method=FETCH_JWT_SVID)

    with pytest.raises(NoIdentity) as caught:
        await source.fetch("reports", fresh=True)

    assert caught.value.reason is Reason.IDENTITY_DENIED
    calls = workload.calls[FETCH_JWT_SVID]
    again = await source.fetch("reports")  # the one that was left is not given out any more
    assert workload.calls[FETCH_JWT_SVID] == calls + 1
    assert again.id == left.id
    assert workload.open_streams(FETCH_JWT_BUNDLES) == 1

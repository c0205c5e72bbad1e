"""JWT-SVIDs and bundles without I/O: what is accepted, and what is refused with which reason.

Each refusal is a change of one thing in a token that is accepted without it.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from ztmtls.ids import SpiffeId, TrustDomain
from ztmtls.jwt_svid import (
    MAX_KEYS,
    MAX_TOKEN,
    NOT_BEFORE_LEEWAY,
    JwtBundle,
    JwtRefused,
    JwtSvid,
    issued_to_us,
    validate,
)
from ztmtls.reasons import Reason
from ztmtls.svid import InvalidSvid
from ztmtls.testing.jose import SigningKey, base64url, jwks, public_jwk, sign_jwt

DOMAIN = TrustDomain("zt.example")
OTHER = TrustDomain("other.example")
SUBJECT = "spiffe://zt.example/ns/zt-demo/sa/orders"
AUDIENCE = "spiffe://zt.example/ns/zt-demo/sa/payments"
NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
STAMP = int(NOW.timestamp())

P256, P384, P521 = (ec.generate_private_key(c) for c in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()))
RSA = rsa.generate_private_key(65537, 2048)
STRANGER = ec.generate_private_key(ec.SECP256R1())
KEYS: dict[str, SigningKey] = {"p256": P256, "p384": P384, "p521": P521, "rsa": RSA}
BUNDLE = JwtBundle.from_jwks(DOMAIN, jwks(*(public_jwk(key, kid) for kid, key in KEYS.items())))

HEADER: Mapping[str, Any] = {"alg": "ES256", "kid": "p256", "typ": "JWT"}
CLAIMS: Mapping[str, Any] = {"sub": SUBJECT, "aud": [AUDIENCE], "exp": STAMP + 300, "iat": STAMP}


def without(members: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in members.items() if key != name}


def make(
    header: Mapping[str, Any] = HEADER,
    claims: Mapping[str, Any] = CLAIMS,
    key: SigningKey | bytes | None = P256,
    algorithm: str | None = None,
) -> str:
    return sign_jwt(header, claims, key, algorithm=algorithm)


def check(token: str, bundles: Mapping[TrustDomain, JwtBundle] | None = None, now: datetime = NOW) -> JwtSvid:
    return validate(token, AUDIENCE, {DOMAIN: BUNDLE} if bundles is None else bundles, now)


def reason_of(token: str, bundles: Mapping[TrustDomain, JwtBundle] | None = None, **more: Any) -> Reason:
    """Why `token` is refused; the rightful one is accepted by the same bundles first."""
    assert check(make()).id == SpiffeId.parse(SUBJECT)
    with pytest.raises(JwtRefused) as caught:
        check(token, bundles, **more)
    assert all(part not in str(caught.value) for part in token.split(".") if len(part) > 12)
    return caught.value.reason


def raw(*parts: bytes) -> str:
    """A token of these three parts, signed rightly over the first two when the third is missing."""
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts[:2])
    if len(parts) == 3:
        return f"{signed.decode()}.{base64url(parts[2])}"
    from jwt import get_algorithm_by_name

    return f"{signed.decode()}.{base64url(get_algorithm_by_name('ES256').sign(signed, P256))}"


# -- Accepted ---------------------------------------------------------------------------------------


def test_valid_token_gives_identity_audience_and_expiry() -> None:
    svid = check(make())

    assert svid.id == SpiffeId.parse(SUBJECT)
    assert svid.audience == (AUDIENCE,)
    assert svid.expiry == NOW + timedelta(seconds=300)
    assert svid.claims["iat"] == STAMP


@pytest.mark.parametrize(
    ("algorithm", "kid"),
    [
        ("ES256", "p256"),
        ("ES384", "p384"),
        ("ES512", "p521"),
        *((f"{family}{bits}", "rsa") for family in ("RS", "PS") for bits in (256, 384, 512)),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["kid", "no kid"])
def test_each_algorithm_of_the_standard_is_accepted(algorithm: str, kid: str, named: bool) -> None:
    header = {"alg": algorithm, **({"kid": kid} if named else {})}

    assert check(make(header, key=KEYS[kid])).id == SpiffeId.parse(SUBJECT)


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["other", AUDIENCE]])
def test_audience_may_be_a_string_or_an_array(audience: Any) -> None:
    assert AUDIENCE in check(make(claims={**CLAIMS, "aud": audience})).audience


def test_times_may_have_fractions_and_other_claims_may_be_there() -> None:
    svid = check(
        make(claims={**CLAIMS, "exp": STAMP + 0.5, "nbf": STAMP - 0.5, "jti": "x", "note": {"a": [1]}})
    )

    assert svid.expiry == NOW + timedelta(seconds=0.5)
    assert svid.claims["jti"] == "x"


def test_clock_of_the_issuer_may_be_slightly_ahead_for_nbf() -> None:
    claims = {**CLAIMS, "nbf": STAMP + int(NOT_BEFORE_LEEWAY.total_seconds())}

    assert check(make(claims=claims)).id == SpiffeId.parse(SUBJECT)


# -- Refused: form and header -----------------------------------------------------------------------


def test_token_that_is_no_compact_jws_is_refused() -> None:
    header, claims, signature = make().split(".")
    general = json.dumps({"payload": claims, "signatures": [{"protected": header, "signature": signature}]})
    flattened = json.dumps({"payload": claims, "protected": header, "signature": signature})

    for token in [
        "",
        "rubbish",
        f"{header}.{claims}",
        f"{header}.{claims}.{signature}.",
        f"{header}.{claims}.{signature}.{signature}",
        f"{header}..{signature}",
        f".{claims}.{signature}",
        f"{header}.{claims}.{signature}=",
        f"{header}=.{claims}.{signature}",
        f"{header}.{claims}.{signature}\n",
        f" {header}.{claims}.{signature}",
        f"{header}.{claims}.{signature}é",
        general,
        flattened,
    ]:
        assert reason_of(token) is Reason.JWT_MALFORMED, token


def test_part_that_is_no_json_object_is_refused() -> None:
    good_header, good_claims = json.dumps(HEADER).encode(), json.dumps(CLAIMS).encode()
    assert check(raw(good_header, good_claims)).id == SpiffeId.parse(SUBJECT)

    for header, claims in [
        (b"{", good_claims),
        (b"[]", good_claims),
        (good_header, b"null"),
        (good_header, b"\xff\xfe"),
        (good_header, json.dumps(CLAIMS).encode("utf-16")),
        (good_header, b"[" * 100_000),
        (good_header, good_claims[:-1] + b', "note": NaN}'),
        (good_header, good_claims[:-1] + b', "note": Infinity}'),
    ]:
        token = raw(header, claims)
        if len(token) <= MAX_TOKEN:
            assert reason_of(token) is Reason.JWT_MALFORMED, (header, claims)


def test_deeply_nested_json_is_refused() -> None:
    nested = json.dumps(CLAIMS).encode()[:-1] + b', "note": ' + b"[" * 10_000
    assert reason_of(raw(json.dumps(HEADER).encode(), nested)) is Reason.JWT_MALFORMED


def test_name_that_stands_twice_is_refused() -> None:
    good_header, good_claims = json.dumps(HEADER).encode(), json.dumps(CLAIMS).encode()
    for header, claims in [
        (b'{"alg": "none", ' + good_header[1:], good_claims),
        (good_header, b'{"sub": "spiffe://zt.example/other", ' + good_claims[1:]),
    ]:
        assert reason_of(raw(header, claims)) is Reason.JWT_MALFORMED


def test_second_spelling_of_the_same_bytes_is_refused() -> None:
    header, claims, signature = make().split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 64 bytes take 86 characters, whose last four bits mean nothing.
    other = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ 1]
    assert base64.urlsafe_b64decode(other + "==") == base64.urlsafe_b64decode(signature + "==")

    assert reason_of(f"{header}.{claims}.{other}") is Reason.JWT_MALFORMED


def test_token_has_a_bounded_size() -> None:
    spare = MAX_TOKEN * 3 // 4 - 700
    assert check(make(claims={**CLAIMS, "note": "x" * spare})).id == SpiffeId.parse(SUBJECT)

    assert reason_of(make(claims={**CLAIMS, "note": "x" * MAX_TOKEN})) is Reason.JWT_MALFORMED


def test_other_algorithms_are_refused() -> None:
    pem = P256.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    eddsa = ed25519.Ed25519PrivateKey.generate()
    for token in [
        make({**HEADER, "alg": "none"}, key=None),
        make({**HEADER, "alg": "None"}, key=None),
        *(make({**HEADER, "alg": f"HS{bits}"}, key=pem) for bits in (256, 384, 512)),
        make({**HEADER, "alg": "EdDSA"}, key=eddsa),
        make({**HEADER, "alg": "ES256K"}, algorithm="ES256"),
        make({**HEADER, "alg": "es256"}, algorithm="ES256"),
        make({**HEADER, "alg": ["ES256"]}, algorithm="ES256"),
        make({**HEADER, "alg": None}, algorithm="ES256"),
        make(without(HEADER, "alg"), algorithm="ES256"),
    ]:
        assert reason_of(token) is Reason.JWT_ALGORITHM


def test_algorithm_that_does_not_go_with_the_key_is_refused() -> None:
    for header, key, algorithm in [
        ({"alg": "RS256", "kid": "p256"}, P256, "ES256"),
        ({"alg": "ES384", "kid": "p256"}, P256, "ES384"),
        ({"alg": "ES256", "kid": "p384"}, P384, "ES256"),
        ({"alg": "ES256", "kid": "rsa"}, RSA, "RS256"),
    ]:
        assert reason_of(make(header, key=key, algorithm=algorithm)) is Reason.JWT_ALGORITHM


def test_key_bound_to_an_algorithm_takes_no_other() -> None:
    bound = {DOMAIN: JwtBundle.from_jwks(DOMAIN, jwks(public_jwk(RSA, "rsa", alg="RS256")))}
    assert check(make({"alg": "RS256", "kid": "rsa"}, key=RSA), bound)

    assert reason_of(make({"alg": "PS256", "kid": "rsa"}, key=RSA), bound) is Reason.JWT_ALGORITHM


def test_type_is_jwt_or_jose_or_absent() -> None:
    for header in ({**HEADER, "typ": "JWT"}, {**HEADER, "typ": "JOSE"}, without(HEADER, "typ")):
        assert check(make(header))

    for value in ("jwt", "at+jwt", "", None, 1):
        assert reason_of(make({**HEADER, "typ": value})) is Reason.JWT_TYPE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crit", ["exp"]),
        ("crit", []),
        ("b64", False),
        ("jwk", public_jwk(STRANGER)),
        ("jku", "https://attacker.example/keys"),
        ("x5c", ["AA=="]),
        ("cty", "JWT"),
        ("zip", "DEF"),
        ("kid", 7),
        ("kid", None),
    ],
)
def test_header_that_may_not_be_there_is_refused(name: str, value: Any) -> None:
    assert reason_of(make({**HEADER, name: value})) is Reason.JWT_HEADER


# -- Refused: subject, key, signature ---------------------------------------------------------------


def test_subject_must_be_the_id_of_a_workload() -> None:
    assert reason_of(make(claims=without(CLAIMS, "sub"))) is Reason.JWT_SUBJECT
    for subject in (
        "orders",
        "",
        None,
        [SUBJECT],
        "https://zt.example/orders",
        "spiffe://zt.example",
        "spiffe://zt.example/",
        "spiffe://ZT.example/orders",
        "spiffe://zt.example/a/../b",
        SUBJECT + "\n",
    ):
        assert reason_of(make(claims={**CLAIMS, "sub": subject})) is Reason.JWT_SUBJECT


def test_only_the_bundle_of_the_subject_s_own_domain_counts() -> None:
    foreign = JwtBundle.from_jwks(OTHER, jwks(public_jwk(STRANGER, "p256")))
    both = {DOMAIN: BUNDLE, OTHER: foreign}
    theirs = {**CLAIMS, "sub": "spiffe://other.example/x"}
    assert check(make(claims=theirs, key=STRANGER), both).id.trust_domain == OTHER

    assert reason_of(make(claims=theirs, key=P256), both) is Reason.JWT_SIGNATURE
    assert reason_of(make(key=STRANGER), both) is Reason.JWT_SIGNATURE
    assert reason_of(make(without(HEADER, "kid"), key=STRANGER), both) is Reason.JWT_SIGNATURE
    assert reason_of(make(claims=theirs, key=STRANGER)) is Reason.UNKNOWN_TRUST_DOMAIN


def test_key_that_is_not_in_the_bundle_is_refused() -> None:
    assert reason_of(make({**HEADER, "kid": "gone"})) is Reason.JWT_UNKNOWN_KEY
    assert reason_of(make({**HEADER, "kid": ""})) is Reason.JWT_UNKNOWN_KEY
    assert reason_of(make(), {DOMAIN: JwtBundle(DOMAIN, ())}) is Reason.JWT_UNKNOWN_KEY


def test_named_key_alone_is_tried() -> None:
    second = ec.generate_private_key(ec.SECP256R1())
    bundles = {DOMAIN: JwtBundle.from_jwks(DOMAIN, jwks(public_jwk(P256, "one"), public_jwk(second, "two")))}
    assert check(make({"alg": "ES256", "kid": "two"}, key=second), bundles)

    assert reason_of(make({"alg": "ES256", "kid": "one"}, key=second), bundles) is Reason.JWT_SIGNATURE


def test_forged_signature_is_refused() -> None:
    header, claims, signature = make().split(".")
    flipped = bytearray(base64.urlsafe_b64decode(signature + "=="))
    flipped[10] ^= 1
    renamed = base64url(json.dumps({**CLAIMS, "sub": "spiffe://zt.example/admin"}).encode())

    for token in (
        f"{header}.{claims}.{base64url(bytes(flipped))}",
        f"{header}.{claims}.",
        f"{header}.{claims}.{signature[:40]}",
        f"{header}.{renamed}.{signature}",
        f"{base64url(json.dumps(dict(reversed(HEADER.items()))).encode())}.{claims}.{signature}",
        make(key=STRANGER),
        make(without(HEADER, "kid"), key=STRANGER),
    ):
        assert reason_of(token) is Reason.JWT_SIGNATURE
    assert reason_of(make({"alg": "RS256", "kid": "rsa"}, key=RSA)[:-4] + "AAAA") is Reason.JWT_SIGNATURE
    assert reason_of(make({"alg": "RS256", "kid": "rsa"}, key=RSA, algorithm="PS256")) is Reason.JWT_SIGNATURE


# -- Refused: time and audience ---------------------------------------------------------------------


def test_expired_token_is_refused_at_the_second() -> None:
    end = NOW + timedelta(seconds=300)
    assert check(make(), now=end - timedelta(microseconds=1))

    assert reason_of(make(), now=end) is Reason.JWT_EXPIRED


def test_expiry_must_be_a_moment() -> None:
    assert reason_of(make(claims=without(CLAIMS, "exp"))) is Reason.JWT_CLAIM
    for value in ("never", str(STAMP + 300), None, True, [STAMP + 300], 10**30, 1e300):
        assert reason_of(make(claims={**CLAIMS, "exp": value})) is Reason.JWT_CLAIM


def test_token_of_the_future_is_refused() -> None:
    late = STAMP + int(NOT_BEFORE_LEEWAY.total_seconds()) + 1
    assert reason_of(make(claims={**CLAIMS, "nbf": late})) is Reason.JWT_NOT_YET_VALID
    for value in ("now", None, False, 10**30):
        assert reason_of(make(claims={**CLAIMS, "nbf": value})) is Reason.JWT_CLAIM


def test_token_for_somebody_else_is_refused() -> None:
    assert reason_of(make(claims=without(CLAIMS, "aud"))) is Reason.JWT_AUDIENCE
    for value in (
        "other",
        ["other"],
        [],
        "",
        None,
        7,
        [7],
        {AUDIENCE: 1},
        AUDIENCE + "/x",
        AUDIENCE[:-1],
        [[AUDIENCE]],
    ):
        assert reason_of(make(claims={**CLAIMS, "aud": value})) is Reason.JWT_AUDIENCE
    assert reason_of(make(claims={**CLAIMS, "aud": [AUDIENCE, 7]})) is Reason.JWT_AUDIENCE


def test_empty_audience_is_nobody_s() -> None:
    token = make(claims={**CLAIMS, "aud": [""]})
    with pytest.raises(ValueError, match="empty audience"):
        validate(token, "", {DOMAIN: BUNDLE}, NOW)


# -- The token is a secret --------------------------------------------------------------------------


def test_token_appears_in_no_repr_log_or_exception(caplog: pytest.LogCaptureFixture) -> None:
    token = make(claims={**CLAIMS, "note": "CANARY"})
    svid = check(token)

    logging.getLogger("ztmtls").warning("%s %r", svid, svid)

    for text in (repr(svid), str(svid), f"{svid}", caplog.text):
        assert "CANARY" not in text
        assert not any(part in text for part in token.split("."))
    assert svid.token == token


# -- Tokens of our own ------------------------------------------------------------------------------


def test_own_token_must_be_what_was_asked_for() -> None:
    token = make(key=STRANGER)  # the receiver checks the signature
    assert issued_to_us(token, SUBJECT, [AUDIENCE], NOW).token == token

    for spiffe_id, audience, now, reason in [
        ("spiffe://zt.example/other", [AUDIENCE], NOW, Reason.JWT_SUBJECT),
        (SUBJECT, [AUDIENCE, "more"], NOW, Reason.JWT_AUDIENCE),
        (SUBJECT, [AUDIENCE], NOW + timedelta(seconds=300), Reason.JWT_EXPIRED),
    ]:
        with pytest.raises(JwtRefused) as caught:
            issued_to_us(token, spiffe_id, audience, now)
        assert caught.value.reason is reason
    with pytest.raises(JwtRefused) as caught:
        issued_to_us(make({**HEADER, "alg": "HS256"}, key=b"x" * 32), SUBJECT, [AUDIENCE], NOW)
    assert caught.value.reason is Reason.JWT_ALGORITHM


# -- Bundles ----------------------------------------------------------------------------------------


def key_ids(bundle: JwtBundle) -> list[str]:
    return [authority.key_id for authority in bundle.authorities]


def test_keys_that_are_not_for_jwt_svids_are_ignored() -> None:
    good = public_jwk(P256, "good")
    weak = rsa.generate_private_key(65537, 1024)
    ignored: list[Any] = [
        public_jwk(P256, "x509", use="x509-svid"),
        public_jwk(P256, "case", use="JWT-SVID"),
        public_jwk(P256, "sig", use="sig"),
        public_jwk(P256, "null", use=None),
        public_jwk(P256),
        public_jwk(P256, ""),
        {**public_jwk(P256), "kid": 7},
        public_jwk(P256, "algorithm", alg=["ES256"]),
        public_jwk(ed25519.Ed25519PrivateKey.generate(), "okp"),
        {"kty": "oct", "kid": "oct", "k": "c2VjcmV0"},
        {"kty": "PQC", "kid": "future", "pub": "AA"},
        {"kid": "no type"},
        public_jwk(weak, "weak"),
        {**public_jwk(P256, "curve"), "crv": "P-999"},
        public_jwk(ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        {**public_jwk(P256, "off curve"), "y": public_jwk(P256)["x"]},
        {**public_jwk(P256, "short"), "x": "AA"},
        {**public_jwk(P256, "text"), "x": 7},
        without(public_jwk(P256, "no y"), "y"),
        without(public_jwk(RSA, "no e"), "e"),
        {**public_jwk(RSA, "even"), "e": "Ag"},
        "text",
        None,
        [],
    ]
    for entry in ignored:
        assert key_ids(JwtBundle.from_jwks(DOMAIN, jwks(good))) == ["good"]
        document = json.dumps({"keys": [entry, good]}).encode()
        assert key_ids(JwtBundle.from_jwks(DOMAIN, document)) == ["good"], entry


def test_use_is_optional_from_the_workload_api_and_required_in_a_spiffe_bundle() -> None:
    document = jwks(public_jwk(P256, "with", use="jwt-svid"), public_jwk(P384, "without"))

    assert key_ids(JwtBundle.from_jwks(DOMAIN, document)) == ["with", "without"]
    assert key_ids(JwtBundle.from_spiffe_bundle(DOMAIN, document)) == ["with"]


def test_spiffe_bundle_may_hold_more_than_the_standard_names() -> None:
    keys = [public_jwk(P256, "jwt", use="jwt-svid", note=1), {"kty": "EC", "use": "x509-svid", "x5c": ["AA"]}]
    document = json.dumps({"keys": keys, "spiffe_sequence": 2**63, "spiffe_refresh_hint": 60, "more": 1})

    assert key_ids(JwtBundle.from_spiffe_bundle(DOMAIN, document.encode())) == ["jwt"]


def test_private_part_of_a_published_key_is_not_loaded() -> None:
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm

    private = [
        {**ECAlgorithm.to_jwk(P256, as_dict=True), "kid": "ec"},
        {**RSAAlgorithm.to_jwk(RSA, as_dict=True), "kid": "rsa"},
    ]
    bundle = JwtBundle.from_jwks(DOMAIN, jwks(*private))

    assert key_ids(bundle) == ["ec", "rsa"]
    assert not any(hasattr(a.key, "private_numbers") for a in bundle.authorities)


def test_empty_bundle_is_one_and_a_broken_document_is_none() -> None:
    assert JwtBundle.from_jwks(DOMAIN, b"").authorities == ()
    assert JwtBundle.from_jwks(DOMAIN, jwks()).authorities == ()

    for document in (
        b"{}",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": null}',
        b"rubbish",
        b"\xff",
        b"null",
        b"[" * 100_000,
    ):
        with pytest.raises(InvalidSvid) as caught:
            JwtBundle.from_jwks(DOMAIN, document)
        assert caught.value.reason is Reason.INVALID_UPDATE
    with pytest.raises(InvalidSvid):
        JwtBundle.from_spiffe_bundle(DOMAIN, b"")


def test_bundle_has_a_bounded_number_of_keys() -> None:
    keys = [public_jwk(P256, str(n)) for n in range(MAX_KEYS + 1)]
    assert len(JwtBundle.from_jwks(DOMAIN, jwks(*keys[:-1])).authorities) == MAX_KEYS

    with pytest.raises(InvalidSvid, match="more than"):
        JwtBundle.from_jwks(DOMAIN, jwks(*keys))

"""Request paths: whatever gets as far as the policy reads the same in every program on the way."""

from __future__ import annotations

from urllib.parse import unquote

from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.fuzz.models import policy_allows, readings
from ztmtls.authz import Policy, is_ambiguous
from ztmtls.ids import SpiffeId

CALLER = "spiffe://zt.example/caller"
POLICY = Policy.parse(
    {
        "version": 1,
        "rules": [
            {"name": "r", "callers": [CALLER], "methods": ["GET"], "paths": ["/", "/orders", "/orders/{id}"]},
            {"name": "w", "callers": [CALLER], "methods": ["POST"], "paths": ["/a/{x}/b", "/{x}/{y}"]},
        ],
    }
)
PIECES = st.sampled_from(
    [
        b"/",
        b"orders",
        b"a",
        b"b",
        b"%",
        b"%2f",
        b"%2F",
        b"%5c",
        b"\\",
        b"%2e",
        b".",
        b"..",
        b"%25",
        b"25",
        b"2f",
        b"%32",
        b"%66",
        b"%00",
        b"\x00",
        b";x=1",
        b"%3b",
        b"#",
        b"%23",
        b"?",
        b"%c3%a4",
        b"%ff",
        b"\xff",
        b"%0a",
        b"\r\n",
        b" ",
        b"%20",
        b"//",
        b"/.",
        b"/..",
        b"%zz",
        b"%E2%80%AE",
        b"*",
        b"http://x",
    ]
)
RAW_PATHS = st.one_of(
    st.lists(PIECES, max_size=8).map(lambda pieces: b"/" + b"".join(pieces)),
    st.lists(PIECES, max_size=8).map(b"".join),
    st.binary(max_size=40),
)


def path_of(raw: bytes) -> str:
    """As uvicorn makes ``scope["path"]`` from what is on the wire."""
    return unquote(raw.split(b"?", 1)[0].decode("latin-1"), "utf-8", "replace")


@given(RAW_PATHS)
@example(b"/orders/%%32f")
@example(b"/orders/%2%66x")
@example(b"/orders#/../admin")
def test_a_path_that_is_not_ambiguous_has_one_reading(raw: bytes) -> None:
    raw = raw.split(b"?", 1)[0]
    path = path_of(raw)
    if is_ambiguous(path, raw):
        event("ambiguous")
        return

    event("has one reading")
    assert path.isprintable()
    assert path.encode() == unquote(raw.decode("latin-1"), "latin-1").encode("latin-1")
    assert {"/".join(reading).encode("latin-1").decode() for reading in readings(raw)} == {path}


@given(RAW_PATHS, st.sampled_from(["GET", "POST", "get", "HEAD", ""]))
def test_the_decision_is_that_of_a_plain_reading_of_the_rules(raw: bytes, method: str) -> None:
    path = path_of(raw)
    decision = POLICY.decide(SpiffeId.parse(CALLER), method, path)
    assert decision.allowed == policy_allows(POLICY.rules, CALLER, method, path)
    assert (decision.rule is not None) == decision.allowed == (decision.reason is None)
    assert decision.detail.isprintable()

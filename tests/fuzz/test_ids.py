"""SPIFFE IDs and trust domains: what is accepted is what the standard's grammar says, no more and no less."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.models import is_spiffe_id, is_trust_domain
from ztmtls.ids import InvalidSpiffeId, SpiffeId, TrustDomain
from ztmtls.reasons import Reason

# Words of the grammar and of what is nearly it, so that many examples are good or almost good.
PIECES = st.sampled_from(
    [
        "spiffe://",
        "SPIFFE://",
        "spiffe:",
        "/",
        "//",
        ".",
        "..",
        "zt.example",
        "a",
        "Z",
        "_",
        "-",
        "%2f",
        "?q=1",
        "#f",
        "user@",
        ":443",
        "ä",
        "\x00",
        "\n",
        " ",
        "xn--a",
        "a" * 250,
        "a" * 1000,
        "\ufb00",
        "\uff10",
        "�",
    ]
)
ALMOST = st.lists(PIECES, max_size=8).map("".join)
WELL_FORMED = st.builds(
    lambda domain, path: "spiffe://" + domain + "".join("/" + segment for segment in path),
    st.from_regex(r"[a-z0-9._-]{1,40}", fullmatch=True),
    st.lists(st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True), max_size=5),
)
TEXTS = st.one_of(ALMOST, ALMOST.map(lambda text: "spiffe://" + text), WELL_FORMED, st.text())


@given(TEXTS)
@example("spiffe://" + "a" * 255)
@example("spiffe://" + "a" * 256)
@example("spiffe://a/" + "b" * 2037)
@example("spiffe://a/" + "b" * 2038)
@example("spiffe:///path")
@example("spiffe://zt.example\n")
def test_accepted_ids_are_those_of_the_grammar(text: str) -> None:
    try:
        parsed = SpiffeId.parse(text)
    except InvalidSpiffeId as refusal:
        assert refusal.reason is Reason.INVALID_SPIFFE_ID
        assert refusal.detail.isprintable()
        assert not is_spiffe_id(text)
        return

    assert is_spiffe_id(text)
    assert str(parsed) == text, "nothing is repaired"
    assert SpiffeId.parse(str(parsed)) == parsed
    assert parsed.trust_domain.name
    assert parsed.is_root == (text.count("/") == 2)


@given(st.one_of(TEXTS, st.from_regex(r"[a-z0-9._-]{1,300}", fullmatch=True)))
@example("")
@example("spiffe://zt.example/")
def test_accepted_trust_domains_are_those_of_the_grammar(text: str) -> None:
    try:
        domain = TrustDomain.parse(text)
    except InvalidSpiffeId:
        assert not is_trust_domain(text)
        assert not (is_spiffe_id(text) and text.count("/") == 2)
        return

    assert is_trust_domain(domain.name)
    assert text in (domain.name, str(domain.id))
    assert TrustDomain.parse(str(domain)) == TrustDomain.parse(str(domain.id)) == domain


@given(WELL_FORMED, WELL_FORMED)
def test_ids_are_equal_only_as_equal_strings(one: str, other: str) -> None:
    try:
        first, second = SpiffeId.parse(one), SpiffeId.parse(other)
    except InvalidSpiffeId:
        return
    assert (first == second) == (one == other)

"""SPIFFE IDs and trust domains: what is one, what is none, and that nothing is ever repaired."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable

import pytest

from ztmtls.ids import InvalidSpiffeId, SpiffeId, TrustDomain
from ztmtls.reasons import Reason

TRUST_DOMAIN_CHARACTERS = set(string.ascii_lowercase + string.digits + ".-_")
PATH_CHARACTERS = set(string.ascii_letters + string.digits + ".-_")
BEYOND_LATIN = ["а", "ａ", "１", "\u212a", "ſ", "ı", "／", "․", "\u200b", "\u2028", "😀", "\udc80", "\ufeff"]  # noqa: RUF001

ACCEPTED = {
    "spiffe://trustdomain": ("trustdomain", ""),
    "spiffe://trustdomain/path": ("trustdomain", "/path"),
    "spiffe://trustdomain/path/to/it": ("trustdomain", "/path/to/it"),
    "spiffe://trustdomain/.path": ("trustdomain", "/.path"),
    "spiffe://trustdomain/..path": ("trustdomain", "/..path"),
    "spiffe://trustdomain/...": ("trustdomain", "/..."),
    "spiffe://trustdomain/a../b.": ("trustdomain", "/a../b."),
    "spiffe://trustdomain/Path_1-2.3": ("trustdomain", "/Path_1-2.3"),
    "spiffe://trust-domain_1.example/p": ("trust-domain_1.example", "/p"),
    # Names that look like something else are names like any other (SPIFFE-ID section 2.1).
    "spiffe://1.2.3.4/service": ("1.2.3.4", "/service"),
    "spiffe://999.999.999.999/service": ("999.999.999.999", "/service"),
    "spiffe://localhost/service": ("localhost", "/service"),
    "spiffe://.-_/service": (".-_", "/service"),
    "spiffe://spiffe/spiffe": ("spiffe", "/spiffe"),
}

REFUSED = [
    "", "s", "spiffe", "spiffe:", "spiffe:/", "spiffe:trustdomain/path", "spiffe:/trustdomain/path",
    "Spiffe://trustdomain/path", "SPIFFE://trustdomain/path", "sparfe://trustdomain/path",
    "https://trustdomain/path", "://trustdomain/path", "//trustdomain/path", "trustdomain/path",
    "spiffe://", "spiffe:///", "spiffe:///path", "spiffe:////path",
    "spiffe://trustdomain/", "spiffe://trustdomain//", "spiffe://trustdomain//path",
    "spiffe://trustdomain/path/", "spiffe://trustdomain/path//other",
    "spiffe://trustdomain/.", "spiffe://trustdomain/./path", "spiffe://trustdomain/path/./other",
    "spiffe://trustdomain/path/.", "spiffe://trustdomain/..", "spiffe://trustdomain/../path",
    "spiffe://trustdomain/path/../other", "spiffe://trustdomain/path/..",
    "spiffe://trustdomain/%F0%9F%A4%AF", "spiffe://trustdomain/%62%61%64", "spiffe://%62%61%64/path",
    "spiffe://%F0%9F%A4%AF/path", "spiffe://trust$domain/path", "spiffe://trustdomain/path$",
    "spiffe://TrustDomain/path", "spiffe://trustdomain:443/path", "spiffe://trustdomain:/path",
    "spiffe://user@trustdomain/path", "spiffe://user:password@trustdomain/path", "spiffe://@trustdomain/path",
    "spiffe://[::1]/path", "spiffe://trustdomain/path?x=1", "spiffe://trustdomain/path?",
    "spiffe://trustdomain?x=1", "spiffe://trustdomain/path#part", "spiffe://trustdomain#part",
    "spiffe://trustdomain/path\\other", "spiffe://trustdomain\\path", "spiffe://trustdomain/*",
    "spiffe://*/path", "spiffe://trustdomain/path;v=1", "spiffe://trustdomain/path,other",
    "spiffe://trustdomain/path\n", "spiffe://trustdomain\n/path", "spiffe://trustdomain/path\r\nX: y",
    "spiffe://trustdomain/path\0", "spiffe://trustdomain\0.evil/path", "spiffe://trustdomain/pa th",
    " spiffe://trustdomain/path", "spiffe://trustdomain/path ", "\tspiffe://trustdomain/path",
    "\ufeffspiffe://trustdomain/path", "spiffe://trustdomain/path, spiffe://trustdomain/other",
]  # fmt: skip


def refused(parse: Callable[[str], object], text: str) -> InvalidSpiffeId:
    with pytest.raises(InvalidSpiffeId) as caught:
        parse(text)
    assert caught.value.reason is Reason.INVALID_SPIFFE_ID
    return caught.value


def is_id(text: str) -> bool:
    try:
        SpiffeId.parse(text)
    except InvalidSpiffeId:
        return False
    return True


# -- Characters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "allowed"),
    [
        ("spiffe://trustdomain{}/path", TRUST_DOMAIN_CHARACTERS),
        ("spiffe://{}trustdomain/path", TRUST_DOMAIN_CHARACTERS),
        # A slash after the name begins a path, but one that is empty.
        ("spiffe://trustdomain{}", TRUST_DOMAIN_CHARACTERS),
        ("spiffe://trustdomain/path{}", PATH_CHARACTERS),
        ("spiffe://trustdomain/{}path", PATH_CHARACTERS),
        ("spiffe://trustdomain/first{}/last", PATH_CHARACTERS),
        # Between letters a slash is the segment separator.
        ("spiffe://trustdomain/pa{}th", PATH_CHARACTERS | {"/"}),
    ],
)
def test_each_of_256_code_points_and_more(template: str, allowed: set[str]) -> None:
    candidates = [chr(i) for i in range(256)] + BEYOND_LATIN

    accepted = {c for c in candidates if is_id(template.format(c))}

    assert accepted == allowed


def test_each_of_256_code_points_in_a_trust_domain_name() -> None:
    accepted = set()
    for candidate in [chr(i) for i in range(256)] + BEYOND_LATIN:
        try:
            TrustDomain.parse(f"trustdomain{candidate}")
        except InvalidSpiffeId:
            continue
        accepted.add(candidate)

    assert accepted == TRUST_DOMAIN_CHARACTERS


# -- Whole IDs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted_as_it_stands(text: str) -> None:
    name, path = ACCEPTED[text]

    parsed = SpiffeId.parse(text)

    assert (parsed.trust_domain.name, parsed.path) == (name, path)
    assert str(parsed) == text
    assert SpiffeId.parse(str(parsed)) == parsed
    assert parsed.is_root is (path == "")


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_a_readable_reason_on_one_line(text: str) -> None:
    error = refused(SpiffeId.parse, text)

    assert isinstance(error, ValueError)
    assert error.detail
    assert str(error) == f"invalid_spiffe_id: {error.detail}"
    assert str(error).isprintable()
    assert str(error).isascii()


def test_refusal_of_a_huge_text_is_short() -> None:
    for text in ("x" * 1_000_000, "spiffe://a/" + "😀" * 1_000_000, "spiffe://" + "$" * 1_000_000):
        assert len(str(refused(SpiffeId.parse, text))) < 1000


def test_path_is_case_sensitive_and_nothing_is_lowered() -> None:
    upper, lower = SpiffeId.parse("spiffe://td/Orders"), SpiffeId.parse("spiffe://td/orders")

    assert upper != lower
    assert upper.path == "/Orders"


def test_whatever_is_accepted_is_unchanged() -> None:
    # Any text from these pieces is either refused or comes back character for character.
    pieces = [
        "spiffe://",
        "td",
        "Td",
        "/",
        "/",
        "a",
        "B",
        ".",
        "..",
        "%2f",
        ":",
        "@",
        "?",
        "#",
        "é",
        "_",
        "-",
    ]
    choice = random.Random(20260501)
    accepted = 0
    for _ in range(20_000):
        text = "spiffe://" + "".join(choice.choices(pieces[1:], k=choice.randint(0, 7)))
        if choice.random() < 0.1:
            text = "".join(choice.choices(pieces, k=5))
        if is_id(text):
            parsed = SpiffeId.parse(text)
            accepted += 1
            assert str(parsed) == text
            assert parsed.trust_domain.name
            assert SpiffeId(parsed.trust_domain, parsed.path) == parsed
    assert accepted > 500


# -- Lengths ------------------------------------------------------------------------------------------


def test_trust_domain_may_have_255_bytes_and_no_more() -> None:
    assert TrustDomain.parse("t" * 255).name == "t" * 255
    assert SpiffeId.parse("spiffe://" + "t" * 255 + "/a").trust_domain.name == "t" * 255

    assert "255" in refused(TrustDomain.parse, "t" * 256).detail
    assert "255" in refused(SpiffeId.parse, "spiffe://" + "t" * 256 + "/a").detail


def test_id_may_have_2048_bytes_and_no_more() -> None:
    start = "spiffe://trustdomain/"
    longest = start + "p" * (2048 - len(start))

    assert str(SpiffeId.parse(longest)) == longest
    assert "2048" in refused(SpiffeId.parse, longest + "p").detail
    with pytest.raises(InvalidSpiffeId, match="2048"):
        SpiffeId(TrustDomain("trustdomain"), longest[len("spiffe://trustdomain") :] + "p")


# -- Trust domains ------------------------------------------------------------------------------------


def test_trust_domain_is_read_from_its_name_or_its_id() -> None:
    named = TrustDomain.parse("zt.example")

    assert named == TrustDomain.parse("spiffe://zt.example")
    assert str(named) == "zt.example"
    assert str(named.id) == "spiffe://zt.example"
    assert named.id.is_root


def test_id_of_a_workload_does_not_pass_for_its_trust_domain() -> None:
    # Else `trust_domain("spiffe://td/orders")`, meant for one workload, would accept every one.
    error = refused(TrustDomain.parse, "spiffe://zt.example/orders")
    assert "spiffe://zt.example/orders" in error.detail


@pytest.mark.parametrize(
    "text",
    ["", " ", "ZT.example", "zt.example/", "zt.example/a", "zt:1", "u@zt", "zt%2eexample", "zt.example\n",
     "spiffe://", "spiffe:///a", "spiffe://zt.example/", "SPIFFE://zt.example", "https://zt.example"],
)  # fmt: skip
def test_text_that_names_no_trust_domain(text: str) -> None:
    refused(TrustDomain.parse, text)


# -- Built from parts, compared, stored -----------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "foo", "/foo/", "//foo", "/.", "/a/..", "/$", "$", "/a b", "/a\n", "foo/"]
)
def test_parts_are_checked_like_text(path: str) -> None:
    error = refused(lambda path: SpiffeId(TrustDomain("zt.example"), path), path)
    assert error.detail.startswith("path ")


def test_equal_ids_are_interchangeable_and_different_ones_are_not() -> None:
    one, same = SpiffeId.parse("spiffe://zt.example/a"), SpiffeId.parse("spiffe://zt.example/a")
    others = [
        "spiffe://zt.example",
        "spiffe://zt.example/A",
        "spiffe://zt.example/a/b",
        "spiffe://zt.examplea",
    ]

    assert one == same
    assert len({one, same}) == 1
    assert all(one != SpiffeId.parse(other) for other in others)
    assert one != str(one)


def test_ids_sort_by_trust_domain_then_path() -> None:
    texts = ["spiffe://b/a", "spiffe://a/b", "spiffe://a", "spiffe://a/a"]

    assert [str(i) for i in sorted(map(SpiffeId.parse, texts))] == [
        "spiffe://a", "spiffe://a/a", "spiffe://a/b", "spiffe://b/a",
    ]  # fmt: skip


def test_ids_do_not_change() -> None:
    identity = SpiffeId.parse("spiffe://zt.example/a")

    with pytest.raises(dataclasses.FrozenInstanceError):
        identity.path = "/b"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity.trust_domain.name = "evil"  # type: ignore[misc]
    with pytest.raises(InvalidSpiffeId):
        dataclasses.replace(identity, path="b")

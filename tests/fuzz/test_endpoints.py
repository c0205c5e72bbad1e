"""Addresses of the Workload API: a gRPC target that says the same, or a refusal."""

from __future__ import annotations

import socket

from hypothesis import example, given
from hypothesis import strategies as st

from ztmtls.reasons import Reason
from ztmtls.workload_endpoint import InvalidEndpoint, parse_endpoint

PIECES = st.sampled_from(
    [
        "unix:",
        "unix://",
        "unix:///",
        "tcp://",
        "tcp:",
        "UNIX:",
        "/",
        "run/agent.sock",
        "127.0.0.1",
        "[::1]",
        "::1",
        "[::ffff:1.2.3.4]",
        "[fe80::1%eth0]",
        "[::1]x",
        ":",
        ":80",
        ":0",
        ":65536",
        ":00080",
        ":+1",
        "localhost",
        "user@",
        "?a",
        "#a",
        "?",
        "#",
        "%2f",
        "%00",
        " ",
        "\n",
        "\x00",
        "..",
        "é",
        "a" * 108,
    ]
)
ADDRESSES = st.one_of(
    st.lists(PIECES, max_size=6).map("".join),
    st.builds(lambda host, port: f"tcp://{host}:{port}", st.ip_addresses(v=4), st.integers(0, 70000)),
    st.builds(lambda host, port: f"tcp://[{host}]:{port}", st.ip_addresses(v=6), st.integers(0, 70000)),
    st.text(st.characters(codec="ascii"), max_size=120).map(lambda path: "unix:/" + path),
    st.text(),
)


@given(ADDRESSES)
@example("tcp://127.0.0.1:8081")
@example("tcp://[::1]:8081")
@example("unix:///run/agent.sock")
@example("unix:////run/agent.sock")
@example("tcp://[fe80::1%eth0]:8081")
def test_an_accepted_address_means_what_its_target_says(address: str) -> None:
    try:
        target = parse_endpoint(address)
    except InvalidEndpoint as refusal:
        assert refusal.reason is Reason.INVALID_ENDPOINT
        assert refusal.detail.isprintable()
        return

    assert address.isascii()
    assert address.isprintable()
    scheme, rest = address.split(":", 1)
    if scheme.lower() == "unix":
        path = rest.removeprefix("//")
        assert target == f"unix:{path}"
        assert path.startswith("/")
        assert not path.startswith("//"), "gRPC would read an authority"
        assert 1 < len(path.encode()) <= 107
        assert not set(path) & set("?#\0 ")
    else:
        assert scheme.lower() == "tcp"
        host, port = rest.removeprefix("//").rsplit(":", 1)
        assert port.isdecimal()
        assert 1 <= int(port) <= 65535
        kind, _, where = target.partition(":")
        same, target_port = where.rsplit(":", 1)
        assert int(target_port) == int(port)
        family = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}[kind]
        assert socket.inet_pton(family, same.strip("[]")) == socket.inet_pton(family, host.strip("[]"))

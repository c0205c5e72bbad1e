"""Ports: fixed by default, chosen on request, and explained when one is taken."""

from __future__ import annotations

import os
import socket

import pytest

from ztdev.errors import PortInUse, StackError
from ztdev.ports import Ports, choose_free_ports, refuse_taken_ports, resolve_ports


def test_defaults_are_all_different() -> None:
    ports = resolve_ports({}, free=False)
    assert ports == Ports()
    assert ports.page == 8080
    assert len(set(ports.as_dict().values())) == len(Ports.names())


def test_free_ports_are_free_different_and_outside_the_range_of_outgoing_connections() -> None:
    ports = resolve_ports({}, free=True)
    numbers = list(ports.as_dict().values())
    assert len(set(numbers)) == len(numbers)
    assert all(15000 <= number < 60999 for number in numbers)
    refuse_taken_ports(ports)


def test_a_chosen_port_is_kept_beside_free_ones() -> None:
    [port] = choose_free_ports(1)
    ports = resolve_ports({"page": port}, free=True)
    assert ports.page == port
    assert list(ports.as_dict().values()).count(port) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"pages": 1}, "No port is called 'pages'"),
        ({"page": 0}, "number from 1 to 65535"),
        ({"page": 65536}, "number from 1 to 65535"),
        ({"page": 18441}, "both 18441"),
    ],
)
def test_impossible_choices_are_explained(chosen: dict[str, int], message: str) -> None:
    with pytest.raises(StackError, match=message):
        resolve_ports(chosen, free=False)


def test_taken_port_names_its_purpose_owner_and_setting() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        with pytest.raises(PortInUse) as raised:
            refuse_taken_ports(resolve_ports({"page": taken}, free=True))
    text = str(raised.value)
    assert f"Port {taken} for the page for people is in use by" in text
    assert f"(pid {os.getpid()})" in text
    assert "--port N" in text
    assert "--free-ports" in text

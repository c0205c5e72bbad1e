"""The roles in a database that somebody else runs, made by its administrator with the secrets' passwords."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from ztdev.containers.databases import RotationBegan, make_roles
from ztdev.ports import choose_free_ports
from ztdev.postgres import PostgresServer, make_server_tls

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORDS = {name: secrets.token_urlsafe(12) for name in ("administrator", "app", "owner", "rotator")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PostgresServer]:
    """As RDS hands it over: an administrator who is no superuser, and an empty database of his."""
    server = PostgresServer(tmp_path_factory.mktemp("postgres") / "db", choose_free_ports(1)[0])
    async with server:
        async with server.administrator() as connection:
            await connection.execute("CREATE ROLE zt_administrator LOGIN CREATEROLE CREATEDB")
            # This server lets a login into a database only as a member of the role of that name.
            await connection.execute("SET SESSION AUTHORIZATION zt_administrator")
            await connection.execute("CREATE ROLE orders")
            await connection.execute("CREATE DATABASE orders")
        await server.set_password("zt_administrator", PASSWORDS["administrator"])
        yield server


def stored(server: PostgresServer, **changes: str) -> dict[str, Mapping[str, Any]]:
    """The secrets, as workload.yaml and RDS make them."""

    def login(user: str, kind: str) -> dict[str, Any]:
        where = {"host": server.host, "port": server.port, "dbname": "orders"}
        return {**where, "username": user, "password": PASSWORDS[kind]}

    return {
        "zt-demo/orders/db": {**login("orders_app", "app"), **changes},
        "zt-demo/orders/db-owner": login("orders_owner", "owner"),
        "zt-demo/orders/db-rotator": login("orders_rotator", "rotator"),
        "rds!db": {"username": "zt_administrator", "password": PASSWORDS["administrator"]},
    }


def logs_in(server: PostgresServer, user: str, kind: str) -> bool:
    try:
        psycopg.connect(
            host=server.host,
            port=server.port,
            dbname="orders",
            user=user,
            password=PASSWORDS[kind],
            sslmode="verify-full",
            sslrootcert=str(server.ca_file),
        ).close()
    except psycopg.OperationalError:
        return False
    return True


async def test_every_login_of_the_secrets_works_afterwards_and_may_be_made_again(
    server: PostgresServer,
) -> None:
    for _ in range(2):
        await make_roles("orders", "rds!db", stored(server).__getitem__, server.ca_file)
        for user, kind in (("orders_app", "app"), ("orders_owner", "owner"), ("orders_rotator", "rotator")):
            assert logs_in(server, user, kind), user
        assert not logs_in(server, "orders_app_clone", "app")


async def test_once_a_rotation_has_begun_nothing_is_touched(server: PostgresServer) -> None:
    await make_roles("orders", "rds!db", stored(server).__getitem__, server.ca_file)
    secrets_now = stored(server, username="orders_app_clone", password="another")
    with pytest.raises(RotationBegan, match="rotation_began"):
        await make_roles("orders", "rds!db", secrets_now.__getitem__, server.ca_file)
    assert logs_in(server, "orders_app", "app")


async def test_a_server_that_does_not_prove_its_name_gets_no_password(
    server: PostgresServer, tmp_path: Path
) -> None:
    stranger = tmp_path / "ca.pem"
    stranger.write_bytes(make_server_tls(("127.0.0.1",)).authorities)
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        await make_roles("orders", "rds!db", stored(server).__getitem__, stranger)

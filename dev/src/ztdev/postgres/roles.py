"""Who may do what in the database: the same roles on one machine as on RDS.

For a service X there is a database X and

    X             no login   who may connect to database X at all (pg_hba.conf names it: `samerole`)
    X_owner       login      owns what is in schema public; runs the migrations
    X_rw          no login   reads and writes rows, through default privileges on what X_owner creates
    X_app         login      the service: member of X_rw, cannot create, alter or drop anything
    X_app_clone   login      its twin, for rotation by alternating users; without a password until then
    X_rotator     login      (only when asked for) may call rotation.set_password, and nothing else
    X_passwords   no login   (with it) owns that function; may alter the two app roles

Rights go to the group and never to a login, so that both twins have the same ones (a table made in one
phase of the rotation is usable in the other). PUBLIC has no right anywhere.

The administrator who makes all this is a superuser on one machine, and on RDS a login with CREATEROLE and
CREATEDB, which has ADMIN OPTION on the roles that it has made and is a member of none: it becomes one for as
long as it gives something to a role (`_member_of`).

To set another role's password, PostgreSQL asks for CREATEROLE and for ADMIN OPTION on that role. A login
that has both could also make roles, drop the twins, or grant them to itself. So no login has them: they
belong to X_passwords, whose function does the one thing that a rotation needs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")

#: What the services do with rows. No TRUNCATE, REFERENCES or TRIGGER.
_ROW_RIGHTS = sql.SQL("SELECT, INSERT, UPDATE, DELETE")

_LOGIN = "LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
_GROUP = "NOLOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
_ALTERS = "NOLOGIN INHERIT NOSUPERUSER NOCREATEDB CREATEROLE NOREPLICATION NOBYPASSRLS"

#: What of a role is in the catalogue, in the words of CREATE ROLE.
_OPTIONS = """
SELECT concat_ws(' ',
    CASE WHEN rolcanlogin THEN 'LOGIN' ELSE 'NOLOGIN' END,
    CASE WHEN rolinherit THEN 'INHERIT' ELSE 'NOINHERIT' END,
    CASE WHEN rolsuper THEN 'SUPERUSER' ELSE 'NOSUPERUSER' END,
    CASE WHEN rolcreatedb THEN 'CREATEDB' ELSE 'NOCREATEDB' END,
    CASE WHEN rolcreaterole THEN 'CREATEROLE' ELSE 'NOCREATEROLE' END,
    CASE WHEN rolreplication THEN 'REPLICATION' ELSE 'NOREPLICATION' END,
    CASE WHEN rolbypassrls THEN 'BYPASSRLS' ELSE 'NOBYPASSRLS' END)
FROM pg_roles WHERE rolname = %s
"""

_MEMBER = sql.SQL("WITH ADMIN FALSE, INHERIT TRUE, SET FALSE")
_ADMIN_ONLY = sql.SQL("WITH ADMIN TRUE, INHERIT FALSE, SET FALSE")

Connection = psycopg.AsyncConnection[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class ServiceRoles:
    """Names of a service's database and roles."""

    service: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.service) or self.service in ("postgres", "public"):
            raise ValueError(
                f"{self.service!r} cannot name a database: use a-z, 0-9 and _, beginning with a letter"
            )

    @property
    def database(self) -> str:
        return self.service

    @property
    def connect(self) -> str:
        return self.service

    @property
    def owner(self) -> str:
        return f"{self.service}_owner"

    @property
    def rw(self) -> str:
        return f"{self.service}_rw"

    @property
    def app(self) -> str:
        return f"{self.service}_app"

    @property
    def app_clone(self) -> str:
        return f"{self.service}_app_clone"

    @property
    def rotator(self) -> str:
        return f"{self.service}_rotator"

    @property
    def passwords(self) -> str:
        return f"{self.service}_passwords"


async def ensure_service(
    connect: Callable[[str], AbstractAsyncContextManager[Connection]],
    name: str,
    *,
    app_password: str | None = None,
    owner_password: str | None = None,
    rotator_password: str | None = None,
) -> ServiceRoles:
    """Make the database `name` and its roles, or bring them back to what they should be. `connect` logs the
    administrator into a database, in autocommit mode.

    Passwords that are None stay as they are; a role that never got one cannot log in. When the app gets one,
    its twin loses what a rotation may have given it. The rotator, and the function that it may call, are made
    only when its password is given.
    """
    service = ServiceRoles(name)
    async with connect("postgres") as connection:
        await ensure_roles_and_database(connection, service, rotator=rotator_password is not None)
    async with connect(service.database) as connection:
        await ensure_schema_rights(connection, service)
        if rotator_password is not None:
            await ensure_rotation_right(connection, service)
        for role, password in (
            (service.app, app_password),
            (service.owner, owner_password),
            (service.rotator, rotator_password),
        ):
            if password is not None:
                await set_password(connection, role, password)
        if app_password is not None:
            await withdraw_password(connection, service.app_clone)
    return service


async def ensure_roles_and_database(connection: Connection, roles: ServiceRoles, *, rotator: bool) -> None:
    """Bring roles, memberships and the database to the state above. `connection` is the administrator's, to
    any database, in autocommit mode (CREATE DATABASE cannot run in a transaction)."""
    wanted = {
        roles.connect: _GROUP,
        roles.rw: _GROUP,
        roles.owner: _LOGIN,
        roles.app: _LOGIN,
        roles.app_clone: _LOGIN,
    }
    if rotator:
        wanted |= {roles.rotator: _LOGIN, roles.passwords: _ALTERS}
    for role, options in wanted.items():
        found = await (await connection.execute(_OPTIONS, [role])).fetchone()
        if found != (options,):  # only a superuser may even repeat that somebody is none
            verb, to_be = ("ALTER" if found else "CREATE"), sql.SQL(options)
            await connection.execute(
                sql.SQL("{} ROLE {} WITH {}").format(sql.SQL(verb), sql.Identifier(role), to_be)
            )
    for login in (roles.owner, roles.app, roles.app_clone, *((roles.rotator,) if rotator else ())):
        await _leave_other_groups(connection, login, roles)
        await _grant(connection, roles.connect, login, _MEMBER)
    for twin in (roles.app, roles.app_clone):
        await _grant(connection, roles.rw, twin, _MEMBER)
        if rotator:
            await _grant(connection, twin, roles.passwords, _ADMIN_ONLY)

    database = sql.Identifier(roles.database)
    if not await _exists(connection, "pg_database", "datname", roles.database):
        await connection.execute(sql.SQL("CREATE DATABASE {}").format(database))
    await connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
    await connection.execute(
        sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, sql.Identifier(roles.connect))
    )


async def ensure_schema_rights(connection: Connection, roles: ServiceRoles) -> None:
    """Rights inside the database: `connection` is the administrator's, to `roles.database`."""
    owner, rw = sql.Identifier(roles.owner), sql.Identifier(roles.rw)
    async with _member_of(connection, roles.owner):
        for statement in (
            sql.SQL("ALTER SCHEMA public OWNER TO {owner}"),
            sql.SQL("REVOKE ALL ON SCHEMA public FROM PUBLIC"),
            sql.SQL("GRANT USAGE ON SCHEMA public TO {rw}"),
            sql.SQL(
                "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT {rows} ON TABLES TO {rw}"
            ),
            sql.SQL(
                "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT USAGE, SELECT ON "
                "SEQUENCES TO {rw}"
            ),
            sql.SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
        ):
            await connection.execute(statement.format(owner=owner, rw=rw, rows=_ROW_RIGHTS))


#: What a SCRAM verifier looks like: neither a password in the clear nor none can be set.
_VERIFIER = r"^SCRAM-SHA-256\$[0-9]{4,7}:[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$"

#: Raised anew on failure, since PostgreSQL would log the text of the statement with the error.
_SET_PASSWORD = """
CREATE OR REPLACE FUNCTION rotation.set_password(login pg_catalog.text, verifier pg_catalog.text)
RETURNS pg_catalog.void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF (login IN ({app}, {app_clone})) IS NOT TRUE THEN
        RAISE insufficient_privilege USING MESSAGE = 'this login is not rotated';
    END IF;
    IF (verifier ~ {verifier}) IS NOT TRUE THEN
        RAISE invalid_parameter_value USING MESSAGE = 'not a SCRAM-SHA-256 verifier';
    END IF;
    -- One at a time: two that alter a role at once make one of them fail.
    PERFORM pg_advisory_xact_lock(hashtextextended('rotation.set_password', 0));
    EXECUTE format('ALTER ROLE %I WITH PASSWORD %L', login, verifier);
EXCEPTION WHEN OTHERS THEN
    RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM;
END $body$
"""  # noqa: S105 - a statement


async def ensure_rotation_right(connection: Connection, roles: ServiceRoles) -> None:
    """The function that sets a password, and the rotator's right to call it: `connection` is the
    administrator's, to `roles.database`."""
    create = sql.SQL(_SET_PASSWORD).format(
        app=sql.Literal(roles.app), app_clone=sql.Literal(roles.app_clone), verifier=sql.Literal(_VERIFIER)
    )
    names = {"passwords": sql.Identifier(roles.passwords), "rotator": sql.Identifier(roles.rotator)}
    async with _member_of(connection, roles.passwords):
        await connection.execute("CREATE SCHEMA IF NOT EXISTS rotation")
        await connection.execute(create)
        for statement in (
            # An owner must be able to create what he is to own.
            sql.SQL("GRANT USAGE, CREATE ON SCHEMA rotation TO {passwords}"),
            sql.SQL("ALTER FUNCTION rotation.set_password OWNER TO {passwords}"),
            sql.SQL("REVOKE ALL ON SCHEMA rotation FROM {passwords}"),
            sql.SQL("REVOKE ALL ON FUNCTION rotation.set_password FROM PUBLIC"),
            sql.SQL("GRANT USAGE ON SCHEMA rotation TO {rotator}"),
            sql.SQL("GRANT EXECUTE ON FUNCTION rotation.set_password TO {rotator}"),
        ):
            await connection.execute(statement.format(**names))


@asynccontextmanager
async def _member_of(connection: Connection, role: str) -> AsyncIterator[None]:
    """A transaction in which the administrator may do what `role` may; a superuser may anyway."""
    async with connection.transaction():
        superuser = connection.info.parameter_status("is_superuser") == "on"
        if not superuser:
            await connection.execute(
                sql.SQL("GRANT {} TO CURRENT_USER WITH INHERIT TRUE, SET TRUE").format(sql.Identifier(role))
            )
        yield
        if not superuser:
            await connection.execute(
                sql.SQL("REVOKE {} FROM CURRENT_USER GRANTED BY CURRENT_USER").format(sql.Identifier(role))
            )


async def close_shared_databases(connection: Connection) -> None:
    """Nobody but the administrator has business in the databases that initdb made, as far as they are his:
    template1 is RDS's own there."""
    mine = await connection.execute(
        "SELECT datname FROM pg_database JOIN pg_roles ON rolname = CURRENT_USER "
        "WHERE datname IN ('postgres', 'template1') AND (rolsuper OR datdba = pg_roles.oid)"
    )
    for (database,) in await mine.fetchall():
        await connection.execute(
            sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(str(database)))
        )


async def set_password(connection: Connection, role: str, password: str) -> None:
    """Set a password without sending it: the server gets the SCRAM verifier (RFC 5803), computed here, so
    that neither its log nor its memory of statements can hold the password."""
    if not password:
        raise ValueError(f"the password of {role} is empty")
    verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
    await connection.execute(
        sql.SQL("ALTER ROLE {} WITH PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier.decode()))
    )


async def withdraw_password(connection: Connection, role: str) -> None:
    """Let nobody log in as this role until it gets a password again."""
    await connection.execute(sql.SQL("ALTER ROLE {} WITH PASSWORD NULL").format(sql.Identifier(role)))


async def _exists(connection: Connection, catalog: str, column: str, name: str) -> bool:
    query = sql.SQL("SELECT 1 FROM {} WHERE {} = %s").format(sql.Identifier(catalog), sql.Identifier(column))
    return await (await connection.execute(query, [name])).fetchone() is not None


async def _leave_other_groups(connection: Connection, login: str, roles: ServiceRoles) -> None:
    """Take `login` out of every group but its own service's, should somebody have put it there."""
    query = (
        "SELECT roleid::regrole::text FROM pg_auth_members WHERE member = %s::regrole "
        "AND NOT roleid::regrole::text = ANY(%s)"
    )
    found = await connection.execute(query, [login, [roles.connect, roles.rw]])
    for (group,) in await found.fetchall():
        await connection.execute(
            sql.SQL("REVOKE {} FROM {}").format(sql.Identifier(str(group)), sql.Identifier(login))
        )


async def _grant(connection: Connection, group: str, member: str, options: sql.SQL) -> None:
    await connection.execute(
        sql.SQL("GRANT {} TO {} {}").format(sql.Identifier(group), sql.Identifier(member), options)
    )

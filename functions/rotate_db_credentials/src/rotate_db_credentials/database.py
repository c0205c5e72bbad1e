"""What is done in PostgreSQL: log in, set one password, compare two logins.

Passwords go to libpq as keyword arguments, never in a URL, and to the server only as SCRAM verifiers
(RFC 5803) and SCRAM proofs (RFC 5802): neither its log nor its statistics can hold one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from .failure import Reason, RotationFailed
from .secret import DatabaseSecret

#: Seconds to reach the server, for each of its addresses.
CONNECT_TIMEOUT = 5

#: Milliseconds that a statement, and waiting for a lock, may take.
_LIMITS = "-c statement_timeout=10000 -c lock_timeout=5000"

Connection = psycopg.Connection[tuple[Any, ...]]

#: The server's words before a session exists, when libpq gives no SQLSTATE.
_LOGIN_REFUSED = (
    "password authentication failed",
    "is not permitted to log in",
    "no pg_hba.conf entry",
    "permission denied for database",
)


@contextmanager
def session(secret: DatabaseSecret, ca_file: Path) -> Iterator[Connection]:
    """Log in over TLS 1.3 with a server that proves its name. Everything is committed at once.

    Raises:
        RotationFailed: ``ca_file_missing``, ``login_refused``, ``database_unavailable``; for statements
            inside of the ``with`` block ``statement_refused``.
    """
    if not ca_file.is_file():
        raise RotationFailed(Reason.CA_FILE_MISSING, f"{ca_file} does not exist")
    connection, failure = _connect(secret, ca_file)
    if connection is None:
        raise failure
    try:
        with connection:
            yield connection
    except psycopg.Error as error:
        state = error.sqlstate or "no SQLSTATE"
        raise RotationFailed(Reason.STATEMENT_REFUSED, f"{secret.dbname} at {secret.host}: {state}") from None


def _connect(secret: DatabaseSecret, ca_file: Path) -> tuple[Connection | None, RotationFailed]:
    try:
        connection = psycopg.connect(
            host=secret.host,
            port=secret.port,
            dbname=secret.dbname,
            user=secret.username,
            password=secret.password,
            sslmode="verify-full",
            sslrootcert=str(ca_file),
            ssl_min_protocol_version="TLSv1.3",
            sslcertmode="disable",
            gssencmode="disable",
            require_auth="scram-sha-256",
            channel_binding="require",
            application_name="rotate-db-credentials",
            options=_LIMITS,
            connect_timeout=CONNECT_TIMEOUT,
            autocommit=True,
        )
    except psycopg.Error as error:
        message = " ".join(str(error).split())
    else:
        return connection, RotationFailed(Reason.DATABASE_UNAVAILABLE, "")
    where = f"{secret.username} at {secret.host}:{secret.port}/{secret.dbname}"
    if any(words in message for words in _LOGIN_REFUSED):
        return None, RotationFailed(Reason.LOGIN_REFUSED, where)
    # libpq does not quote passwords. Should it ever: not here.
    shown = message.replace(secret.password, "***")[:300]
    return None, RotationFailed(Reason.DATABASE_UNAVAILABLE, f"{where}: {shown}")


def set_password(connection: Connection, secret: DatabaseSecret) -> None:
    """Give the login of `secret` its password, by the one function that the rotation login may call."""
    verifier = connection.pgconn.encrypt_password(
        secret.password.encode(), secret.username.encode(), b"scram-sha-256"
    )
    connection.execute("SELECT rotation.set_password(%s, %s)", [secret.username, verifier.decode()])


def roles_lacking(connection: Connection, user: str, beside: str) -> list[str]:
    """Roles whose rights `beside` inherits and `user` does not. Both are logins of this server."""
    rows = connection.execute(
        "SELECT roleid::regrole::text FROM pg_auth_members"
        " WHERE member = to_regrole(%s) AND inherit_option"
        " EXCEPT SELECT roleid::regrole::text FROM pg_auth_members"
        " WHERE member = to_regrole(%s) AND inherit_option ORDER BY 1",
        [beside, user],
    ).fetchall()
    return [str(row[0]) for row in rows]

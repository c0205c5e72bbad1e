"""What the administrator does in a running server: databases, roles, passwords."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg

from . import config, roles, run_as


class Administration:
    """The administrator's connections to a server, over the private socket in `socket_directory`.

    Who may use that socket may be the administrator; where the server asks for a password all the same, it is
    in `password_file`.
    """

    def __init__(self, socket_directory: Path, port: int, password_file: Path | None = None) -> None:
        self.socket_directory = socket_directory
        self.port = port
        self._password_file = password_file
        self._roles_lock = asyncio.Lock()

    @asynccontextmanager
    async def administrator(self, database: str = "postgres") -> AsyncIterator[roles.Connection]:
        """A connection as the administrator, in autocommit mode."""
        with contextlib.ExitStack() as held:
            host = str(self.socket_directory)
            if len(os.fsencode(host)) > run_as.LONG_PATH:
                descriptor = os.open(host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, descriptor)
                host = f"/proc/self/fd/{descriptor}"
            connection = await psycopg.AsyncConnection.connect(
                host=host,
                port=self.port,
                user=config.ADMINISTRATOR,
                password=self._password_file.read_text().strip() if self._password_file else None,
                dbname=database,
                connect_timeout=10,
                gssencmode="disable",
                application_name="ztdev",
                autocommit=True,
            )
            try:
                yield connection
            finally:
                await connection.close()

    async def close_shared_databases(self) -> None:
        """Nobody but the administrator has business in the databases that initdb made."""
        async with self.administrator() as connection:
            await roles.close_shared_databases(connection)

    async def ensure_service(
        self,
        name: str,
        *,
        app_password: str | None = None,
        owner_password: str | None = None,
        rotator_password: str | None = None,
    ) -> roles.ServiceRoles:
        """See `roles.ensure_service`; one at a time."""
        async with self._roles_lock:
            return await roles.ensure_service(
                self.administrator,
                name,
                app_password=app_password,
                owner_password=owner_password,
                rotator_password=rotator_password,
            )

    async def set_password(self, role: str, password: str) -> None:
        """Set one login's password. Open sessions go on; the next login needs the new one."""
        async with self.administrator() as connection:
            await roles.set_password(connection, role, password)

    async def end_sessions(self, role: str) -> int:
        """End all sessions of a login, and say how many there were."""
        async with self.administrator() as connection:
            query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
            return len(await (await connection.execute(query, [role])).fetchall())

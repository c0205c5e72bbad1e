"""PostgreSQL's configuration files, written anew at each start."""

from __future__ import annotations

from collections.abc import Mapping

ADMINISTRATOR = "postgres"

CERTIFICATE = "server.crt"
KEY = "server.key"


def postgresql_conf(port: int, name: str) -> str:
    """The whole `postgresql.conf`. The socket's directory is on the command line, as only there it is
    known."""
    settings: Mapping[str, str | int] = {
        # Reached from this machine only, by TLS 1.3 only (pg_hba.conf has no line without it).
        "listen_addresses": "127.0.0.1",
        "port": port,
        "max_connections": 60,
        "unix_socket_permissions": "0700",
        "authentication_timeout": "10s",
        "password_encryption": "scram-sha-256",
        "ssl": "on",
        "ssl_cert_file": CERTIFICATE,
        "ssl_key_file": KEY,
        "ssl_min_protocol_version": "TLSv1.3",
        # An order that was confirmed is there after a power cut.
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        # A small server: no standby, no replication, no parallel workers, little disk.
        "shared_buffers": "32MB",
        "huge_pages": "off",
        "io_method": "sync",
        "wal_level": "minimal",
        "max_wal_senders": 0,
        "min_wal_size": "32MB",
        "max_wal_size": "128MB",
        "max_worker_processes": 2,
        "max_parallel_workers_per_gather": 0,
        "max_logical_replication_workers": 0,
        "jit": "off",
        # The log says who came and went. It never holds a statement: one that fails may carry a password.
        "cluster_name": name,
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] %q%u@%d %a ",
        "log_connections": "authorization",
        "log_disconnections": "on",
        "log_checkpoints": "off",
        "log_statement": "none",
        "log_min_error_statement": "panic",
        "log_parameter_max_length": 0,
        "log_parameter_max_length_on_error": 0,
        # Message texts that ztmtls.database can tell apart, times that one can compare.
        "lc_messages": "C",
        "log_timezone": "UTC",
        "timezone": "UTC",
    }
    lines = ["# Written by ztdev at each start: changes made here are lost."]
    lines += [f"{key} = {_quote(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def pg_hba_conf() -> str:
    """Who may log in, and how. What no line names is refused.

    `samerole`: a login must be a member of the role that is named like the database (see `roles`), so
    nobody gets as far as a password prompt for another service's database. There is no `host` line: without
    TLS nobody enters.
    """
    return (
        "# Written by ztdev at each start: changes made here are lost.\n"
        f"local    all       {ADMINISTRATOR}                peer map=administrator\n"
        f"host     all       {ADMINISTRATOR}  all           reject\n"
        "hostssl  samerole  all       127.0.0.1/32  scram-sha-256\n"
    )


def pg_ident_conf(operating_system_user: str) -> str:
    """The one operating system user that may be the administrator (`peer` authentication)."""
    return (
        "# Written by ztdev at each start: changes made here are lost.\n"
        f'administrator  "{operating_system_user}"  {ADMINISTRATOR}\n'
    )


def _quote(value: str | int) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"

"""``python -m orders``: serve, or bring the database's schema up to date."""

from __future__ import annotations

import argparse

from ztmtls import server
from ztmtls.settings import MigrationSettings, load
from ztmtls.tracing import exported

from . import SERVICE
from .service import migrate, serve
from .settings import Settings


def main() -> None:
    """Run the command named on the command line."""
    parser = argparse.ArgumentParser(
        prog="orders",
        description="Orders, each paid for exactly once. Settings come from the environment.",
    )
    parser.add_argument(
        "command", nargs="?", choices=["serve", "migrate"], default="serve", help="default: serve"
    )
    if parser.parse_args().command == "migrate":
        migration = load(MigrationSettings)
        server.run(lambda: migrate(migration))
    else:
        settings = load(Settings)
        with exported(SERVICE, settings.otel_exporter_otlp_endpoint) as tracer:
            server.run(lambda: serve(settings, tracer), loop=settings.loop)


if __name__ == "__main__":
    main()

"""What the examples share, and what has nothing to do with mutual TLS: options, and calling again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from ztmtls import Refusal

HOST = "127.0.0.1"


def options(about: str | None, roles: Sequence[str], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of an example with these roles: ``server``, ``client`` or both."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="SPIFFE_ENDPOINT_SOCKET is the address of the Workload API: SPIRE's, or that of\n"
        "`python -m ztmtls.testing server client`.",
    )
    if len(roles) > 1:
        parser.add_argument("role", choices=roles)
    parser.add_argument("--port", type=int, default=8443, help=f"port on {HOST} (default: 8443)")
    if "server" in roles:
        parser.add_argument(
            "--allow",
            metavar="ID",
            default="spiffe://example.org/client",
            help="server: the SPIFFE ID that may call (default: %(default)s)",
        )
    if "client" in roles:
        parser.add_argument(
            "--peer",
            metavar="ID",
            default="spiffe://example.org/server",
            help="client: the SPIFFE ID that the server must prove (default: %(default)s)",
        )
        parser.add_argument(
            "--every", type=float, metavar="SECONDS", help="client: call again and again, to see rotations"
        )
    return parser.parse_args(argv)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ctrl-C ends the program, and so does what can't be done: with one line."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except (Refusal, OSError) as error:
        raise SystemExit(f"failed: {error}") from error


def call_again(every: float | None, call: Callable[[], str]) -> None:
    """Print what `call` returns, once or every so many seconds. A failure ends a single call only."""
    while True:
        try:
            print(call(), flush=True)
        except (Refusal, OSError) as error:
            if every is None:
                raise
            print(f"failed: {error}", file=sys.stderr, flush=True)
        if every is None:
            return
        time.sleep(every)


async def call_again_async(every: float | None, call: Callable[[], Awaitable[str]]) -> None:
    """The same for a program with an event loop."""
    while True:
        try:
            print(await call(), flush=True)
        except (Refusal, OSError) as error:
            if every is None:
                raise
            print(f"failed: {error}", file=sys.stderr, flush=True)
        if every is None:
            return
        await asyncio.sleep(every)

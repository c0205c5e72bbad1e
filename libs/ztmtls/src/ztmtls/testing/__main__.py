"""A Workload API for development, in one command: real SVIDs on a machine without SPIRE.

    python -m ztmtls.testing server client

prints one ``SPIFFE_ENDPOINT_SOCKET`` for each name, and serves them until Ctrl-C. The SPIFFE ID of ``server``
is ``spiffe://example.org/server``. Every process of your own user gets these identities, and no other
user's. SVIDs are renewed at half of their life and authorities follow: ``--svid-ttl 4`` makes for a rotation
every two seconds. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from ztmtls.ids import TrustDomain
from ztmtls.reasons import Refusal

from .ca import CertificateAuthority
from .rotation import RotationEvent
from .workload_api import WorkloadApi

# `Rotation` demands six: an authority must outlive the SVIDs it signs while its successor takes over.
_AUTHORITY_LIVES = 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ztmtls.testing",
        description=(__doc__ or "").split("\n\n", 1)[0],
        epilog="Every process of your user gets these identities: protect nothing of value with them.",
    )
    parser.add_argument("names", nargs="*", default=["server", "client"], metavar="NAME", help="workloads")
    parser.add_argument("--trust-domain", default="example.org", metavar="DOMAIN")
    parser.add_argument(
        "--svid-ttl", type=_seconds, default=60.0, metavar="SECONDS", help="life of an SVID (default: 60)"
    )
    parser.add_argument(
        "--directory", type=Path, help="where the sockets are (default: a new one; mode 700, made if missing)"
    )
    return parser.parse_args()


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError("from 1 to 86400 seconds")
    return value


async def _serve(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    domain = TrustDomain.parse(arguments.trust_domain)
    ttl = arguments.svid_ttl
    ca = CertificateAuthority(domain, ttl=_AUTHORITY_LIVES * ttl, svid_ttl=ttl)
    async with WorkloadApi(arguments.directory) as api:
        for name in arguments.names:
            workload = await api.add_workload(name, f"{domain.id}/{name}", ca=ca)
            workload.allow(uid=os.getuid())
            print(f"# {workload.spiffe_id}\nexport SPIFFE_ENDPOINT_SOCKET={workload.endpoint}", flush=True)
        api.keep_rotating(ca, svid_ttl=ttl, ca_ttl=_AUTHORITY_LIVES * ttl, on_event=_tell)
        await stop.wait()


def _tell(event: RotationEvent) -> None:
    print(f"# {event.at:%H:%M:%S} {event.step} {event.spiffe_id} serial {event.serial}", flush=True)


def main() -> None:
    """Run the command. Ends with status 1 and one line for what can't be done."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = _arguments()
    try:
        asyncio.run(_serve(arguments))
    except (Refusal, ValueError, OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

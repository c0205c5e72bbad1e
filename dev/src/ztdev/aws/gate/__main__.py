"""Start the stand-in: `python -m gate < config.json`.

The configuration is one line of JSON on standard input, since it holds the administrator's key: neither the
command line nor the environment shows it. Standard input stays open: when it closes, whoever started us is
gone, and so are we. In a container, `--config FILE` reads it from a mounted secret instead.

One line on standard output says that it serves; everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import EX_CONFIG, EX_PORT_IN_USE, EX_UNAVAILABLE, emulator
from .front import Application, FrontDoor
from .tokens import IssuerKeys

READY = "gate: serving"


def main() -> int:
    parser = argparse.ArgumentParser(prog="gate", description=__doc__)
    parser.add_argument("--config", type=Path, help="read the configuration from this file")
    arguments = parser.parse_args()
    # Standard output is for the line that says we serve; the emulator's prints must not look like it.
    announce = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        text = arguments.config.read_text() if arguments.config else sys.stdin.readline()
        config = json.loads(text)
        return asyncio.run(_serve(config, arguments.config is None, announce.write))
    except (KeyError, ValueError, TypeError) as error:
        # The text of a configuration error could quote the configuration.
        print(f"gate: the configuration is not usable: {type(error).__name__}", file=sys.stderr)
        return EX_CONFIG
    except (emulator.EmulatorError, OSError) as error:
        print(f"gate: cannot start: {error}", file=sys.stderr)
        return EX_PORT_IN_USE if getattr(error, "errno", None) == errno.EADDRINUSE else EX_UNAVAILABLE


async def _serve(config: dict[str, Any], lifeline: bool, announce: Callable[[str], object]) -> int:
    with tempfile.TemporaryDirectory(prefix="gate-", dir=config.get("scratch")) as scratch:
        return await _serve_in(Path(scratch), config, lifeline, announce)


async def _serve_in(
    scratch: Path, config: dict[str, Any], lifeline: bool, announce: Callable[[str], object]
) -> int:
    host, port = str(config["host"]), int(config["port"])
    listener = _listen(host, port)
    admin = config["admin"]
    account = emulator.Account(
        id=config["account_id"],
        region=config["region"],
        admin_key_id=admin["access_key_id"],
        admin_secret=admin["secret_access_key"],
    )
    keys = IssuerKeys(config["issuer"]["ca_file"], config["issuer"]["resolve"])
    packages = {str(name): Path(file) for name, file in config["packages"].items()}
    application = FrontDoor(emulator.load(account, keys, packages, scratch, port), config["hosts"])
    await _check_itself(application, config["hosts"][0], account)

    # hypercorn comes with ministack; the environment that checks this tree has neither.
    server = importlib.import_module("hypercorn.config").Config()
    server.bind = [f"fd://{listener.fileno()}"]
    server.loglevel = "WARNING"
    server.errorlog = "-"
    server.accesslog = None
    server.keep_alive_timeout = 75
    server.graceful_timeout = 1.0
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline:
        _watch_lifeline(loop, stop)
    announce(f"{READY} on {host}:{port}\n")
    # The listener is ours, and was listening before the line above: no request is lost.
    await importlib.import_module("hypercorn.asyncio").serve(application, server, shutdown_trigger=stop.wait)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _watch_lifeline(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    def wait_for_end() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has closed already
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_end, name="lifeline", daemon=True).start()


async def _check_itself(application: Application, host: str, account: emulator.Account) -> None:
    """What must be refused is refused, or we do not start: no patch may stop taking effect unseen."""
    form = {"host": host, "content-type": "application/x-www-form-urlencoded"}
    role = f"arn:aws:iam::{account.id}:role/none"
    token = "e30.e30.e30"  # noqa: S105 - an empty one
    assume = (
        f"Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn={role}&RoleSessionName=check"
        f"&WebIdentityToken={token}"
    ).encode()
    status, body = await emulator.call(application, form, assume)
    if status != 400 or b"<Code>InvalidIdentityToken</Code>" not in body:
        raise emulator.EmulatorError(f"a worthless token was answered with {status}: {body[:500]!r}")
    whoami = b"Action=GetCallerIdentity&Version=2011-06-15"
    for key in ("test", "000000000000", account.id, account.admin_key_id):
        credential = f"{key}/20300101/{account.region}/sts/aws4_request"
        signed = form | {
            "x-amz-date": "20300101T000000Z",
            "authorization": (
                f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=content-type;host;x-amz-date, "
                f"Signature={'0' * 64}"
            ),
        }
        status, _ = await emulator.call(application, signed, whoami)
        if status != 403:
            raise emulator.EmulatorError(f"a worthless signature was answered with {status}")


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "spiffe==0.3.2",
#   "spiffe-tls==0.4.0",
#   "pyopenssl==26.4.0",
#   "cryptography==50.0.2",
#   "grpcio==1.85.3",
#   "protobuf==7.36.2",
# ]
# ///
"""A workload on `spiffe` and `spiffe-tls`, in an environment of its own. Answers on standard output.

Each line on standard input asks for the state; the end of input ends it. Every answer is a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

from spiffe import SpiffeId, TrustDomain, X509Source
from spiffetls import ListenOptions, SpiffeSSLContext, listen
from spiffetls.tlsconfig import authorize


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def state(source: X509Source) -> dict[str, Any]:
    if source.is_closed():
        return {"closed": True, "serial": None, "authorities": {}}
    context = source.get_x509_context()
    return {
        "closed": False,
        "serial": f"{context.default_svid.leaf.serial_number:x}",
        "authorities": {
            bundle.trust_domain.name: len(bundle.x509_authorities)
            for bundle in context.x509_bundle_set.bundles
        },
    }


def authorizer(text: str) -> Any:
    kind, _, value = text.partition("=")
    return {
        "none": lambda: None,
        "any": authorize.authorize_any,
        "id": lambda: authorize.authorize_id(SpiffeId(value)),
        "domain": lambda: authorize.authorize_member_of(TrustDomain(value)),
    }[kind]()


def greet(listener: Any) -> None:
    """Tell each peer that gets through that it did."""
    while True:
        connection, _ = listener.accept()
        try:
            connection.do_handshake()
            connection.sendall(b"accepted\n")
            connection.shutdown()
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            connection.close()


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "parse":
        for text in json.loads(arguments[0]):
            try:
                say(accepted=True, read_as=str(SpiffeId(text)))
            except Exception as error:
                say(accepted=False, why=type(error).__name__)
        return
    try:
        source = X509Source(socket_path=arguments[0], timeout_in_seconds=30)
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        return
    port = None
    if command == "serve":
        listener = listen("127.0.0.1:0", source, ListenOptions(authorize_fn=authorizer(arguments[1])))
        port = listener.getsockname()[1]
        threading.Thread(target=greet, args=(listener,), daemon=True).start()
    elif command == "asyncio":
        try:
            asyncio.run(connect(SpiffeSSLContext(source), int(arguments[1])))
            say(connected=True)
        except Exception as error:
            say(connected=False, why=f"{type(error).__name__}: {error}")
        return
    say(port=port)
    for _ in sys.stdin:
        say(**state(source))


async def connect(context: Any, port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.close()


main()

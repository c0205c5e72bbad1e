"""A `requests` session over mutual TLS: `ztmtls.requests.Session`, for programs written for that API.

There is no way around its TLS: not by ``verify=False``, a proxy, a redirect or plain HTTP.
"""

from __future__ import annotations

from options import HOST, call_again, ending, options

from ztmtls import X509Source
from ztmtls.requests import Session, hop


def hello(session: Session, port: int) -> str:
    """One request."""
    response = session.get(f"https://{HOST}:{port}/hello")
    response.raise_for_status()
    server = hop(response).peer
    return f"{response.text} from {server.id} {server.serial}"


if __name__ == "__main__":
    given = options(__doc__, ["client"])
    with ending(), X509Source() as source:
        source.wait(30)
        with Session(source, peer=given.peer) as towards:
            call_again(given.every, lambda: hello(towards, given.port))

"""A second stand-in for AWS, in which exactly one check of web-identity tokens is left out.

The gate's process runs this file as a program, in the gate's own environment:

    python -I -B weak_cloud.py CONTROL FOLDER_OF_THE_GATE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


def token_signature() -> None:
    """What a token says is believed, whoever signed it."""
    from gate import tokens

    class Claims:
        def __init__(self, token: str) -> None:
            self.claims = tokens._json_part(token.split(".")[1])

    tokens.jwt.decode = lambda token, key, algorithms: Claims(token)


def token_key() -> None:
    """A key that the token itself brings along is as good as the issuer's."""
    from gate import tokens

    verify = tokens.verify_token

    def trusting(token: str, provider: Any, keys: Any, now: float) -> Any:
        header = tokens._json_part(token.split(".")[0])
        brought = [tokens.ECKey.import_key(header["jwk"])] if "jwk" in header else []
        return verify(token, provider, [*keys, *brought], now)

    _replace_verify(trusting)


def token_lifetime() -> None:
    """A token never runs out."""
    from gate import tokens

    verify = tokens.verify_token

    def timeless(token: str, provider: Any, keys: Any, now: float) -> Any:
        expires = tokens._json_part(token.split(".")[1])["exp"]
        return verify(token, provider, keys, min(now, expires - 1))

    _replace_verify(timeless)


def token_audience() -> None:
    """A token for somebody else is as good as one for AWS."""
    from gate import tokens

    verify = tokens.verify_token

    def for_anybody(token: str, provider: Any, keys: Any, now: float) -> Any:
        audience = tokens._json_part(token.split(".")[1])["aud"]
        wider = tokens.Provider(provider.url, (*provider.client_ids, *audience))
        return verify(token, wider, keys, now)

    _replace_verify(for_anybody)


def _replace_verify(function: Callable[..., Any]) -> None:
    from gate import emulator

    emulator.verify_token = function


LEFT_OUT: Mapping[str, Callable[[], None]] = {
    "token-signature": token_signature,
    "token-key": token_key,
    "token-lifetime": token_lifetime,
    "token-audience": token_audience,
}


def main() -> int:
    control, gate = sys.argv[1:]
    sys.argv = ["gate"]
    sys.path.append(gate)
    LEFT_OUT[control]()
    from gate.__main__ import main as serve

    return int(serve())


if __name__ == "__main__":
    sys.exit(main())

"""The caller by JWT-SVID in a FastAPI application, for one that stands behind `bearer.BearerGuard`.

Apart from `ztmtls.fastapi` on purpose: a `Peer` was verified on the connection itself, a `JwtPeer` holds a
token that others may have seen. Neither ever stands in for the other.

    app = FastAPI()
    served = BearerGuard(app, source=source, audience="spiffe://zt.example/reports", policy=…, audit=…)

    @app.get("/reports")
    async def reports(caller: JwtPeer) -> str:
        return f"for {caller.id}"
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.requests import HTTPConnection

from .bearer import JwtCaller, jwt_caller


async def _jwt_peer(connection: HTTPConnection) -> JwtCaller:
    return jwt_caller(connection.scope)


JwtPeer = Annotated[JwtCaller, Depends(_jwt_peer)]
"""The caller that this request's JWT-SVID names. There is none without `BearerGuard`, whatever is sent."""

__all__ = ["JwtPeer"]

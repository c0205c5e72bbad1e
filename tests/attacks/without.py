"""Run a service with certain controls left out: for the attack lab, and never shipped.

    python -m tests.attacks.without CONTROL [CONTROL ...] -- SERVICE [ARGUMENT ...]

Before the service's own `main` runs, one function of it (or one of the library's) is replaced, for each
control, by one that does everything but this control. Nothing that is shipped knows of this module, and no
setting reaches it.
"""

from __future__ import annotations

import os
import runpy
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztmtls.verify import VerifiedPeer


def client_certificate() -> None:
    """A caller without a certificate is not ended by OpenSSL."""
    from ztmtls import tls

    harden = tls._harden

    def lenient(context: ssl.SSLContext) -> None:
        harden(context)
        if context.protocol == ssl.PROTOCOL_TLS_SERVER:
            context.verify_mode = ssl.CERT_OPTIONAL

    # Before Python 3.13 OpenSSL's answer for "none" is a list that holds None.
    presented = tls._presented_chain

    def none_or_presented(handshake: Any) -> Any:
        return presented(handshake) if handshake.getpeercert(binary_form=True) else ()

    tls._harden = lenient
    tls._presented_chain = none_or_presented


def certificate_validity() -> None:
    """OpenSSL does not look at the clock (X509_V_FLAG_NO_CHECK_TIME)."""
    from ztmtls import tls

    load_svid = tls.load_svid  # the last step of building a context

    def timeless(context: ssl.SSLContext, svid: Any) -> None:
        load_svid(context, svid)
        context.verify_flags |= 0x200000  # type: ignore[operator]

    tls.load_svid = timeless


def peer_verification() -> None:
    """Whatever OpenSSL lets through is believed to be what its first URI SAN says, or nobody."""
    from cryptography import x509

    from ztmtls import tls
    from ztmtls.svid import fingerprint, serial_text, spiffe_id_of
    from ztmtls.verify import VerifiedPeer

    def believe(chain: Any, bundles: Any, now: datetime) -> VerifiedPeer:
        if not chain:
            return nobody()
        leaf: x509.Certificate = chain[0]
        return VerifiedPeer(
            id=spiffe_id_of(leaf),
            serial=serial_text(leaf),
            fingerprint=fingerprint(leaf),
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            valid_until=leaf.not_valid_after_utc,
            authority=serial_text(chain[-1]),
            chain=tuple(chain),
        )

    tls.verify_peer = believe


def nobody() -> VerifiedPeer:
    """A peer of whom nothing is known, as a server has it that does not ask."""
    from tests.attacks.lab import NOBODY
    from ztmtls.ids import SpiffeId
    from ztmtls.verify import VerifiedPeer

    now = datetime.now(UTC)
    return VerifiedPeer(
        id=SpiffeId.parse(NOBODY),
        serial="",
        fingerprint="",
        not_before=now,
        not_after=now + timedelta(hours=1),
        valid_until=now + timedelta(hours=1),
        authority="",
        chain=(),
    )


def request_guard() -> None:
    """A request on a connection without a verified peer is nobody's, and is asked no more."""
    from ztmtls import guard
    from ztmtls.tls import Connection

    identity_of = guard.request_identity
    call = guard.Guard.__call__

    async def open_door(self: guard.Guard, scope: Any, receive: Any, send: Any) -> None:
        try:
            identity_of(scope)
        except guard.NoPeer:
            unknown = Connection("callee", self._source.context, nobody(), None, "", "")
            guard.set_request_identity(scope, guard.RequestIdentity(unknown))
        await call(self, scope, receive, send)

    guard.Guard.__call__ = open_door  # type: ignore[method-assign]


def no_resumption() -> None:
    """A session that was taken up again is as good as a new one."""
    from ztmtls import tls

    for kind in (tls._VerifiedObject, tls._VerifiedSocket):
        kind.session_reused = False  # type: ignore[misc]


def served_routes() -> None:
    """The application has a route that nobody meant to serve, as generated ones come with."""
    from payments import app

    create = app.create_app

    def with_more(*args: Any, **more: Any) -> Any:
        made = create(*args, **more)
        made.add_api_route("/payments/{payment_id}", lambda payment_id: "deleted", methods=["DELETE"])
        return made

    app.create_app = with_more


def content_policy() -> None:
    """Browsers are told nothing of what a page may do, nor who may frame it."""
    from frontend import security

    for name in ("Content-Security-Policy", "X-Frame-Options"):
        del security.HEADERS[name]


def database_proof() -> None:
    """A password is given to the database as the database asks for it."""
    from ztmtls import database

    parameters = database._Connector.parameters

    def trusting(self: Any, version: Any) -> dict[str, Any]:
        told = parameters(self, version) | {"channel_binding": "disable"}
        del told["require_auth"]
        return told

    database._Connector.parameters = trusting


def key_in_transaction() -> None:
    """A key is looked for first, and taken when the charge is made."""
    from uuid import uuid4

    from payments.ledger import Ledger

    charge = Ledger.charge
    taken: dict[tuple[str, str], Any] = {}

    async def look_first(self: Ledger, caller: str, key: str, request: Any) -> Any:
        if (caller, key) not in taken:
            taken[caller, key] = await charge(self, caller, uuid4().hex, request)
            return taken[caller, key]
        return replace(taken[caller, key], replayed=True)

    Ledger.charge = look_first


def tls_version() -> None:
    """TLS 1.2 is spoken, too."""
    from ztmtls import tls

    harden = tls._harden

    def lenient(context: ssl.SSLContext) -> None:
        harden(context)
        context.minimum_version = ssl.TLSVersion.TLSv1_2

    tls._harden = lenient


def live_recheck() -> None:
    """A connection that was verified once is never looked at again."""
    from ztmtls import tls

    tls.Connection.recheck = lambda *_, **__: None  # type: ignore[method-assign,assignment]


def trusted_authorities() -> None:
    """OpenSSL trusts one authority more than the bundles hold: the PEM in `TOO_MUCH_TRUST`."""
    from ztmtls import tls

    load_svid = tls.load_svid  # the last step of building a context

    def trustful(context: ssl.SSLContext, svid: Any) -> None:
        load_svid(context, svid)
        context.load_verify_locations(cadata=os.environ["TOO_MUCH_TRUST"])

    tls.load_svid = trustful


def authority_withdrawal() -> None:
    """The first update from the Workload API is the last one that counts."""
    from ztmtls.source import X509Source

    receive = X509Source._receive

    def once(self: X509Source, response: Any) -> None:
        if not self._has_something_to_lose():
            receive(self, response)

    X509Source._receive = once  # type: ignore[method-assign]


def mutual_tls() -> None:
    """The application port speaks plain HTTP."""
    from ztmtls import server

    config = server._config

    def plain(*args: Any, ssl_context_factory: Any = None, **more: Any) -> Any:
        return config(*args, **more)

    server._config = plain


def server_identity() -> None:
    """A client takes any verified workload for the server that it wants."""
    from ztmtls import tls

    authorize = tls.GenerationContext._authorize

    def lenient(context: tls.GenerationContext, peer: Any) -> None:
        if context._side == "callee":
            authorize(context, peer)

    tls.GenerationContext._authorize = lenient  # type: ignore[method-assign]


def identity_from_certificate() -> None:
    """A header may say who is calling."""
    from ztmtls import guard
    from ztmtls.ids import SpiffeId

    authorize = guard.authorize_request
    check = guard.Guard.check

    def believe(self: guard.Guard, connection: Any, scope: Any) -> str:
        claimed = [value.decode() for name, value in scope["headers"] if name == b"x-spiffe-id"]
        if not claimed:
            return check(self, connection, scope)
        raw_path = scope["path"].encode()
        return authorize(self.policy, SpiffeId.parse(claimed[0]), scope["method"], scope["path"], raw_path)

    guard.Guard.check = believe  # type: ignore[method-assign]


def route_policy() -> None:
    """Every verified caller may make every request."""
    from ztmtls import guard

    guard.authorize_request = lambda *_: "no rule asked"


def one_meaning_paths() -> None:
    """A path means what it decodes to."""
    from ztmtls import authz

    authz.is_ambiguous = lambda *_: False


def callers_own() -> None:
    """An order is told to whoever may ask for orders."""
    from sqlalchemy import select
    from sqlalchemy.orm import selectinload

    from orders.models import Order
    from orders.store import Orders

    newest = Orders.newest

    async def newest_of_all(self: Orders, caller: str, limit: int) -> Any:
        async def callers(session: Any) -> list[str]:
            return list(await session.scalars(select(Order.caller).distinct()))

        every = await self._database.run(callers)
        return [order for each in every for order in await newest(self, each, limit)]

    async def find(self: Orders, caller: str, order_id: Any) -> Order:
        query = select(Order).where(Order.id == order_id).options(selectinload(Order.items))

        async def work(session: Any) -> Order:
            order: Order = (await session.scalars(query)).one()
            return order

        return await self._database.run(work)

    Orders.find, Orders.newest = find, newest_of_all


def exactly_once() -> None:
    """Each charge is a new one, whatever its key."""
    from uuid import uuid4

    from payments.ledger import Ledger

    charge = Ledger.charge

    async def again(self: Ledger, caller: str, key: str, request: Any) -> Any:
        return await charge(self, caller, uuid4().hex, request)

    Ledger.charge = again


def one_end() -> None:
    """A request may say in two ways where it ends; the parser takes one of them."""
    from ztmtls import guard

    guard.refuse_two_ends = lambda _: None


def request_deadline() -> None:
    """A request may take as long as it likes."""
    from ztmtls import guard, live

    live.LiveConnection.head_late = lambda *_: False  # type: ignore[method-assign]
    limited = guard._LimitedBody.__init__

    def patient(self: Any, scope: Any, receive: Any, send: Any, limit: int, _: float) -> None:
        limited(self, scope, receive, send, limit, 3600.0)

    guard._LimitedBody.__init__ = patient


def no_session_tickets() -> None:
    """A server hands out tickets, with which a session is taken up again."""
    from ztmtls import tls

    harden = tls._harden

    def generous(context: ssl.SSLContext) -> None:
        harden(context)
        if context.protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 2

    tls._harden = generous


def escaping() -> None:
    """Templates write values as they are."""
    import jinja2

    make = jinja2.Environment.__init__

    def trusting(self: jinja2.Environment, *args: Any, **more: Any) -> None:
        make(self, *args, **more | {"autoescape": False})

    jinja2.Environment.__init__ = trusting


def no_framing() -> None:
    """The page does not look at what a browser wants it for."""
    from frontend import security

    security.FRAMES = frozenset()


def whole_policy() -> None:
    """What can be understood of a policy file is in force, and the rest is left out."""
    from ztmtls import authz

    known = ("name", "callers", "methods", "paths")

    def lenient(path: Any) -> authz.Policy:
        content = authz.PolicyDocument.read(path).content
        rules = content["rules"] if isinstance(content, dict) else []
        if not rules:
            return authz.Policy(())
        understood = [{key: rule[key] for key in known} for rule in rules]
        return authz.Policy.parse({"version": 1, "rules": understood})

    authz.load_policy = lenient


def database_identity() -> None:
    """TLS to the database, whoever it is (`sslmode=require`)."""
    from ztmtls import database

    parameters = database._Connector.parameters

    def anybody(self: Any, version: Any) -> dict[str, Any]:
        told = parameters(self, version) | {"sslmode": "require"}
        del told["sslrootcert"]  # with it, `require` would verify the authority
        return told

    database._Connector.parameters = anybody


def silent_logs() -> None:
    """Somebody looks for a fault with a line in the log, and forgets it there."""
    import logging

    from ztmtls import database

    parameters = database._Connector.parameters

    def talkative(self: Any, version: Any) -> dict[str, Any]:
        told = parameters(self, version)
        logging.getLogger("ztmtls.database").warning("connecting: %s", told)
        return told

    database._Connector.parameters = talkative


def keys_in_memory() -> None:
    """A key comes into OpenSSL by way of a file, which stays."""
    from pathlib import Path

    from ztmtls import tls

    load_svid = tls.load_svid

    def by_file(context: ssl.SSLContext, svid: Any) -> None:
        (Path.home() / f"{svid.serial}.pem").write_bytes(svid.pem())
        load_svid(context, svid)

    tls.load_svid = by_file


def idempotency_keys() -> None:
    """A key stands for any request."""
    from payments import ledger

    ledger.fingerprint = lambda *_: "any"


def form_origin() -> None:
    """A form is taken from wherever it was sent."""
    from frontend.security import Csrf

    Csrf.check = lambda *_: None  # type: ignore[method-assign]


def own_host_name() -> None:
    """The frontend answers to every host name."""
    from frontend import security

    security.host_name = lambda _: "localhost"


def body_limit() -> None:
    """A request's body may be of any size."""
    from ztmtls import guard

    limited = guard._LimitedBody.__init__

    def unlimited(self: Any, scope: Any, receive: Any, send: Any, _: int, timeout: float) -> None:
        limited(self, scope, receive, send, sys.maxsize, timeout)

    guard._LimitedBody.__init__ = unlimited  # type: ignore[method-assign]


LEFT_OUT: Mapping[str, Callable[[], None]] = {
    "client-certificate": client_certificate,
    "certificate-validity": certificate_validity,
    "peer-verification": peer_verification,
    "trusted-authorities": trusted_authorities,
    "authority-withdrawal": authority_withdrawal,
    "mutual-tls": mutual_tls,
    "request-guard": request_guard,
    "no-resumption": no_resumption,
    "served-routes": served_routes,
    "content-policy": content_policy,
    "database-proof": database_proof,
    "key-in-transaction": key_in_transaction,
    "tls-version": tls_version,
    "server-identity": server_identity,
    "live-recheck": live_recheck,
    "identity-from-certificate": identity_from_certificate,
    "route-policy": route_policy,
    "one-meaning-paths": one_meaning_paths,
    "idempotency-keys": idempotency_keys,
    "whole-policy": whole_policy,
    "database-identity": database_identity,
    "silent-logs": silent_logs,
    "keys-in-memory": keys_in_memory,
    "exactly-once": exactly_once,
    "callers-own": callers_own,
    "one-end": one_end,
    "request-deadline": request_deadline,
    "no-session-tickets": no_session_tickets,
    "escaping": escaping,
    "no-framing": no_framing,
    "form-origin": form_origin,
    "own-host-name": own_host_name,
    "body-limit": body_limit,
}


def main() -> None:
    """Leave the controls out, then become the service."""
    given = sys.argv[1:]
    dashes = given.index("--") if "--" in given else 0
    controls, arguments = given[:dashes], given[dashes + 1 :]
    if not controls or not arguments:
        sys.exit("usage: python -m tests.attacks.without CONTROL [CONTROL ...] -- SERVICE [ARGUMENT ...]")
    for control in controls:
        LEFT_OUT[control]()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

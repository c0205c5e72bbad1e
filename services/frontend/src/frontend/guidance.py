"""What the reason codes that reach a page mean, and what to do about them."""

from __future__ import annotations

from typing import NamedTuple

from ztmtls.reasons import Reason


class Guidance(NamedTuple):
    """For a person: what happened, and what to do next."""

    meaning: str
    remedy: str


_SERVER_CERTIFICATE = Guidance(
    "The certificate of the server that answered failed the check. Not a byte of the request was sent.",
    "Find out what listens at ORDERS_URL. If it should be orders, look at its identity in its own log.",
)
_OWN_IDENTITY = Guidance(
    "A service without a valid certificate calls nobody and answers nobody.",
    "Look at the Workload API (the SPIRE agent) on this node and at the registration of this service.",
)
_CREDENTIALS = Guidance(
    "A service behind orders could not get its database credentials.",
    "Look at the role, its trust policy and the secret. Identity and policy were in order up to there.",
)
_DATABASE = Guidance(
    "A database did not serve the request.",
    "Look at the service's log: it names the server, the user and the version of the secret it tried.",
)

_GUIDANCE: dict[str, Guidance] = {
    Reason.WRONG_SERVER_IDENTITY: Guidance(
        "The server proved an identity, but not the one we call. Not a byte of the request was sent.",
        "Compare ORDERS_SPIFFE_ID with the identity that orders was registered for.",
    ),
    Reason.CALLER_NOT_ALLOWED: Guidance(
        "The caller proved its identity, and no rule of the callee's policy names it.",
        "If the call is meant to be allowed, add a rule to the callee's policy.yaml.",
    ),
    Reason.ROUTE_NOT_ALLOWED: Guidance(
        "The callee's policy names the caller, but for other routes than this one.",
        "If the call is meant to be allowed, add the method and the path to the callee's policy.yaml.",
    ),
    Reason.REFUSED_BY_SERVER: Guidance(
        "The server would not take the caller's certificate and broke off the handshake.",
        "Look for the `handshake` line in the audit log of the callee: it says what was wrong.",
    ),
    Reason.NO_IDENTITY: _OWN_IDENTITY,
    Reason.IDENTITY_DENIED: _OWN_IDENTITY,
    Reason.IDENTITY_EXPIRED: _OWN_IDENTITY,
    Reason.EXPIRED: _SERVER_CERTIFICATE,
    Reason.NOT_YET_VALID: _SERVER_CERTIFICATE,
    Reason.UNTRUSTED_AUTHORITY: _SERVER_CERTIFICATE,
    Reason.UNKNOWN_TRUST_DOMAIN: _SERVER_CERTIFICATE,
    Reason.NO_URI_SAN: _SERVER_CERTIFICATE,
    Reason.TLS_FAILURE: _SERVER_CERTIFICATE,
    Reason.WEB_IDENTITY_MISSING: _CREDENTIALS,
    Reason.WEB_IDENTITY_REFUSED: _CREDENTIALS,
    Reason.SECRET_DENIED: _CREDENTIALS,
    Reason.SECRET_UNAVAILABLE: _CREDENTIALS,
    Reason.DATABASE_UNTRUSTED: _DATABASE,
    Reason.DATABASE_DENIED: _DATABASE,
    Reason.DATABASE_UNAVAILABLE: _DATABASE,
    Reason.DEPENDENCY_UNAVAILABLE: Guidance(
        "Nothing was refused: a service this page needs does not answer.",
        "Wait a moment and try again. If it lasts, look at the readiness of the callee.",
    ),
    Reason.PAYMENT_UNKNOWN: Guidance(
        "Payments was asked and its answer never came, so nobody knows yet whether it charged.",
        "Nothing: orders asks again with the same key until it knows. You are never charged twice.",
    ),
    Reason.PAYMENT_DECLINED: Guidance(
        "Payments answered, and said no.", "Nothing was charged. Change the order and try again."
    ),
    Reason.CSRF_FAILED: Guidance(
        "A form is taken only from a page of this site, in the browser that got the page.",
        "Open the order page again and send the form from there. The browser must accept its cookie.",
    ),
    Reason.HOST_NOT_ALLOWED: Guidance(
        "The frontend answers only to the host names in ALLOWED_HOSTS.",
        "Use one of those names, or add this one to the setting.",
    ),
    Reason.FRAMING_REFUSED: Guidance(
        "These pages are not shown inside other pages: what one presses there may not be what one sees.",
        "Open the address by itself.",
    ),
    Reason.TOO_MANY_STREAMS: Guidance(
        "Each page that shows things live holds a stream open, and their number is bounded.",
        "Close a page that shows things live, and reload this one.",
    ),
    Reason.TOO_LARGE: Guidance(
        "The frontend reads no more than its forms need.", "Send the form of the order page as it is."
    ),
    Reason.NOT_FOUND: Guidance(
        "There is nothing at this address.", "Look at the recent orders on the order page."
    ),
    Reason.METHOD_NOT_ALLOWED: Guidance(
        "The address exists, but not for this method.", "Start from the order page."
    ),
    Reason.INTERNAL_ERROR: Guidance(
        "Something went wrong in a service. Its log has the details; pages never do.",
        "Try again. If it lasts, read the service's log.",
    ),
}

_OTHERWISE = Guidance(
    "The request was not carried out.", "The audit logs of both sides of this hop tell more."
)


def guidance(reason: str) -> Guidance:
    """What to tell a person about `reason`."""
    return _GUIDANCE.get(reason, _OTHERWISE)

"""Why something was refused: one stable code, the same wherever the refusal is seen.

A code stands in the exception, the HTTP problem document (RFC 9457), the audit line, the metric
label and the web page. Codes are never renamed: alerts and dashboards are built on them.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Stable reason codes. The value is what appears on the wire and in logs."""

    # The peer's certificate, in the handshake or when a live connection is checked again.
    NO_CERTIFICATE = "no_certificate"
    MALFORMED_CERTIFICATE = "malformed_certificate"
    NO_URI_SAN = "no_uri_san"
    MULTIPLE_URI_SANS = "multiple_uri_sans"
    INVALID_SPIFFE_ID = "invalid_spiffe_id"
    ROOT_PATH_ID = "root_path_id"
    LEAF_IS_CA = "leaf_is_ca"
    LEAF_CAN_SIGN_CERTIFICATES = "leaf_can_sign_certificates"
    LEAF_CAN_SIGN_CRLS = "leaf_can_sign_crls"
    LEAF_WITHOUT_DIGITAL_SIGNATURE = "leaf_without_digital_signature"
    UNKNOWN_TRUST_DOMAIN = "unknown_trust_domain"
    UNTRUSTED_AUTHORITY = "untrusted_authority"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    CHAIN_TOO_LONG = "chain_too_long"
    SESSION_RESUMED = "session_resumed"
    NOT_TLS = "not_tls"
    TLS_FAILURE = "tls_failure"

    # What a verified peer may do.
    CALLER_NOT_ALLOWED = "caller_not_allowed"
    ROUTE_NOT_ALLOWED = "route_not_allowed"
    AMBIGUOUS_PATH = "ambiguous_path"
    NO_PEER = "no_peer"
    INVALID_POLICY = "invalid_policy"
    WRONG_SERVER_IDENTITY = "wrong_server_identity"
    REFUSED_BY_SERVER = "refused_by_server"
    REFUSED_BY_CALLER = "refused_by_caller"

    # Our own identity.
    NO_IDENTITY = "no_identity"
    IDENTITY_EXPIRED = "identity_expired"
    IDENTITY_DENIED = "identity_denied"
    INVALID_UPDATE = "invalid_update"
    INVALID_ENDPOINT = "invalid_endpoint"

    # A JWT-SVID, and the bundles it is verified with.
    JWT_MISSING = "jwt_missing"
    JWT_MALFORMED = "jwt_malformed"
    JWT_ALGORITHM = "jwt_algorithm"
    JWT_TYPE = "jwt_type"
    JWT_HEADER = "jwt_header"
    JWT_SUBJECT = "jwt_subject"
    JWT_UNKNOWN_KEY = "jwt_unknown_key"
    JWT_SIGNATURE = "jwt_signature"
    JWT_CLAIM = "jwt_claim"
    JWT_EXPIRED = "jwt_expired"
    JWT_NOT_YET_VALID = "jwt_not_yet_valid"
    JWT_AUDIENCE = "jwt_audience"
    NO_JWT_BUNDLES = "no_jwt_bundles"

    # Credentials by web identity.
    WEB_IDENTITY_MISSING = "web_identity_missing"
    WEB_IDENTITY_CONFLICT = "web_identity_conflict"
    WEB_IDENTITY_REFUSED = "web_identity_refused"
    SECRET_DENIED = "secret_denied"  # noqa: S105 - a code, not a secret
    SECRET_UNAVAILABLE = "secret_unavailable"  # noqa: S105 - a code, not a secret
    SECRET_MALFORMED = "secret_malformed"  # noqa: S105 - a code, not a secret

    # The database.
    DATABASE_UNTRUSTED = "database_untrusted"
    DATABASE_DENIED = "database_denied"
    DATABASE_UNAVAILABLE = "database_unavailable"

    # Requests that are refused on their own merits.
    INVALID_REQUEST = "invalid_request"
    IDEMPOTENCY_KEY_MISSING = "idempotency_key_missing"
    IDEMPOTENCY_KEY_INVALID = "idempotency_key_invalid"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    MALFORMED_REQUEST = "malformed_request"
    REQUEST_TIMEOUT = "request_timeout"
    CSRF_FAILED = "csrf_failed"
    HOST_NOT_ALLOWED = "host_not_allowed"
    FRAMING_REFUSED = "framing_refused"
    TOO_MANY_STREAMS = "too_many_streams"
    PAYMENT_DECLINED = "payment_declined"
    PAYMENT_UNKNOWN = "payment_unknown"
    DEPENDENCY_UNAVAILABLE = "dependency_unavailable"
    HTTP_ERROR = "http_error"
    INTERNAL_ERROR = "internal_error"


class Refusal(Exception):
    """Something was refused, for `reason`; `detail` says it to a person in one sentence.

    Details never hold key material, passwords or tokens.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class NoDatabase(Refusal):
    """The database can't be used at the moment. The reason says why, the detail what to look at."""


class JwtRefused(Refusal):
    """The token is no acceptable JWT-SVID. `reason` says which check failed."""


def printable(text: str, limit: int = 256) -> str:
    """Return untrusted `text` on one line, control characters escaped, cut at `limit` characters."""
    escaped = text[: limit + 1].encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[:limit] + "…"

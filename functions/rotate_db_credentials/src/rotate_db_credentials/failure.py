"""Why a step of a rotation ends without its result."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Codes that do not change between versions."""

    EVENT_MALFORMED = "event_malformed"
    """The event is not one of Secrets Manager."""
    ROTATION_NOT_ENABLED = "rotation_not_enabled"
    """The secret is not set up for rotation."""
    VERSION_UNKNOWN = "version_unknown"
    """The token is no version of the secret."""
    VERSION_NOT_PENDING = "version_not_pending"
    """The version is not the one that is being rotated in."""
    SECRET_MALFORMED = "secret_malformed"  # noqa: S105 - a code
    """A secret does not hold what a database secret must hold."""
    SECRETS_DISAGREE = "secrets_disagree"
    """Two secrets that must name one database do not, or the pending login is not the current one's twin."""
    AWS_REFUSED = "aws_refused"
    """A call to Secrets Manager failed; the text has AWS's code."""
    CA_FILE_MISSING = "ca_file_missing"
    """There is no file with the authorities of the database's certificate."""
    DATABASE_UNAVAILABLE = "database_unavailable"
    """No session: the server cannot be reached, did not prove who it is, or has no room."""
    LOGIN_REFUSED = "login_refused"
    """The server does not take this user name and password."""
    STATEMENT_REFUSED = "statement_refused"
    """A statement failed; the text has the SQLSTATE."""
    GRANTS_MISSING = "grants_missing"
    """The pending login lacks a role that the current one has."""


class RotationFailed(Exception):
    """The step ends here; Secrets Manager calls it again. The text holds no secret."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

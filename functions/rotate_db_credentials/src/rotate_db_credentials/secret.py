"""What a database secret holds: the JSON members that AWS's own tools use."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace

from .failure import Reason, RotationFailed

#: The twin of `X` is `X_clone`, as in AWS's own functions.
CLONE = "_clone"

#: A PostgreSQL name that needs no quotes. Longer ones the server would cut.
_USER = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,254}")
_DATABASE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
_MAX_PASSWORD = 512


@dataclass(frozen=True, slots=True)
class DatabaseSecret:
    """One version of a secret of a database login.

    `superuser_arn` (``masterarn``) names the secret of the login that sets passwords; empty for none.
    """

    host: str
    port: int
    dbname: str
    username: str
    password: str = field(repr=False)
    superuser_arn: str = ""

    @property
    def place(self) -> tuple[str, int, str]:
        """Which database it is: host, port, name."""
        return self.host, self.port, self.dbname

    @property
    def twin(self) -> str:
        """The other user name of the pair."""
        return self.username.removesuffix(CLONE) if self.username.endswith(CLONE) else self.username + CLONE

    def for_twin(self, password: str) -> DatabaseSecret:
        """The next version: the same database, the other user."""
        return _checked(replace(self, username=self.twin, password=password), "the next version")

    def to_json(self) -> str:
        members = {
            "engine": "postgres",
            "host": self.host,
            "port": self.port,
            "dbname": self.dbname,
            "username": self.username,
            "password": self.password,
        }
        return json.dumps(members | ({"masterarn": self.superuser_arn} if self.superuser_arn else {}))

    @classmethod
    def from_json(cls, text: str, which: str) -> DatabaseSecret:
        """Read a SecretString. `which` names it in errors, which never quote it.

        Raises:
            RotationFailed: ``secret_malformed``, naming the member.
        """
        try:
            members = json.loads(text)
        except ValueError:
            members = None
        if not isinstance(members, dict):
            raise _malformed(which, "is not a JSON object")
        if members.get("engine") != "postgres":
            raise _malformed(which, "has an engine other than postgres")
        texts = {}
        for name in ("host", "dbname", "username", "password"):
            value = members.get(name)
            if not isinstance(value, str) or not value:
                raise _malformed(which, f"has no {name}")
            texts[name] = value
        superuser_arn = members.get("masterarn", "")
        if not isinstance(superuser_arn, str):
            raise _malformed(which, "has a masterarn that is no text")
        return _checked(
            cls(port=_port(members.get("port"), which), superuser_arn=superuser_arn, **texts), which
        )


def _port(value: object, which: str) -> int:
    """AWS's console writes a number, other tools a text."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise _malformed(which, "has no port")
    return value


def _checked(secret: DatabaseSecret, which: str) -> DatabaseSecret:
    for name, pattern in (("host", _HOST), ("dbname", _DATABASE), ("username", _USER)):
        if not pattern.fullmatch(getattr(secret, name)):
            raise _malformed(which, f"has a {name} that cannot be one")
    if len(secret.password) > _MAX_PASSWORD or "\0" in secret.password:
        raise _malformed(which, "has a password that cannot be one")
    return secret


def _malformed(which: str, what: str) -> RotationFailed:
    return RotationFailed(Reason.SECRET_MALFORMED, f"{which} {what}")

"""One version of a secret, as Secrets Manager answers it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from .aws_identity import SecretError
from .reasons import Reason


@dataclass(frozen=True)
class SecretValue:
    """One version of a secret. `fields` are its JSON members as strings; `repr` names them without values.
    `created_at` is when this version was made, as far as AWS says it."""

    version_id: str
    fields: Mapping[str, str] = field(repr=False)
    created_at: datetime | None = None

    def __getitem__(self, name: str) -> str:
        return self.fields[name]

    def __repr__(self) -> str:
        return f"SecretValue(version_id={self.version_id!r}, fields=<{', '.join(sorted(self.fields))}>)"

    __str__ = __repr__

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a secret is not pickled")


def parse(answer: Mapping[str, Any], required: tuple[str, ...], secret_id: str) -> SecretValue:
    """The version in an answer of GetSecretValue.

    Raises:
        SecretError: ``secret_malformed``: it is no JSON object, or a required member is not a text.
    """

    def malformed(what: str) -> SecretError:
        return SecretError(Reason.SECRET_MALFORMED, f"secret {secret_id}: {what}")

    text = answer.get("SecretString")
    if not isinstance(text, str):
        raise malformed("it is binary; it must be a JSON object with text members")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise malformed("it is not JSON") from None
    if not isinstance(data, dict):
        raise malformed("it is JSON, but not an object")
    for name in required:
        if name not in data:
            raise malformed(f"it has no member {name}")
        if not isinstance(data[name], str) or not data[name]:
            raise malformed(f"its member {name} is not a text, or is empty")
    version = answer.get("VersionId")
    if not isinstance(version, str) or not version:
        raise malformed("the answer names no version")
    fields = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in data.items()
        if isinstance(value, str | int | float | bool)
    }
    created = answer.get("CreatedDate")
    return SecretValue(version, MappingProxyType(fields), created if isinstance(created, datetime) else None)

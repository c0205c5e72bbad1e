"""What the stand-in refuses, as lines of JSON: in the shape of the services' audit lines, as CloudTrail would
have it. No token, no secret, no signature; of an access key's ID as much as tells it from another one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

#: Error codes that mean "you may not", of STS, IAM, KMS and Secrets Manager.
DENIALS = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "IDPCommunicationError",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidIdentityToken",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)

_XML_ERROR = re.compile(rb"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_KEY = re.compile(r"Credential=([A-Za-z0-9._-]{1,128})/")


def deny(reason: str, detail: str, **more: Any) -> None:
    """Write one line to standard error, where everything of the stand-in goes."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "log": "audit",
        "service": "cloud",
        "event": "cloud",
        "decision": "deny",
        "reason": reason,
        **{name: value for name, value in more.items() if value},
        "detail": detail[:500],
    }
    print(json.dumps(line), file=sys.stderr, flush=True)


def asked(action: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """Who asked for what: the action, and the access key or the role that it is asked with."""
    key = _KEY.search(headers.get("authorization", ""))
    form = parse_qs(body.decode("utf-8", "replace")) if action == "AssumeRoleWithWebIdentity" else {}
    return {
        "action": action,
        "access_key": f"{key[1][:4]}…{key[1][-4:]}" if key else "",
        "role": form.get("RoleArn", [""])[0][:2048],
    }


def error_in(body: bytes) -> tuple[str, str]:
    """Code and message of an answer in AWS's JSON or XML; both empty when it is no error."""
    try:
        told = json.loads(body)
        return str(told["__type"]).rpartition("#")[2], str(told.get("message") or told.get("Message") or "")
    except (ValueError, KeyError, TypeError):
        pass
    found = _XML_ERROR.search(body)
    return (found[1].decode("utf-8", "replace"), found[2].decode("utf-8", "replace")) if found else ("", "")

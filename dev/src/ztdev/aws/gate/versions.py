"""The versions of a secret as Secrets Manager keeps them, where the emulator does not.

* A version can be there without a value: that is how a rotation begins. Reading it finds nothing.
* A version that has a value keeps it. Putting the same value again is no error, another one is.
* A label is on one version at a time.
* RotateSecret notes the function and the schedule, and makes an empty version that is AWSPENDING. On AWS too
  it answers at once; the function is called afterwards, by Secrets Manager. Here whoever plays Secrets
  Manager's scheduler does that, through Lambda.
* DescribeSecret tells when the secret was rotated, and when it is due. AWS counts in hours and days; a `rate`
  may be in minutes and seconds, too, here.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

Answer = tuple[int, dict[str, str], bytes]

_TOKEN = re.compile(r"[A-Za-z0-9-]{32,64}")
_RATE = re.compile(r"rate\(([1-9][0-9]{0,6}) (second|minute|hour|day)s?\)")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}

#: What we add to the emulator's record of a secret: seconds since 1970.
_ROTATED, _COUNTED_FROM = "LastRotatedDate", "_RotationCountedFrom"


class Versions:
    """`module` is the emulator's Secrets Manager, `responses` its makers of answers."""

    def __init__(self, module: Any, responses: Any) -> None:
        self._module = module
        self._responses = responses
        self._actions: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], Answer | None]] = {
            "GetSecretValue": self._get,
            "PutSecretValue": self._put,
            "RotateSecret": self._rotate,
        }

    def answer(self, action: str, body: bytes) -> Answer | None:
        """The answer to a request that is authorized already; None when the emulator is to give it."""
        act = self._actions.get(action)
        if act is None:
            return None
        try:
            request = json.loads(body)
        except ValueError:
            return None  # the emulator says so
        if not isinstance(request, dict):
            return None
        _, secret = self._module._resolve(request.get("SecretId"))
        if secret is None or secret.get("DeletedDate"):
            return None  # the emulator says so
        return act(secret, request)

    def completed(self, action: str, body: bytes, answer: Answer) -> Answer:
        """The emulator's answer, with what it leaves out about rotation."""
        status, _, content = answer
        if status != 200 or action not in ("DescribeSecret", "UpdateSecretVersionStage"):
            return answer
        _, secret = self._module._resolve(json.loads(body)["SecretId"])
        if action == "UpdateSecretVersionStage":
            if json.loads(body).get("VersionStage") == "AWSCURRENT" and secret.get("RotationEnabled"):
                secret[_ROTATED] = time.time()
            return answer
        dates = {_ROTATED: secret.get(_ROTATED), "NextRotationDate": _next_date(secret)}
        described = json.loads(content) | {name: date for name, date in dates.items() if date is not None}
        completed: Answer = self._responses.json_response(described)
        return completed

    def _get(self, secret: dict[str, Any], request: dict[str, Any]) -> Answer | None:
        version_id, stage = request.get("VersionId"), request.get("VersionStage")
        if version_id:
            version = secret["Versions"].get(version_id)
            if version is not None and stage and stage not in version["Stages"]:
                return self._error(
                    "InvalidRequestException", "This VersionId does not have this VersionStage."
                )
        else:
            _, version = self._module._find_stage_version(secret, stage or "AWSCURRENT")
        if version is not None and _value(version) == (None, None):
            return self._error("ResourceNotFoundException", "This version of the secret has no value.")
        return None

    def _put(self, secret: dict[str, Any], request: dict[str, Any]) -> Answer | None:
        token = request.get("ClientRequestToken")
        existing = secret["Versions"].get(token) if token else None
        if existing is not None and _value(existing) != (None, None):
            if _value(existing) != _value(request):
                return self._error("ResourceExistsException", "This version has another value already.")
            return self._json(secret, token, VersionStages=list(existing["Stages"]))
        for stage in request.get("VersionStages", []):
            if stage != "AWSCURRENT":  # that one the emulator moves
                self._module._remove_stage_everywhere(secret, stage, except_version_id=token)
        return None

    def _rotate(self, secret: dict[str, Any], request: dict[str, Any]) -> Answer:
        function = request.get("RotationLambdaARN") or secret.get("RotationLambdaARN")
        if not function:
            return self._error("InvalidRequestException", "The secret has no rotation function.")
        token = request.get("ClientRequestToken") or secrets.token_hex(16)
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            return self._error(
                "InvalidParameterException", "ClientRequestToken must have 32 to 64 characters."
            )
        immediately = request.get("RotateImmediately", True)
        pending, version = self._module._find_stage_version(secret, "AWSPENDING")
        in_progress = version is not None and "AWSCURRENT" not in version["Stages"]
        if immediately and in_progress and pending != token:
            return self._error(
                "InvalidRequestException",
                f"A previous rotation is not complete: version {pending} is pending.",
            )
        secret["RotationLambdaARN"] = function
        secret["RotationRules"] = request.get("RotationRules") or secret.get("RotationRules") or {}
        secret["RotationEnabled"] = True
        secret[_COUNTED_FROM] = time.time()
        if immediately and token not in secret["Versions"]:
            self._module._remove_stage_everywhere(secret, "AWSPENDING")
            secret["Versions"][token] = {
                "SecretString": None,
                "SecretBinary": None,
                "CreatedDate": int(time.time()),
                "Stages": ["AWSPENDING"],
            }
        return self._json(secret, token)

    def _json(self, secret: Mapping[str, Any], version_id: str | None, **more: Any) -> Answer:
        content = {"ARN": secret["ARN"], "Name": secret["Name"], "VersionId": version_id, **more}
        answer: Answer = self._responses.json_response(content)
        return answer

    def _error(self, code: str, message: str) -> Answer:
        answer: Answer = self._responses.error_response_json(code, message, 400)
        return answer


def _next_date(secret: Mapping[str, Any]) -> float | None:
    """When the secret is due, or None when it has no schedule (or one that is not computed here)."""
    rate = _RATE.fullmatch((secret.get("RotationRules") or {}).get("ScheduleExpression", ""))
    counted_from: float | None = secret.get(_COUNTED_FROM)
    if rate is None or counted_from is None:
        return None
    return counted_from + int(rate[1]) * _SECONDS[rate[2]]


def _value(holder: Mapping[str, Any]) -> tuple[Any, Any]:
    return holder.get("SecretString"), holder.get("SecretBinary")

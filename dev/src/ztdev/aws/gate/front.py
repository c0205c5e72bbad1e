"""The front door: which requests reach the emulator at all.

The emulator speaks for some ninety services on one port, and reads the same request in several ways (by
header, path, query, host name). Here everything is refused that the demo does not need, so that what the
emulator authorizes and what it then does cannot be made to differ: one method, one path, no query string, no
virtual hosts, one signature version, and a body in the one protocol that the named service speaks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from . import audit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1024 * 1024


@dataclass(frozen=True)
class Service:
    """How a service is spoken to, and what it may be asked. `actions` None means everything it implements."""

    target_prefix: str | None = None  # JSON protocol: X-Amz-Target; None: query protocol
    actions: frozenset[str] | None = None
    paths: re.Pattern[bytes] | None = None  # REST: where it is spoken to, instead of at /


#: Signing name → service. What is not here does not exist.
SERVICES = {
    # The only way to credentials is a web identity.
    "sts": Service(actions=frozenset({"AssumeRoleWithWebIdentity", "GetCallerIdentity"})),
    "iam": Service(),
    "cloudformation": Service(),
    "kms": Service(target_prefix="TrentService."),
    "secretsmanager": Service(target_prefix="secretsmanager."),
    # Functions come by CloudFormation; here they are called by name, and the call waits for the result.
    "lambda": Service(
        actions=frozenset({"Invoke"}),
        paths=re.compile(rb"/2015-03-31/functions/[A-Za-z0-9_-]{1,64}/invocations"),
    ),
}

#: What may come unsigned, as on AWS.
UNSIGNED = frozenset({"AssumeRoleWithWebIdentity"})

_FORM = "application/x-www-form-urlencoded"
_JSON = ("application/x-amz-json-1.0", "application/x-amz-json-1.1")
_TOKEN_CHARACTERS = r"[A-Za-z0-9._-]{1,128}"  # noqa: S105 - a pattern
_AUTHORIZATION = re.compile(
    rf"AWS4-HMAC-SHA256 Credential=(?P<key>{_TOKEN_CHARACTERS})/(?P<date>\d{{8}})/(?P<region>[a-z0-9-]+)"
    r"/(?P<service>[a-z0-9-]+)/aws4_request, ?SignedHeaders=(?P<headers>[a-z0-9;-]+), ?Signature=[0-9a-f]{64}"
)
_ACTION = re.compile(r"[A-Za-z]{1,64}")


class NotServed(Exception):
    """The request is not passed on."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def admit(
    method: str,
    path: bytes,
    query: bytes,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    hosts: Collection[str],
) -> str:
    """Return the action of a request that the emulator may see.

    `path` is as it came on the wire, undecoded.

    Raises:
        NotServed: for every other request.
    """
    fields = _single_fields(headers)
    if fields.get("host", "").lower() not in hosts:
        raise NotServed(403, "AccessDenied", "This host is not served here.")
    if method != "POST" or query or not _served_path(path):
        raise NotServed(403, "AccessDenied", "Only POST / without a query string is served here.")
    if "content-encoding" in fields or "x-http-method-override" in fields:
        raise NotServed(400, "InvalidRequest", "Encoded bodies and overridden methods are not served here.")
    claimed_hash = fields.get("x-amz-content-sha256")
    if claimed_hash is not None and claimed_hash != hashlib.sha256(body).hexdigest():
        # The emulator would verify the signature over the claimed hash, not over the body.
        raise NotServed(400, "XAmzContentSHA256Mismatch", "The body does not match its hash.")
    authorization = fields.get("authorization")
    if authorization is None:
        action = _form_action(fields, body) if path == b"/" else ""
        if action not in UNSIGNED:
            raise NotServed(403, "MissingAuthenticationToken", "Missing Authentication Token")
        return action
    signature = _AUTHORIZATION.fullmatch(authorization)
    if signature is None:
        raise NotServed(403, "IncompleteSignature", "Only a Signature Version 4 header is served here.")
    signed = set(signature["headers"].split(";"))
    unsigned = {name for name in fields if name.startswith("x-amz-") or name == "host"} - signed
    if unsigned:
        raise NotServed(403, "IncompleteSignature", f"Not signed: {', '.join(sorted(unsigned))}.")
    service = SERVICES.get(signature["service"])
    if service is None:
        raise NotServed(403, "AccessDenied", f"The service {signature['service']} is not served here.")
    if (path == b"/") == (service.paths is not None):
        raise NotServed(403, "AccessDenied", "This path belongs to another service.")
    action = _action(service, fields, body)
    if service.actions is not None and action not in service.actions:
        raise NotServed(403, "AccessDenied", f"The action {action} is not served here.")
    return action


def _served_path(path: bytes) -> bool:
    return path == b"/" or any(s.paths.fullmatch(path) for s in SERVICES.values() if s.paths is not None)


def _action(service: Service, fields: dict[str, str], body: bytes) -> str:
    if service.paths is not None:
        return _invoke_action(fields)
    return _form_action(fields, body) if service.target_prefix is None else _target_action(fields, service)


def _invoke_action(fields: dict[str, str]) -> str:
    if (
        "x-amz-target" in fields
        or fields.get("x-amz-invocation-type", "RequestResponse") != "RequestResponse"
    ):
        raise NotServed(400, "InvalidRequest", "Functions are called here with RequestResponse only.")
    return "Invoke"


def _single_fields(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower()
        if name in fields:
            raise NotServed(400, "InvalidRequest", f"The header {name} came twice.")
        fields[name] = raw_value.decode("latin-1")
    return fields


def _form_action(fields: dict[str, str], body: bytes) -> str:
    if fields.get("content-type", "").partition(";")[0].strip().lower() != _FORM or "x-amz-target" in fields:
        raise NotServed(400, "InvalidRequest", "This service is served in the query protocol only.")
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise NotServed(400, "InvalidRequest", "The body is not a form.") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise NotServed(400, "InvalidRequest", "A parameter came twice.")
    action = form.get("Action", "")
    if not _ACTION.fullmatch(action):
        raise NotServed(400, "InvalidAction", "No action.")
    return action


def _target_action(fields: dict[str, str], service: Service) -> str:
    assert service.target_prefix is not None
    target = fields.get("x-amz-target", "")
    if fields.get("content-type", "").lower() not in _JSON or not target.startswith(service.target_prefix):
        raise NotServed(400, "InvalidRequest", "This service is served in the JSON protocol only.")
    action = target.removeprefix(service.target_prefix)
    if not _ACTION.fullmatch(action):
        raise NotServed(400, "InvalidAction", "No action.")
    return action


class FrontDoor:
    """ASGI application in front of the emulator's. `hosts` are the Host headers that are answered."""

    def __init__(self, emulator: Application, hosts: Collection[str]) -> None:
        self._emulator = emulator
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # The emulator's own start runs scripts from fixed places, starts schedulers for services that are
            # not served, and ends containers it takes for its own: none of it happens here.
            await _answer_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        body: bytes | None = b""
        try:
            body = await _read(receive)
            if body is None:
                return
            action = admit(
                scope["method"],
                scope.get("raw_path") or b"",
                scope["query_string"],
                list(scope["headers"]),
                body,
                self._hosts,
            )
        except NotServed as refusal:
            audit.deny(refusal.code, refusal.message, **audit.asked("", _fields(scope), b""))
            await _refuse(send, refusal, dict(scope["headers"]))
            return
        await self._emulator(scope, _replay(body, receive), _audited(scope, action, body, send))


def _fields(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _audited(scope: Scope, action: str, body: bytes, send: Send) -> Send:
    """Passes the emulator's answer on, and writes down a denial."""
    refused, parts = False, list[bytes]()

    async def sending(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start":
            refused = 400 <= message["status"] < 500
        elif refused:
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                code, detail = audit.error_in(b"".join(parts))
                if code in audit.DENIALS:
                    audit.deny(code, detail, **audit.asked(action, _fields(scope), body))
        await send(message)

    return sending


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None when the client went away."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise NotServed(413, "RequestEntityTooLarge", "The body is too large.")
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, refusal: NotServed, headers: dict[bytes, bytes]) -> None:
    """Answer in the protocol that the client speaks, so that boto3 finds code and message."""
    if b"x-amz-target" in headers:
        kind = b"application/x-amz-json-1.1"
        body = f'{{"__type":"{refusal.code}","message":"{_plain(refusal.message)}"}}'
    else:
        kind = b"text/xml"
        body = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{refusal.code}</Code>"
            f"<Message>{_plain(refusal.message)}</Message></Error></ErrorResponse>"
        )
    content = body.encode()
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [
                (b"content-type", kind),
                (b"content-length", str(len(content)).encode()),
                (b"x-amzn-errortype", refusal.code.encode()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": content})


def _plain(text: str) -> str:
    return re.sub(r"[^\w ,.;:/()-]", "?", text)

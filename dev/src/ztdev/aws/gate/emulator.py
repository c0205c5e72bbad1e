"""The emulator (ministack), with its gaps closed.

ministack evaluates trust policies, identity policies, resource policies and request signatures, which is why
it is used. What it leaves out, and is added or taken away here:

* it accepts any signature on a web identity token, and no audience in an array → `tokens` verifies the token;
* it knows root keys (``test``, any 12 digits) whose signature it does not check → there is no root; the
  administrator is an IAM user whose key is made up at each start;
* it hands out a secret although the role may not use the secret's key → `kms:Decrypt` is evaluated, with the
  condition keys that Secrets Manager sends on AWS;
* it accepts any session duration and answers a made-up subject → checked, and answered truly;
* it draws generated passwords from a predictable generator and ignores what to exclude → drawn anew;
* it overwrites versions of a secret, hands out empty ones, and its RotateSecret promotes a copy of the old
  value → `versions` does what AWS does;
* the keys that it gives to a function can be computed from the function's name → drawn at random;
* it takes a function without code for one that does nothing → its package must be there.

All of it leans on names that ministack does not promise to keep. So its version is pinned, and a start fails
when one of the names is missing.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import importlib
import importlib.metadata
import json
import os
import re
import secrets
import string
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from .front import SERVICES, Application
from .tokens import IssuerKeys, Provider, TokenRefused, VerifiedToken, issuer_of, verify_token
from .versions import Versions

VERSION = "1.5.33"

#: Session durations that AssumeRoleWithWebIdentity takes, in seconds (STS API reference).
MIN_DURATION, DEFAULT_DURATION = 900, 3600

#: The names we replace or call, by module.
_NEEDED = {
    "ministack.app": ("app", "AUTH", "SERVICE_HANDLERS"),
    "ministack.core.iam_evaluator": ("is_root_access_key", "enforce", "resolve_credential"),
    "ministack.core.responses": ("get_account_id", "get_region", "error_response_json", "json_response"),
    "ministack.core.lambda_runtime": ("execution_credentials",),
    "ministack.core.router": ("extract_access_key_id",),
    "ministack.services.iam": (
        "_access_keys",
        "_oidc_providers",
        "_roles",
        "_users",
        "_user_inline_policies",
    ),
    "ministack.services.kms": ("_resolve_key",),
    "ministack.services.lambda_svc": ("execution_credentials", "_fetch_code_from_s3"),
    "ministack.services.secretsmanager": ("_resolve", "_find_stage_version", "_remove_stage_everywhere"),
    "ministack.services.sts": (
        "_error",
        "_p",
        "_web_identity_trust_denied",
        "is_root_access_key",
        "register_session",
    ),
    "ministack.services.cloudformation.provisioners": ("_sm_secret_string",),
}

Answer = tuple[int, dict[str, str], bytes]
Handler = Callable[[str, str, dict[str, str], bytes, dict[str, Any]], Awaitable[Answer]]

_SESSION_NAME = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)


class EmulatorError(Exception):
    """The emulator is not the one this was written for."""


@dataclass(frozen=True)
class Account:
    """The account that the stand-in plays. `id` has twelve digits."""

    id: str
    region: str
    admin_key_id: str
    admin_secret: str = field(repr=False)


def load(
    account: Account, keys: IssuerKeys, packages: Mapping[str, Path], scratch: Path, port: int
) -> Application:
    """Import the emulator once for this process, close its gaps, and return its application. `packages` are
    the functions' packages by ``bucket/key``: they stand for S3.

    Raises:
        EmulatorError: it is another version, or a name we rely on is gone.
    """
    if not re.fullmatch(r"\d{12}", account.id):
        raise EmulatorError("the account ID must have twelve digits")
    if len(account.admin_secret) < 32 or not re.fullmatch(r"AKIA[A-Z2-7]{16}", account.admin_key_id):
        raise EmulatorError("the administrator's key must be AKIA and 16 of A-Z 2-7, its secret 32 or longer")
    _set_environment(account, scratch, port)
    version = importlib.metadata.version("ministack")
    if version != VERSION:
        raise EmulatorError(f"ministack {VERSION} is needed, this is {version}")
    modules = _modules()
    return _Emulator(account, keys, packages, modules).application()


def _set_environment(account: Account, scratch: Path, port: int) -> None:
    """The emulator reads its settings from the environment when it is imported."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MINISTACK_", "LOCALSTACK_"))]:
        del os.environ[name]
    os.environ.update(
        AUTH="true",
        MINISTACK_ACCOUNT_ID=account.id,
        MINISTACK_REGION=account.region,
        GATEWAY_PORT=str(port),
        SERVICES=",".join(SERVICES),
        PERSIST_STATE="0",
        IOT_MTLS_ENABLED="0",
        SFTP_ENABLED="0",
        LOG_LEVEL="WARNING",
        S3_DATA_DIR=str(scratch / "s3"),
        STATE_DIR=str(scratch / "state"),
        TMPDIR=str(scratch),
        # There is none here, so that no container of this machine is ever touched.
        DOCKER_HOST=f"unix://{scratch}/no-docker.sock",
    )


def _modules() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    for name, needed in _NEEDED.items():
        try:
            modules[name.rpartition(".")[2]] = module = importlib.import_module(name)
        except ImportError as error:
            raise EmulatorError(f"ministack has no module {name}: {error}") from error
        missing = [attribute for attribute in needed if not hasattr(module, attribute)]
        if missing:
            raise EmulatorError(f"ministack's {name} has no {', '.join(missing)}")
    if modules["app"].AUTH is not True:
        raise EmulatorError("ministack does not enforce authorization")
    return modules


class _Emulator:
    def __init__(
        self,
        account: Account,
        keys: IssuerKeys,
        packages: Mapping[str, Path],
        modules: Mapping[str, Any],
    ) -> None:
        self._account = account
        self._keys = keys
        self._packages = packages
        self._app = modules["app"]
        self._evaluator = modules["iam_evaluator"]
        self._responses = modules["responses"]
        self._router = modules["router"]
        self._iam = modules["iam"]
        self._kms = modules["kms"]
        self._lambda = modules["lambda_svc"]
        self._lambda_runtime = modules["lambda_runtime"]
        self._secrets = modules["secretsmanager"]
        self._versions = Versions(modules["secretsmanager"], modules["responses"])
        self._sts = modules["sts"]
        self._provisioners = modules["provisioners"]
        self._trust_denied = self._sts._web_identity_trust_denied
        self._enforce = self._evaluator.enforce
        self._verified: contextvars.ContextVar[VerifiedToken | None] = contextvars.ContextVar(
            "verified_token", default=None
        )

    def application(self) -> Application:
        for module in (self._evaluator, self._sts):
            module.is_root_access_key = _nobody_is_root
        self._evaluator.enforce = self._authorize
        self._sts._web_identity_trust_denied = self._check_web_identity
        self._provisioners._sm_secret_string = secret_string
        for module in (self._lambda, self._lambda_runtime):
            module.execution_credentials = self._function_credentials
        self._lambda._fetch_code_from_s3 = self._package
        handlers = self._app.SERVICE_HANDLERS
        if set(handlers) != set(SERVICES):
            raise EmulatorError(f"ministack serves {sorted(handlers)}")
        handlers["sts"] = self._with_issuer_keys(handlers["sts"])
        handlers["secretsmanager"] = self._with_key_permission(handlers["secretsmanager"])
        self._create_administrator()
        return cast(Application, self._app.app)

    def _create_administrator(self) -> None:
        """An IAM user like any other, so that its signature is checked like any other's."""
        account, name = self._account, "stand-in-administrator"
        everything = {
            "Version": "2012-10-17",
            "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"},
        }
        self._iam._users.set_scoped(
            account.id,
            None,
            name,
            {
                "UserName": name,
                "Arn": f"arn:aws:iam::{account.id}:user/{name}",
                "UserId": "AIDA" + secrets.token_hex(8).upper(),
                "CreateDate": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "Path": "/",
                "PermissionsBoundary": "",
                "AttachedPolicies": [],
                "Tags": [],
            },
        )
        self._iam._user_inline_policies.set_scoped(
            account.id, None, name, {"everything": json.dumps(everything)}
        )
        self._iam._access_keys.set_scoped(
            account.id,
            None,
            account.admin_key_id,
            {
                "UserName": name,
                "AccessKeyId": account.admin_key_id,
                "SecretAccessKey": account.admin_secret,
                "Status": "Active",
                "CreateDate": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )

    def _authorize(self, access_key: str, action: str, *arguments: Any, **keywords: Any) -> Any:
        """ministack lets a call without credentials pass as root, and there is no root here."""
        if action == "sts:AssumeRoleWithWebIdentity":
            return None  # the token is what authorizes it
        return self._enforce(access_key, action, *arguments, **keywords)

    # -- Lambda

    def _function_credentials(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Credentials of the function's role, made for one execution environment."""
        role, name = str(config["Role"]).rpartition("/")[2], str(config["FunctionName"])
        key_id = "ASIA" + "".join(secrets.choice(string.ascii_uppercase + "234567") for _ in range(16))
        secret, token = secrets.token_urlsafe(30), secrets.token_urlsafe(60)
        self._sts.register_session(
            key_id,
            {
                "Arn": f"arn:aws:sts::{self._account.id}:assumed-role/{role}/{name}",
                "UserId": f"{role}:{name}",
                "SecretAccessKey": secret,
                "SessionToken": token,
            },
        )
        return {"AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": token}

    def _package(self, bucket: str, key: str, version_id: str | None = None) -> bytes:
        """A function's package. The text of the error is what CloudFormation says."""
        file = self._packages.get(f"{bucket}/{key}")
        if file is None or version_id:
            raise ValueError(f"there is no package {key} in {bucket}")
        return file.read_bytes()

    # -- STS

    def _with_issuer_keys(self, inner: Handler) -> Handler:
        """Fetch the issuer's keys before the handler runs: it is not asynchronous, and must not wait."""

        async def handle(
            method: str, path: str, headers: dict[str, str], body: bytes, query: dict[str, Any]
        ) -> Answer:
            self._verified.set(None)
            form = parse_qs(body.decode("utf-8", "replace"))
            web_identity = form.get("Action") == ["AssumeRoleWithWebIdentity"]
            if web_identity:
                await self._fetch_keys(form)
            status, fields, content = await inner(method, path, headers, body, query)
            if web_identity and status == 200:
                content = self._true_answer(content)
            return status, fields, content

        return handle

    async def _fetch_keys(self, form: Mapping[str, list[str]]) -> None:
        try:
            issuer, key_id = issuer_of(form.get("WebIdentityToken", [""])[0])
            self._provider(issuer, self._account.id)  # no stranger makes us ask anybody anything
        except TokenRefused:
            return  # the check itself says so
        await self._keys.refresh(issuer, key_id)

    def _check_web_identity(self, role_arn: str, params: Mapping[str, Any], use_json: bool) -> Answer | None:
        """Stands for ministack's check of the trust policy: the token first, then that check."""

        def parameter(name: str) -> str:
            return str(self._sts._p(params, name))

        try:
            if use_json:
                raise TokenRefused("InvalidAction", "STS is served in the query protocol only.")
            for unsupported in ("ProviderId", "Policy", "PolicyArns.member.1.arn"):
                if parameter(unsupported):
                    raise TokenRefused("ValidationError", f"The stand-in does not know {unsupported}.")
            if not _SESSION_NAME.fullmatch(parameter("RoleSessionName")):
                raise TokenRefused(
                    "ValidationError", "RoleSessionName must be 2 to 64 of A-Z a-z 0-9 _+=,.@-"
                )
            duration = _duration(parameter("DurationSeconds"))
            checked = self._verify(parameter("WebIdentityToken"), role_arn.split(":")[4])
        except TokenRefused as refusal:
            return cast(Answer, self._sts._error(400, refusal.code, escape(refusal.message), ns="sts"))
        denied = self._trust_denied(
            role_arn, {**params, "WebIdentityToken": [_claims_only(checked)]}, use_json
        )
        if denied:
            return cast(Answer, denied)
        role = self._iam._roles.get_scoped(role_arn.split(":")[4], None, role_arn.rsplit("/", 1)[-1])
        if role is None or role["Arn"] != role_arn:
            return cast(
                Answer,
                self._sts._error(
                    403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity", ns="sts"
                ),
            )
        if duration > int(role.get("MaxSessionDuration", DEFAULT_DURATION)):
            message = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."
            return cast(Answer, self._sts._error(400, "ValidationError", message, ns="sts"))
        self._verified.set(checked)
        return None

    def _verify(self, token: str, account: str) -> VerifiedToken:
        issuer, _ = issuer_of(token)
        provider = self._provider(issuer, account)
        return verify_token(token, provider, self._keys.known(issuer), time.time())

    def _provider(self, issuer: str, account: str) -> Provider:
        """The OIDC provider registered in the account of the role for exactly this issuer."""
        host = issuer.removeprefix("https://")
        arn = f"arn:aws:iam::{account}:oidc-provider/{host}"
        found = self._iam._oidc_providers.get_scoped(account, None, arn) if host != issuer else None
        if found is None or found["Url"] != issuer:
            raise TokenRefused(
                "InvalidIdentityToken", "No OpenIDConnect provider in your account has this issuer."
            )
        return Provider(found["Url"], tuple(found["ClientIDList"]))

    def _true_answer(self, content: bytes) -> bytes:
        """Put the verified subject, audience and provider where ministack writes fixed texts."""
        checked = self._verified.get()
        if checked is None:
            raise EmulatorError("credentials were issued without a verified token")
        provider = f"arn:aws:iam::{self._account.id}:oidc-provider/{checked.issuer.removeprefix('https://')}"
        text = content.decode()
        for name, value in (
            ("SubjectFromWebIdentityToken", checked.subject),
            ("Audience", checked.audience),
            ("Provider", provider),
        ):
            before, opening, rest = text.partition(f"<{name}>")
            _, closing, after = rest.partition(f"</{name}>")
            if not opening or not closing or opening in after:
                raise EmulatorError(f"the answer of STS has not one {name}")
            text = before + opening + escape(value) + closing + after
        return text.encode()

    # -- Secrets Manager

    def _with_key_permission(self, inner: Handler) -> Handler:
        """Ask for the use of the secret's key too, as Secrets Manager does in the caller's name."""

        async def handle(
            method: str, path: str, headers: dict[str, str], body: bytes, query: dict[str, Any]
        ) -> Answer:
            action = headers.get("x-amz-target", "").rpartition(".")[2]
            answer = self._key_denied(action, headers, body) or self._versions.answer(action, body)
            if answer is not None:
                return answer
            inner_answer = await inner(method, path, headers, body, query)
            return self._versions.completed(action, body, inner_answer)

        return handle

    def _key_denied(self, action: str, headers: Mapping[str, str], body: bytes) -> Answer | None:
        uses = _KEY_USES.get(action)
        if uses is None:
            return None
        try:
            request = json.loads(body)
        except ValueError:
            return None  # the handler says so
        if not isinstance(request, dict):
            return None
        _, secret = self._secrets._resolve(request.get("SecretId") or request.get("Name"))
        key_id = request.get("KmsKeyId") or (secret or {}).get("KmsKeyId")
        if not key_id:
            return None
        key = self._kms._resolve_key(key_id)
        if key is None or key["KeyState"] != "Enabled":
            return self._secret_error(
                "DecryptionFailure" if action == "GetSecretValue" else "EncryptionFailure"
            )
        region, account = self._responses.get_region(), self._responses.get_account_id()
        context = {
            "kms:ViaService": f"secretsmanager.{region}.amazonaws.com",
            "kms:CallerAccount": account,
            "kms:EncryptionContext:SecretARN": (secret or {}).get("ARN", "RequestToValidateKeyAccess"),
        }
        access_key = self._router.extract_access_key_id(headers)
        for use in uses:
            if self._enforce(
                access_key, use, "kms", region, resource_arn=key["Arn"], service_context=context
            ):
                return self._secret_error("AccessDeniedException")
        return None

    def _secret_error(self, code: str) -> Answer:
        message = {
            "AccessDeniedException": "Access to KMS is not allowed",
            "DecryptionFailure": "Secrets Manager can't decrypt the protected secret text.",
            "EncryptionFailure": "Secrets Manager can't encrypt the protected secret text.",
        }[code]
        return cast(Answer, self._responses.error_response_json(code, message, 400))


#: Which use of the secret's key each action needs (Secrets Manager User Guide, "Secret encryption and
#: decryption").
_KEY_USES = {
    "GetSecretValue": ("kms:Decrypt",),
    "CreateSecret": ("kms:GenerateDataKey", "kms:Decrypt"),
    "PutSecretValue": ("kms:GenerateDataKey", "kms:Decrypt"),
    "UpdateSecret": ("kms:GenerateDataKey", "kms:Decrypt"),
}


def _nobody_is_root(_access_key_id: str) -> bool:
    return False


def _duration(text: str) -> int:
    if not text:
        return DEFAULT_DURATION
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or int(text) < MIN_DURATION:
        raise TokenRefused("ValidationError", f"DurationSeconds must be at least {MIN_DURATION}.")
    return int(text)


def _claims_only(checked: VerifiedToken) -> str:
    """The checked claims in the form that ministack reads, with nothing else of the token."""

    def part(data: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    claims = {"iss": checked.issuer, "sub": checked.subject, "aud": checked.audience}
    return f"{part({'alg': 'none'})}.{part(claims)}."


def secret_string(properties: Mapping[str, Any]) -> str:
    """The value of an AWS::SecretsManager::Secret: as given, or as its GenerateSecretString says."""
    given = properties.get("SecretString")
    if given:
        return str(given)
    rules = properties.get("GenerateSecretString")
    if not rules:
        return ""
    password = _password(rules)
    template = rules.get("SecretStringTemplate")
    if template is None:
        return password
    value = json.loads(template)
    value[rules["GenerateStringKey"]] = password
    return json.dumps(value)


def _password(rules: Mapping[str, Any]) -> str:
    def set_(name: str) -> bool:
        return str(rules.get(name, False)).lower() == "true"

    kinds = {
        "ExcludeLowercase": string.ascii_lowercase,
        "ExcludeUppercase": string.ascii_uppercase,
        "ExcludeNumbers": string.digits,
        "ExcludePunctuation": string.punctuation,
    }
    excluded = str(rules.get("ExcludeCharacters", ""))
    included = [
        kept
        for rule, characters in kinds.items()
        if not set_(rule) and (kept := "".join(c for c in characters if c not in excluded))
    ]
    alphabet = "".join(included) + (" " if set_("IncludeSpace") else "")
    length = int(rules.get("PasswordLength", 32))
    if not alphabet or length < len(included):
        raise ValueError("GenerateSecretString leaves no password to generate")
    while True:
        password = "".join(secrets.choice(alphabet) for _ in range(length))
        if str(rules.get("RequireEachIncludedType", True)).lower() == "false" or all(
            any(c in kind for c in password) for kind in included
        ):
            return password


async def call(application: Application, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
    """Ask the application in this process: `POST /`. The answer is status and body."""
    messages: list[Mapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    async with asyncio.timeout(10):
        await application(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in messages)
    return int(messages[0]["status"]), content

"""The OIDC issuer of the one-machine stack, and the projected token files of its service accounts.

On EKS the cluster is the issuer and the kubelet writes the files. Here `OidcIssuer` serves discovery and keys
over TLS (OpenID Connect Discovery 1.0) and signs tokens like those of Kubernetes, and `TokenFile` keeps one
file fresh the way the kubelet does. The signing key lives in memory only: after a restart, old tokens are
worthless.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import random
import shutil
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from joserfc import jwt
from joserfc.jwk import RSAKey

#: The issuer's logical address. It stays the same whatever port the issuer listens on, so that the provider,
#: the trust policies and the tokens do: the gate is told where it is reached, like by an entry in a hosts
#: file.
ISSUER = "https://oidc.zt.example/local"

#: The audience of tokens for STS.
AUDIENCE = "sts.amazonaws.com"

#: The shortest lifetime that Kubernetes gives a projected token, in seconds.
MIN_LIFETIME = 600

#: The kubelet refreshes a token when this part of its life is over.
REFRESH_AT = 0.8

_REQUEST_TIMEOUT = 5.0
_MAX_REQUEST = 16 * 1024
# The stack runs beside tests: the state of the `random` module is theirs (Hypothesis watches it).
_RANDOM = random.SystemRandom()


@dataclass(frozen=True)
class Issuer:
    """Whose tokens the local AWS takes.

    `url` is the issuer as tokens name it, `ca_file` (PEM) the authority of its certificate, and `resolve`
    where each ``host:port`` of it is reached.
    """

    url: str
    ca_file: Path
    resolve: Mapping[str, str]

    @property
    def host(self) -> str:
        """The issuer as IAM and trust policies write it: without `https://`."""
        return self.url.removeprefix("https://")


@dataclass(frozen=True)
class ServerTls:
    """How the issuer proves who it is: a context with its host's certificate, and the authority's file."""

    context: ssl.SSLContext
    ca_file: Path


class OidcIssuer:
    """An OIDC issuer for service account tokens, served over https on one address of this machine.

    Args:
        directory: where the authority's certificate is written (`issuer-ca.pem`).
        url: the issuer as tokens name it; its host is what the certificate is for.
        tls: a certificate from somebody else's authority; by default it has one of its own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        url: str = ISSUER,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ServerTls | None = None,
    ) -> None:
        parts = urlsplit(url)
        if (
            parts.scheme != "https"
            or not parts.hostname
            or parts.query
            or parts.fragment
            or url.endswith("/")
        ):
            raise ValueError("an issuer is an https URL without query, fragment and final slash")
        self.url = url
        self._directory = directory
        self._name = parts.hostname
        self._port_in_url = parts.port or 443
        self._path = parts.path
        self._host, self._port = host, port
        self._tls = tls
        self._key: RSAKey | None = None
        self._old_keys: list[tuple[RSAKey, float]] = []
        self._longest = 0.0
        self._server: asyncio.Server | None = None

    @property
    def host(self) -> str:
        """The issuer as IAM and trust policies write it: without `https://`."""
        return self.url.removeprefix("https://")

    @property
    def ca_file(self) -> Path:
        """The authority of the issuer's certificate (PEM). Known once it was started."""
        if self._tls is None:
            raise RuntimeError("the issuer was not started")
        return self._tls.ca_file

    @property
    def resolve(self) -> dict[str, str]:
        """Where the issuer's host is reached: for the gate's configuration."""
        return {f"{self._name}:{self._port_in_url}": f"{self._host}:{self._port}"}

    async def start(self) -> None:
        """Make the keys and serve.

        Raises:
            OSError: the port is taken, or the directory cannot be written.
        """
        if self._tls is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._tls = _own_tls(self._name, self._directory / "issuer-ca.pem")
        await self.rotate_key()
        self._server = await asyncio.start_server(self._answer, self._host, self._port, ssl=self._tls.context)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop serving and forget the keys."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        self._key, self._old_keys = None, []

    async def __aenter__(self) -> OidcIssuer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def rotate_key(self, *, keep_old: bool = True) -> None:
        """Sign with a new key from now on.

        The old one stays published until the last token it signed has expired; with `keep_old` False it is
        withdrawn at once, as after a theft.
        """
        new = await asyncio.to_thread(_signing_key)
        if self._key is not None and keep_old:
            self._old_keys.append((self._key, time.time() + self._longest))
        if not keep_old:
            self._old_keys = []
        self._key = new

    def token(
        self, namespace: str, service_account: str, *, audience: str = AUDIENCE, lifetime: float = 3600
    ) -> str:
        """A token as Kubernetes projects it for this service account. `lifetime` is in seconds."""
        self._longest = max(self._longest, lifetime)
        now = int(time.time())
        account_uid = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.url}/{namespace}/{service_account}")
        claims: dict[str, Any] = {
            "aud": [audience],
            "exp": now + int(lifetime),
            "iat": now,
            "iss": self.url,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": service_account, "uid": str(account_uid)},
            },
            "nbf": now,
            "sub": f"system:serviceaccount:{namespace}:{service_account}",
        }
        return self.sign(claims)

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Sign any claims with the issuer's key: tokens to be refused for what they say."""
        if self._key is None:
            raise RuntimeError("the issuer was not started")
        return jwt.encode({"alg": "RS256", "kid": self._key.kid}, dict(claims), self._key)

    # -- what it serves

    def _documents(self) -> dict[str, Any]:
        """Paths and what is found there: OpenID Connect Discovery 1.0 §3 and §4, RFC 7517 §5."""
        now = time.time()
        self._old_keys = [(key, until) for key, until in self._old_keys if until > now]
        keys = ([self._key] if self._key else []) + [key for key, _ in self._old_keys]
        return {
            f"{self._path}/.well-known/openid-configuration": {
                "issuer": self.url,
                "jwks_uri": f"{self.url}/keys",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            },
            f"{self._path}/keys": {
                "keys": [key.as_dict(private=False) | {"use": "sig", "alg": "RS256"} for key in keys]
            },
        }

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer, closed (RFC 9112 §9.6)."""
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
                path = rest.partition(b" ")[0].decode("latin-1")
                document = self._documents().get(path) if method == b"GET" else None
                status = "200 OK" if document is not None else "404 Not Found"
                body = json.dumps(document if document is not None else {"error": "not found"}).encode()
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                    "Cache-Control: no-store\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass  # not a client worth an answer
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_REQUEST_TIMEOUT):
                    await writer.wait_closed()


def _signing_key() -> RSAKey:
    key = RSAKey.generate_key(2048, {"use": "sig", "alg": "RS256"}, private=True)
    key.ensure_kid()
    return key


def _own_tls(name: str, ca_file: Path) -> ServerTls:
    """A new authority that may speak for this host only, and the host's certificate from it."""
    now = datetime.now(UTC) - timedelta(minutes=5)
    end = now + timedelta(days=365)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {name}")])
    ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    certificate_authority = (
        x509.CertificateBuilder()
        .subject_name(ca_name)
        .issuer_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.NameConstraints([_general_name(name, constraint=True)], None), critical=True)
        .add_extension(ca_identifier, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([_general_name(name)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.memfd_create("issuer-key", os.MFD_CLOEXEC)
    try:  # the key never has a name in a file system
        with open(descriptor, "wb", closefd=False) as file:
            file.write(private + leaf.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    temporary = ca_file.with_name(f".{ca_file.name}.{os.getpid()}")
    temporary.write_bytes(certificate_authority.public_bytes(serialization.Encoding.PEM))
    temporary.replace(ca_file)
    return ServerTls(context, ca_file)


def _general_name(name: str, *, constraint: bool = False) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return x509.DNSName(name)
    return x509.IPAddress(ipaddress.ip_network(address) if constraint else address)


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


class TokenFile:
    """One projected service account token: the file that AWS_WEB_IDENTITY_TOKEN_FILE names.

    As the kubelet does, the token is written to a new directory, and the link `..data` is exchanged for one
    to it: a reader sees the old token or the new one, never half of one. The directories are 0700 and the
    token 0600, so only this user reads it.

    Args:
        directory: of this service account alone; made when it is missing.
        lifetime: of each token, in seconds. It is replaced when 80 % of that is over.
        on_error: told when a token cannot be written (it is tried again).
    """

    def __init__(
        self,
        directory: Path,
        issuer: OidcIssuer,
        *,
        service_account: str,
        namespace: str = "zt-demo",
        audience: str = AUDIENCE,
        lifetime: float = 3600,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self.path = directory / "token"
        self.service_account = service_account
        self._issuer = issuer
        self._namespace = namespace
        self._audience = audience
        self._lifetime = lifetime
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Write the first token and keep it fresh."""
        self.remove()
        self.write()
        self._task = asyncio.create_task(self._keep_fresh(), name=f"token-{self.service_account}")

    async def stop(self) -> None:
        """Stop, and leave no token behind."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self.remove()

    async def __aenter__(self) -> TokenFile:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def write(self, token: str | None = None) -> None:
        """Replace the token in one step, by a new one or by the given text."""
        if token is None:
            token = self._issuer.token(
                self._namespace, self.service_account, audience=self._audience, lifetime=self._lifetime
            )
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        stamp = datetime.now(UTC).strftime("..%Y_%m_%d_%H_%M_%S.") + uuid.uuid4().hex[:10]
        new = self.directory / stamp
        new.mkdir(mode=0o700)
        descriptor = os.open(new / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        data, temporary = self.directory / "..data", self.directory / "..data_tmp"
        old = os.readlink(data) if data.is_symlink() else None
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(stamp)
        temporary.rename(data)
        if not self.path.is_symlink():
            self.path.symlink_to("..data/token")
        if old is not None:
            shutil.rmtree(self.directory / old, ignore_errors=True)

    def remove(self) -> None:
        """Remove the token and all that is left of earlier ones."""
        for entry in (self.path, self.directory / "..data", self.directory / "..data_tmp"):
            entry.unlink(missing_ok=True)
        for entry in self.directory.glob("..[0-9]*"):
            shutil.rmtree(entry, ignore_errors=True)

    async def _keep_fresh(self) -> None:
        delay = self._next()
        while True:
            await asyncio.sleep(delay)
            try:
                self.write()
            except OSError as error:
                self._on_error(f"the token of {self.service_account} cannot be written: {error}")
                delay = min(5.0, self._lifetime / 20)
            else:
                delay = self._next()

    def _next(self) -> float:
        """A little earlier than 80 %, and not all files at the same moment."""
        return self._lifetime * (REFRESH_AT - _RANDOM.uniform(0, 0.05))

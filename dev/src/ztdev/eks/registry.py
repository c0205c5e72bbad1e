"""The images that run, in the account's own registry: pushed once, signed, with a signed bill of materials.

Nodes have no way to the internet, so images of others are copied there, too.
"""

from __future__ import annotations

import base64
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import yaml

from ztdev.errors import StackError
from ztdev.images import images, tool, write_bill
from ztdev.kubernetes.kubectl import run

from .account import IMAGES
from .settings import PREFIX, ROOT, Settings

if TYPE_CHECKING:
    from mypy_boto3_ecr import ECRClient

Say = Callable[[str], None]

#: Which of the kustomizations says which release of others' images runs.
_RELEASES = tuple(ROOT / "k8s" / each for each in ("spire", "spire/csi", "kyverno", "overlays/eks-door"))

#: No public log: nobody else has to know what is built here.
_SIGN = ("--use-signing-config=false", "--tlog-upload=false", "--yes")
_VERIFY = ("--insecure-ignore-tlog=true", "--output", "text")


@dataclass(frozen=True)
class Image:
    """An image of the Docker engine here, and where it goes.

    Attributes:
        source: what the engine calls it.
        repository: after the registry's prefix.
        tag: what it gets there: its content's id, for others' with their release before it.
        content: the engine's id for its content.
    """

    source: str
    repository: str
    tag: str
    content: str


def release(name: str) -> str:
    """What the engine calls the image that the manifests call `name`."""
    ours = {tag.rpartition(":")[0]: tag for tag in images().values()}
    if name in ours:
        return ours[name]
    for folder in _RELEASES:
        for each in yaml.safe_load((folder / "kustomization.yaml").read_text()).get("images", []):
            if each["name"] == name:
                return f"{name}:{each['newTag']}"
    raise StackError(f"No kustomization says which release of {name} runs.")


class Registry:
    """The account's registry.

    Args:
        prefix: what the names of images start with: ``HOST/zt-demo/``.
        engine: the architecture that others' images are wanted for.
    """

    def __init__(
        self, session: boto3.Session, settings: Settings, prefix: str, engine: str, say: Say
    ) -> None:
        self._client: ECRClient = session.client("ecr")
        self._settings = settings
        self._prefix = prefix
        self._engine = engine
        self._say = say
        self._environment = credentials(session)

    def bring(self) -> dict[str, str]:
        """Build, push, sign and attest whatever is not there yet: the digest of each repository's image."""
        self._say("building our images")
        run("docker", "compose", "build", "--quiet", timeout=3600)
        found = [self._here(name, repository) for name, repository in IMAGES.items()]
        with self._logged_in(), ThreadPoolExecutor(2) as pool:
            return dict(zip(IMAGES.values(), pool.map(self._bring, found), strict=True))

    def _here(self, name: str, repository: str) -> Image:
        source = release(name)
        inspect = ("docker", "image", "inspect", "--format", "{{.Architecture}} {{.Id}}", source)
        try:
            architecture, content = run(*inspect).split()
        except StackError:  # it is not here
            architecture = ""
        if architecture != self._engine:
            self._say(f"pulling {source}")
            run("docker", "pull", "--quiet", "--platform", f"linux/{self._engine}", source, timeout=1800)
            _, content = run(*inspect).split()
        short = content.partition(":")[2][:12]
        version = source.rpartition(":")[2]
        return Image(source, repository, short if version == "local" else f"{version}-{short}", content)

    def _bring(self, image: Image) -> str:
        digest = self._digest(image)
        name = f"{self._prefix}{image.repository}"
        if digest is None:
            self._say(f"pushing {image.repository}:{image.tag}")
            run("docker", "tag", image.source, f"{name}:{image.tag}")
            run("docker", "push", "--quiet", f"{name}:{image.tag}", timeout=3600)
            digest = self._digest(image)
            if digest is None:
                raise StackError(f"{name}:{image.tag} was pushed, and is not in the registry.")
        self._sign(f"{name}@{digest}", image)
        return digest

    def _digest(self, image: Image) -> str | None:
        repository = f"{PREFIX}/{image.repository}"
        try:
            found = self._client.describe_images(
                repositoryName=repository, imageIds=[{"imageTag": image.tag}]
            )
        except self._client.exceptions.ImageNotFoundException:
            return None
        return found["imageDetails"][0]["imageDigest"]

    def _sign(self, name: str, image: Image) -> None:
        """The image, and its bill of materials. What has a signature of our key is left as it is."""
        key = ("--key", self._settings.signer)
        if not self._cosign_agrees("verify", *key, name):
            self._say(f"signing {image.repository}")
            self._cosign("sign", *_SIGN, *key, name)
        if not self._cosign_agrees("verify-attestation", *key, "--type", "cyclonedx", name):
            self._say(f"attesting what is in {image.repository}")
            with tempfile.TemporaryDirectory(prefix="sbom-") as folder:
                bill = Path(folder) / "bill.cdx.json"
                write_bill(image.content, bill)
                predicate = ("--predicate", str(bill), "--type", "cyclonedx")
                self._cosign("attest", *_SIGN, *key, *predicate, name)

    def _cosign_agrees(self, command: str, *arguments: str) -> bool:
        try:
            self._cosign(command, *_VERIFY, *arguments)
        except StackError:
            return False
        return True

    def _cosign(self, command: str, *arguments: str) -> str:
        """It asks for a password where its key has one, unless COSIGN_PASSWORD says it."""
        done = subprocess.run(
            (tool("cosign"), command, *arguments),
            env=os.environ | self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode != 0:
            raise StackError(f"cosign {command}: {done.stderr.strip()[-1500:]}")
        return done.stdout

    @contextmanager
    def _logged_in(self) -> Iterator[None]:
        """The engine may push, and cosign too, until this is over."""
        host = self._prefix.partition("/")[0]
        told = self._client.get_authorization_token()["authorizationData"][0]["authorizationToken"]
        user, _, password = base64.b64decode(told).decode().partition(":")
        run("docker", "login", "--username", user, "--password-stdin", host, given=password)
        try:
            yield
        finally:
            run("docker", "logout", host)

    def public_key(self) -> str:
        """The key that signatures are checked by (PEM)."""
        return self._cosign("public-key", "--key", self._settings.signer)


def credentials(session: boto3.Session) -> Mapping[str, str]:
    """The session's region and credentials, as variables for another program."""
    found = session.get_credentials()
    frozen = found.get_frozen_credentials() if found is not None else None
    environment = {
        "AWS_REGION": session.region_name,
        "AWS_ACCESS_KEY_ID": frozen and frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen and frozen.secret_key,
        "AWS_SESSION_TOKEN": frozen and frozen.token,
    }
    return {name: value for name, value in environment.items() if value}

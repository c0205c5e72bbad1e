"""Component `oidc-discovery`: a JWT-SVID is known by the keys that it tells to whoever asks."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from joserfc import jwt
from joserfc.errors import BadSignatureError
from joserfc.jwk import ECKey, KeySet

from tests.k8s.cluster import PINNED, ROOT, forwarded, load, rolled_out
from ztdev.inside import FETCH_JWT_SVID
from ztdev.kubernetes.kubectl import apply, kubectl, python, rendered, run
from ztdev.postgres import make_server_tls

COMPONENT = ROOT / "k8s" / "components" / "oidc-discovery"
IMAGE = "ghcr.io/spiffe/oidc-discovery-provider"
HOST = "oidc.zt.example"
HERE = ("--namespace", "zt-demo")

Ask = Callable[[str], Any]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks the provider for a path, by its name and over TLS, as somebody who is no workload."""
    local = "zt-demo/oidc-discovery-provider:1.13.3"  # where images of this namespace come from here
    build = ("docker", "build", "--quiet", "--file", "tests/k8s/oidc-discovery.Dockerfile")
    run(*build, "--tag", local, ".tools/spire")
    name, _, digest = load(local).partition("@")
    folder = tmp_path_factory.mktemp("oidc")
    pinned = yaml.safe_load((PINNED / "kustomization.yaml").read_text())
    pinned["resources"] = [os.path.relpath((PINNED / each).resolve(), folder) for each in pinned["resources"]]
    pinned["components"] = [os.path.relpath(COMPONENT, folder)]
    pinned["images"].append({"name": IMAGE, "newName": name, "digest": digest})
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(pinned))
    ours = [each for each in rendered(folder) if each["metadata"]["name"].startswith("oidc-discovery")]
    assert len(ours) == 6
    tls = make_server_tls((HOST,), name="oidc")
    certificate = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "oidc-discovery-tls", "namespace": "zt-demo"},
        "stringData": {"tls.crt": tls.certificate.decode(), "tls.key": tls.key.decode()},
    }
    context = ssl.create_default_context(cadata=tls.authorities.decode())
    try:
        apply(certificate, *ours)
        rolled_out("zt-demo", "deployment/oidc-discovery")
        with (
            forwarded("oidc-discovery", 443) as port,
            httpx.Client(verify=context, trust_env=False) as client,
        ):

            def get(path: str) -> Any:
                asked = client.build_request("GET", f"https://127.0.0.1:{port}{path}", headers={"Host": HOST})
                asked.extensions["sni_hostname"] = HOST
                return client.send(asked).raise_for_status().json()

            yield get
    finally:
        kinds = "deployment,service,networkpolicy,poddisruptionbudget,serviceaccount"
        kubectl(*HERE, "delete", "--ignore-not-found", "--wait=false", kinds, "oidc-discovery")
        kubectl(*HERE, "delete", "--ignore-not-found", "secret", "oidc-discovery-tls")


def test_a_jwt_svid_is_known_by_the_keys_that_discovery_tells(ask: Ask) -> None:
    told = ask("/.well-known/openid-configuration")
    assert told["issuer"] == f"https://{HOST}"
    keys = KeySet.import_key_set(ask("/keys"))
    token = python("zt-demo", "deployment/orders", FETCH_JWT_SVID, "somebody")
    claims = jwt.decode(token, keys, algorithms=["ES256", "RS256"]).claims
    assert claims["iss"] == told["issuer"]
    assert claims["sub"] == "spiffe://zt.example/ns/zt-demo/sa/orders"
    assert claims["aud"] in ("somebody", ["somebody"])


def test_a_token_of_another_is_not(ask: Ask) -> None:
    """With all that one can copy: the header, with the key's id, and the claims."""
    keys = KeySet.import_key_set(ask("/keys"))
    token = python("zt-demo", "deployment/orders", FETCH_JWT_SVID, "somebody")
    genuine = jwt.decode(token, keys, algorithms=["ES256", "RS256"])
    forged = jwt.encode({**genuine.header, "alg": "ES256"}, genuine.claims, ECKey.generate_key("P-256"))
    with pytest.raises(BadSignatureError):
        jwt.decode(forged, keys, algorithms=["ES256", "RS256"])

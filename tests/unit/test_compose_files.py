"""docker-compose.yml, the Dockerfiles and docs/compose.md say the same, without an engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ztdev.containers.certificates import ISSUER_HOST, NODE_NAME
from ztdev.containers.cloud import SPIRE
from ztdev.containers.registrar import Entry, wanted
from ztdev.options import SERVICES, spiffe_id

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
DOCKERFILES = sorted([*ROOT.glob("services/*/Dockerfile"), ROOT / "dev" / "Dockerfile"])
DOCUMENT = (ROOT / "docs" / "compose.md").read_text()


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_an_image_is_made_by_the_locked_uv_of_every_manifest(file: Path) -> None:
    locked = re.search(r'bootstrap = \["uv==(\S+)"\]', (ROOT / "pyproject.toml").read_text())
    assert locked is not None
    text = file.read_text()
    assert re.findall(r"uv==(\S+)", text) == [locked[1]]
    manifests = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/pyproject.toml")}
    assert {*re.findall(r"COPY (\S+)/pyproject\.toml", text)} == manifests | {"dev"}
    assert "# syntax=" not in text


def test_the_services_images_differ_in_name_and_port_alone() -> None:
    """A Dockerfile cannot include another one: what is the same in all three is kept so here."""

    def general(service: str) -> str:
        text = (ROOT / "services" / service / "Dockerfile").read_text()
        manifests = "".join(line for line in text.splitlines(True) if "/pyproject.toml" in line)
        lines = "".join(line for line in text.splitlines(True) if "/pyproject.toml" not in line)
        return manifests + lines.replace(service, "NAME").replace("8080", "8443")

    assert len({general(service) for service in SERVICES}) == 1


def test_every_setting_is_documented_and_no_other() -> None:
    named = set(re.findall(r"\$\{([A-Z_]+):-", TEXT)) - {"COMPOSE_PROJECT_NAME", "DOCKER_SOCKET"}
    named = {name for name in named if not name.endswith("_IMAGE")}
    paragraph = next(part for part in DOCUMENT.split("\n\n") if part.startswith("Settings are variables"))
    assert set(re.findall(r"`([A-Z_]+)`", paragraph)) == named


def test_every_image_has_a_tag_and_none_is_latest() -> None:
    for service in COMPOSE["services"].values():
        default = re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-(.+)\}", service["image"])
        assert default, "a variable can pin it to its content"
        name, _, tag = default[1].rpartition(":")
        assert name
        assert tag not in ("", "latest")
        assert ("build" not in service) or service["pull_policy"] == "never"


def test_two_that_have_no_business_share_no_network() -> None:
    members: dict[str, set[str]] = {}
    for name, service in COMPOSE["services"].items():
        for network in service.get("networks", ()):
            members.setdefault(network, set()).add(name)
    assert members == {
        "edge": {"frontend"},
        "frontend-orders": {"frontend", "orders"},
        "orders-payments": {"orders", "payments"},
        "oidc": {"cloud", "oidc"},
        "orders-db": {"orders", "orders-migrate", "postgres", "cloud"},
        "payments-db": {"payments", "payments-migrate", "postgres", "cloud"},
        "aws": {"orders", "orders-migrate", "payments", "payments-migrate", "cloud"},
        "identity": {"spire-server", "spire-agent"},
        **{f"{service}-observe": {service, "prometheus", "jaeger"} for service in SERVICES},
        "viewers": {"prometheus", "jaeger", "grafana"},
    }
    published = {name for name, network in COMPOSE["networks"].items() if not network.get("internal")}
    assert published == {"edge", "viewers"}


def test_who_has_the_agents_socket_has_an_entry_for_the_image_that_it_runs() -> None:
    told = dict(
        line.split() for line in COMPOSE["services"]["registrar"]["environment"]["WORKLOADS"].splitlines()
    )
    assert told == {
        name: service["image"]
        for name, service in COMPOSE["services"].items()
        if "workload-api:/run/spire:ro" in service.get("volumes", ())
    }
    assert set(SERVICES) < set(told)


def test_a_service_expects_to_be_whom_its_entry_says() -> None:
    for name, service in COMPOSE["services"].items():
        expected = service.get("environment", {}).get("SPIFFE_ID")
        assert expected in (None, spiffe_id(name))


def test_the_issuer_is_the_same_for_spire_its_provider_and_aws() -> None:
    server, provider = (
        (ROOT / "dev/compose/spire" / f"{name}.conf").read_text() for name in ("server", "oidc")
    )
    assert f'jwt_issuer = "{SPIRE.url}"' in server
    assert f'domains = ["{ISSUER_HOST}"]' in provider
    assert COMPOSE["services"]["oidc"]["networks"] == {"oidc": {"aliases": [ISSUER_HOST]}}


def test_an_entry_is_known_again_as_the_server_tells_it() -> None:
    node, payments = wanted("zt-demo", {"payments": "zt-demo/payments:local"})
    told = {
        "id": "payments",
        "spiffe_id": {"trust_domain": "zt.example", "path": "/ns/zt-demo/sa/payments"},
        "parent_id": {"trust_domain": "zt.example", "path": "/node"},
        "selectors": [
            {"type": "docker", "value": "label:com.docker.compose.oneoff:False"},
            {"type": "docker", "value": "image_id:zt-demo/payments:local"},
            {"type": "docker", "value": "label:com.docker.compose.service:payments"},
            {"type": "docker", "value": "label:com.docker.compose.project:zt-demo"},
        ],
        "x509_svid_ttl": 0,
    }
    assert Entry.from_json(told) == payments
    assert payments.spiffe_id == spiffe_id("payments")
    assert node.selectors == {f"x509pop:subject:cn:{NODE_NAME}"}
    assert Entry.from_json(told | {"selectors": told["selectors"][1:]}) != payments  # type: ignore[index]


def test_every_alert_names_a_part_of_the_runbook_that_is_there() -> None:
    rules = yaml.safe_load((ROOT / "dev" / "compose" / "observe" / "alerts.yml").read_text())["groups"]
    text = (ROOT / "libs" / "ztmtls" / "docs" / "operations.md").read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    named = {rule["annotations"]["runbook"] for group in rules for rule in group["rules"]}
    assert named
    assert named <= {f"operations.md#{anchor}" for anchor in anchors}

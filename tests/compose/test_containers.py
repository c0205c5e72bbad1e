"""How each container is held: as `docker inspect` says, and as it is felt inside."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.compose.project import ROOT, TOOLS, Project, docker

#: Those of a profile have tests of their own.
SERVICES: dict[str, Any] = {
    name: service
    for name, service in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].items()
    if "profiles" not in service
}

#: They end when their work is done.
ONCE = {
    "node-certificate",
    "database-certificate",
    "issuer-certificate",
    "orders-migrate",
    "payments-migrate",
}

#: The agent asks the engine who calls, so it sees all processes and is root, without capabilities; the other
#: one makes the key that root's agent reads.
ROOT_USERS = {"spire-agent", "node-certificate"}

CHAIN = ("frontend", "orders", "payments")


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_do_little(project: Project, service: str) -> None:
    held(project, service)


def held(project: Project, service: str) -> None:
    """Its container is held as docs/compose.md says, and well, or ended as it should."""
    found = project.container(service)
    host, config = found["HostConfig"], found["Config"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    # The engine adds the other one by itself where the process namespace is shared.
    assert set(host["SecurityOpt"]) - {"label=disable"} == {"no-new-privileges:true"}
    assert host["Privileged"] is False
    assert host["MemorySwap"] == host["Memory"] > 0
    assert host["NanoCpus"] > 0
    assert 0 < host["PidsLimit"] <= 256
    assert host["NetworkMode"] != "host"
    assert (config["User"] in ("0:0", "")) == (service in ROOT_USERS), config["User"]
    assert host["PidMode"] == ("host" if service == "spire-agent" else "")
    assert host["IpcMode"] == "private"
    assert re.search(r":\S*\d|:local$", config["Image"]), "the tag is pinned"
    engine = [mount["Source"] for mount in found["Mounts"] if mount["Source"].endswith("docker.sock")]
    assert bool(engine) == (service == "spire-agent")
    state = found["State"]
    if service in ONCE:
        assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    else:
        assert state["Health"]["Status"] == "healthy"


def test_only_the_page_is_published_and_on_this_machine_alone(project: Project) -> None:
    published = {
        service: found["HostConfig"]["PortBindings"]
        for service in SERVICES
        if (found := project.container(service))["HostConfig"]["PortBindings"]
    }
    assert published == {"frontend": {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(project.port)}]}}


FELT = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status") if ":\\t" in line)
assert status["NoNewPrivs"].strip() == "1"
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
assert os.getuid() == 10001
open("/tmp/scratch", "w").close()
for attempt in (
    lambda: open("/scratch", "w"),
    lambda: open("/opt/zt/scratch", "w"),
    lambda: os.setuid(0),
    lambda: os.chroot("/tmp"),
    lambda: open("/proc/kmsg"),
    lambda: open("/var/run/docker.sock"),
    lambda: open("/srv/spire/socket/api.sock"),
):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(f"not refused: {attempt}")
print("held")
"""


@pytest.mark.parametrize("service", CHAIN)
def test_a_service_that_was_broken_into_gets_no_further(project: Project, service: str) -> None:
    assert project.python(service, FELT).strip() == "held"


ASK = ("-m", "ztmtls", "show", "--endpoint", "unix:/run/spire/agent.sock", "--timeout", "8")


def ask(project: Project, image: str, **labels: str) -> tuple[int, str]:
    """A container that mounts the agent's socket asks for its identities."""
    named = [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
    done = subprocess.run(
        [
            *("docker", "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", *named),
            *("--volume", f"{project.name}_workload-api:/run/spire:ro"),
            *("--entrypoint", "/opt/zt/bin/python", image, *ASK),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_container_that_nobody_registered_gets_no_identity(project: Project) -> None:
    right = {
        "com.docker.compose.project": project.name,
        "com.docker.compose.service": "payments",
        "com.docker.compose.oneoff": "False",
    }
    status, said = ask(project, "zt-demo/payments:local", **right)
    assert status == 0, said
    assert "spiffe://zt.example/ns/zt-demo/sa/payments" in said

    for image, labels in (
        ("zt-demo/payments:local", {}),  # with the labels of its image, which compose has built
        ("zt-demo/payments:local", right | {"com.docker.compose.oneoff": "True"}),
        ("zt-demo/payments:local", right | {"com.docker.compose.service": "stranger"}),
        ("zt-demo/payments:local", right | {"com.docker.compose.project": "another"}),
        ("zt-demo/orders:local", right),  # the right name on another image
    ):
        status, said = ask(project, image, **labels)
        assert status != 0, (image, labels, said)
        assert "no identity issued" in said or "denied" in said.lower(), said


def test_the_tools_image_is_here(project: Project) -> None:
    assert docker("image", "inspect", "--format", "{{.Config.User}}", TOOLS).strip() == "10001:10001"

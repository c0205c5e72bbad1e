"""What docs/cli.md shows is what the commands print."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.cli_process import CONSOLE_SCRIPT, REPOSITORY, environment, ztmtls
from ztmtls.testing import CertificateAuthority, WorkloadApi

DOCUMENT = (REPOSITORY / "libs" / "ztmtls" / "docs" / "cli.md").read_text()
EXAMPLES = re.findall(r"<!-- example(?:: (\w+))? -->\n```console\n\$ (ztmtls .*)\n((?:.*\n)*?)```", DOCUMENT)

# What is another each time: serials and names of authorities, times, the socket, and who runs this where.
VARIABLE = [
    (r"\b[0-9a-f]{16,40}\b", "<hex>"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "<time>"),
    (r"in \d+ \w+( \d+ \w+)?", "in <while>"),
    (r"/(run/spire/agent|tmp/[\w-]+/\w+)\.sock", "<socket>"),
    (r"\(srw\S+ of [\w-]+:[\w-]+\)", "<mode>"),
    (r"pid \d+", "pid <n>"),
    (r"unix:([ug]id):\d+", r"unix:\1:<n>"),
    (r"unix:path:\S+", "unix:path:<program>."),
    (r"(k8s:\S+ )+", ""),
]


def without_what_varies(text: str) -> str:
    for pattern, placeholder in VARIABLE:
        text = re.sub(pattern, placeholder, text)
    return text


def run(command: str, **variables: str) -> str:
    done = subprocess.run(
        [CONSOLE_SCRIPT, *shlex.split(command)[1:]],
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("workload", "command", "printed"), EXAMPLES, ids=[e[1][:40] for e in EXAMPLES])
async def test_example_prints_what_is_shown(workload: str, command: str, printed: str) -> None:
    async with WorkloadApi() as api:
        orders = await api.add_workload(
            "orders",
            "spiffe://zt.example/ns/zt-demo/sa/orders",
            ca=CertificateAuthority("zt.example"),
            federates_with=[CertificateAuthority("partner.example")],
        )
        if workload != "denied":
            orders.allow(uid=os.geteuid())

        found = await asyncio.to_thread(run, command, SPIFFE_ENDPOINT_SOCKET=orders.endpoint)

    assert without_what_varies(found) == without_what_varies(printed)


def test_every_command_is_shown() -> None:
    assert len(EXAMPLES) == 4
    assert {
        command.split(" -")[0] for command in re.findall(r"^\| `(ztmtls [^`]*)`", DOCUMENT, re.MULTILINE)
    } == {
        "ztmtls doctor",
        "ztmtls show",
        "ztmtls policy check",
        "ztmtls policy explain",
        "ztmtls policy schema",
    }


def test_the_hint_for_editors_is_a_policy_with_a_schema(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(# yaml-language-server: \$schema=(\S+)\n.*?)```", DOCUMENT, re.DOTALL)
    assert block
    assert f"$ ztmtls policy schema > {block[2]}" in DOCUMENT
    assert json.loads(ztmtls("policy", "schema").stdout)["title"] == "ztmtls policy"
    assert set(yaml.safe_load(block[1])) == {"version", "rules"}

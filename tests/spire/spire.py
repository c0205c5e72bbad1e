"""A SPIRE server and agent as child processes, on 127.0.0.1 and Unix sockets in one folder.

Join token node attestation, unix workload attestation (user ID, and path of the program). Intervals are
short: the server re-reads its entries and the agent asks for changes every second.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.mtls.conftest import free_port
from ztmtls.testing import Authority

BINARIES = Path(__file__).resolve().parents[2] / ".tools" / "spire"
TRUST_DOMAIN = "zt.example"
NODE = f"spiffe://{TRUST_DOMAIN}/node"
START = 30.0  # seconds that a process may take to become healthy

SERVER_CONFIG = """
server {{
    trust_domain = "{domain}"
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{folder}/server.sock"
    data_dir = "{folder}/server"
    log_level = "DEBUG"
    ca_ttl = "{ca_ttl}"
    agent_ttl = "{agent_ttl}"
    default_x509_svid_ttl = "1m"
    experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{ database_type = "sqlite3", connection_string = "{folder}/server/data.sqlite3" }}
    }}
    KeyManager "disk" {{ plugin_data {{ keys_path = "{folder}/server/keys.json" }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    {upstream}
}}
"""

UPSTREAM = """UpstreamAuthority "disk" {{
        plugin_data {{ cert_file_path = "{folder}/root.pem", key_file_path = "{folder}/root.key" }}
    }}"""

AGENT_CONFIG = """
agent {{
    trust_domain = "{domain}"
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{folder}/agent.sock"
    data_dir = "{folder}/agent"
    trust_bundle_path = "{folder}/bundle.pem"
    log_level = "DEBUG"
    experimental {{ sync_interval = "1s" }}
}}
plugins {{
    KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true }} }}
}}
"""


class SpireError(RuntimeError):
    """A SPIRE command failed, or a SPIRE process did not become healthy. The text holds what it said."""


@dataclass(frozen=True)
class Authorities:
    """IDs of the server's X.509 authorities (hexadecimal subject key identifiers); "" for none."""

    active: str
    prepared: str
    old: str


class Spire:
    """One trust domain with one node. `folder` must be short: it holds the Unix sockets.

    With `root` the server's authorities are intermediates below it. `ca_ttl` and `agent_ttl` are the lives of
    an authority and of the agent's own SVID, as Go writes durations.
    """

    def __init__(
        self, folder: Path, *, root: Authority | None = None, ca_ttl: str = "24h", agent_ttl: str = "1h"
    ) -> None:
        self.folder = folder
        self._root = root
        self._ttls = {"ca_ttl": ca_ttl, "agent_ttl": agent_ttl}
        self.port = free_port()
        self.endpoint = f"unix:{folder}/agent.sock"
        self._server: subprocess.Popen[bytes] | None = None
        self._agent: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the server, then the agent with a join token."""
        for name in ("server", "agent"):
            (self.folder / name).mkdir()
        settings = {"folder": self.folder, "domain": TRUST_DOMAIN, "port": self.port, **self._ttls}
        upstream = UPSTREAM.format(folder=self.folder) if self._root else ""
        if self._root is not None:
            (self.folder / "root.pem").write_bytes(self._root.certificate.public_bytes(Encoding.PEM))
            (self.folder / "root.key").write_bytes(
                self._root.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            )
        (self.folder / "server.conf").write_text(SERVER_CONFIG.format(upstream=upstream, **settings))
        (self.folder / "agent.conf").write_text(AGENT_CONFIG.format(**settings))
        await self.start_server()
        await self.join()

    async def join(self) -> None:
        """Start the agent with a new join token and the present bundle, whatever it was before."""
        shutil.rmtree(self.folder / "agent")
        (self.folder / "agent").mkdir()
        bundle = await self._run("server", "bundle", "show", "-format", "pem")
        (self.folder / "bundle.pem").write_text(bundle)
        token = await self._ask("token", "generate", "-spiffeID", NODE)
        await self.start_agent("-joinToken", token["value"])

    def freeze(self) -> None:
        """Stop both processes where they are, as a machine that falls asleep does."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let both go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in (self._server, self._agent):
            if process is not None:
                process.send_signal(number)

    async def start_server(self) -> None:
        """Start the server, with the data that it has."""
        self._server = self._spawn("server")
        await self._healthy("server", self._server)

    async def stop_server(self) -> None:
        """Stop the server and wait for its end."""
        await asyncio.to_thread(_terminate, self._server)

    async def start_agent(self, *options: str) -> None:
        """Start the agent; after the first time it goes on with the identity that it has on disk."""
        self._agent = self._spawn("agent", *options)
        await self._healthy("agent", self._agent)

    async def stop_agent(self) -> None:
        """Stop the agent and wait for its end."""
        await asyncio.to_thread(_terminate, self._agent)

    async def fetch(self) -> str:
        """What `spire-agent api fetch x509`, a program of this user, gets. Raises `SpireError`."""
        return await self._run("agent", "api", "fetch", "x509")

    def close(self) -> None:
        """Stop both."""
        self.thaw()
        _terminate(self._agent)
        _terminate(self._server)

    # --- entries ---

    async def register(
        self, spiffe_id: str, *, selector: str = "", ttl: int | None = None, dns: Sequence[str] = ()
    ) -> str:
        """Create an entry and return its ID; `selector` is this user's processes by default.

        Args:
            ttl: seconds that its X.509-SVIDs live; default one minute.
            dns: names to put into the certificate beside the SPIFFE ID.
        """
        command = ["entry", "create", "-parentID", NODE, "-spiffeID", spiffe_id]
        command += ["-selector", selector or f"unix:uid:{os.getuid()}"]
        command += ["-x509SVIDTTL", str(ttl)] if ttl is not None else []
        for name in dns:
            command += ["-dns", name]
        answer = await self._ask(*command)
        return str(answer["results"][0]["entry"]["id"])

    async def unregister(self, entry: str) -> None:
        """Delete an entry."""
        await self._ask("entry", "delete", "-entryID", entry)

    async def entries(self) -> list[str]:
        """The IDs of all entries of workloads."""
        answer = await self._ask("entry", "show", "-parentID", NODE)
        return [str(entry["id"]) for entry in answer["entries"]]

    # --- authorities ---

    async def authorities(self) -> Authorities:
        """What `localauthority x509 show` says."""
        answer = await self._ask("localauthority", "x509", "show")
        return Authorities(
            *((answer.get(slot) or {}).get("authority_id", "") for slot in ("active", "prepared", "old"))
        )

    async def authority(self, step: str, authority_id: str = "") -> None:
        """Take one step of a rotation: `prepare`, `activate`, `taint` or `revoke`."""
        which = ["-authorityID", authority_id] if authority_id else []
        await self._ask("localauthority", "x509", step, *which)

    async def own_authority(self) -> str:
        """Which authority has signed the certificate that the server itself presents now."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # only read
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        presented = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        names = x509.load_der_x509_certificate(presented).extensions
        identifier = names.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        return identifier.hex() if identifier else ""

    # --- processes ---

    def log(self, name: str, lines: int = 40) -> str:
        """The last lines of a process's log."""
        path = self.folder / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def _spawn(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [
            str(BINARIES / f"spire-{name}"),
            "run",
            "-config",
            str(self.folder / f"{name}.conf"),
            *options,
        ]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def _healthy(self, name: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START
        while True:
            try:
                await self._run(name, "healthcheck")
                return
            except SpireError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SpireError(f"spire-{name} is not healthy: {error}\n{self.log(name)}") from error
            await asyncio.sleep(0.1)

    async def _ask(self, *command: str) -> Any:
        answer = await self._run("server", *command, "-output", "json")
        return json.loads(answer)

    async def _run(self, name: str, *command: str) -> str:
        process = await asyncio.create_subprocess_exec(
            BINARIES / f"spire-{name}",
            *command,
            "-socketPath",
            self.folder / f"{name}.sock",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
        if process.returncode != 0:
            said = (out + error).decode(errors="replace").strip()
            raise SpireError(f"spire-{name} {' '.join(command[:3])}: {said}")
        return out.decode()


def _terminate(process: subprocess.Popen[bytes] | None) -> None:
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

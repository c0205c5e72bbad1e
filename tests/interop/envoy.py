"""Envoy beside a service: takes its identity from a SPIRE agent over SDS, or from files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from .conftest import TOOLS, line_with, program, running

Config = dict[str, Any]

_TYPES = "type.googleapis.com/envoy.extensions"
_AGENT = "spire-agent"


def envoy() -> Path:
    """The program itself: SPIRE attests its path."""
    found = next(
        (TOOLS / "envoy").glob("lib/python*/site-packages/envoy/_bin/envoy"), TOOLS / "envoy/bin/envoy"
    )
    return program(str(found.relative_to(TOOLS)), "run `make test-interop`, which fetches it")


def identity_from_agent(spiffe_id: str, trust_domain: str, peer: str) -> Config:
    """The TLS settings of one side: who it is, and the one peer it accepts. Both by SDS."""

    def secret(name: str) -> Config:
        services = [{"envoy_grpc": {"cluster_name": _AGENT}}]
        grpc = {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": services}
        return {"name": name, "sds_config": {"resource_api_version": "V3", "api_config_source": grpc}}

    return {
        "tls_certificate_sds_secret_configs": [secret(spiffe_id)],
        "combined_validation_context": {
            "default_validation_context": _accepting(peer),
            "validation_context_sds_secret_config": secret(f"spiffe://{trust_domain}"),
        },
    }


def identity_from_files(pem: Path, bundle: Path, peer: str) -> Config:
    """The same from files: key and chain, and the authorities to trust."""
    return {
        "tls_certificates": [
            {"certificate_chain": {"filename": str(pem)}, "private_key": {"filename": str(pem)}}
        ],
        "validation_context": _accepting(peer) | {"trusted_ca": {"filename": str(bundle)}},
    }


def only_tls(version: str, identity: Config) -> Config:
    """`identity`, at this version of TLS (``TLSv1_2``, ``TLSv1_3``) and no other."""
    versions = {"tls_minimum_protocol_version": version, "tls_maximum_protocol_version": version}
    return {**identity, "tls_params": versions}


def ingress(port: int, application: int, identity: Config) -> Config:
    """Accept mutual TLS on `port` and pass requests on to the plain `application`, saying who called."""
    tls = {"common_tls_context": identity, "require_client_certificate": True}
    says_who = {
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
    }
    return _config(_listener(port, says_who, tls), _cluster("next", _address(application)))


def egress(port: int, server: int, identity: Config, options: Mapping[str, Any] | None = None) -> Config:
    """Accept plain requests on `port` and pass them on to `server` in mutual TLS."""
    cluster = _cluster("next", _address(server))
    cluster["transport_socket"] = _tls("Upstream", {"common_tls_context": identity})
    http: Config = {"explicit_http_config": {"http_protocol_options": {}}}
    if options:
        http["common_http_protocol_options"] = dict(options)
    cluster["typed_extension_protocol_options"] = _http(http)
    return _config(_listener(port, {}), cluster)


@contextlib.asynccontextmanager
async def envoy_with(config: Config, folder: Path, agent: Path | None = None) -> AsyncIterator[None]:
    """Run Envoy until the block ends; it accepts connections when the block begins.

    Args:
        agent: the socket of the SPIRE agent, where secrets come from.
    """
    if agent is not None:
        config["static_resources"]["clusters"].append(_agent_cluster(agent))
    file, log = folder / "envoy.json", folder / "envoy.log"
    file.write_text(json.dumps(config))
    options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "info"]
    async with running(envoy(), "-c", file, *options, log=log) as process:
        await line_with(process, log, "starting main dispatch loop")
        # Listeners wait for their secrets.
        await line_with(process, log, "all dependencies initialized. starting workers")
        yield


def _accepting(peer: str) -> Config:
    return {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}]}


def _tls(direction: str, settings: Config) -> Config:
    kind = f"{_TYPES}.transport_sockets.tls.v3.{direction}TlsContext"
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": kind, **settings}}


def _http(options: Config) -> Config:
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {name: {"@type": f"type.googleapis.com/{name}", **options}}


def _address(port: int) -> Config:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _listener(port: int, manager: Config, tls: Config | None = None) -> Config:
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "next"}}]
    router = {"@type": f"{_TYPES}.filters.http.router.v3.Router"}
    connection_manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        **manager,
    }
    http = {"name": "envoy.filters.network.http_connection_manager", "typed_config": connection_manager}
    chain: Config = {"filters": [http]}
    if tls is not None:
        chain["transport_socket"] = _tls("Downstream", tls)
    return {"name": "in", "address": _address(port), "filter_chains": [chain]}


def _cluster(name: str, address: Config) -> Config:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
    }


def _agent_cluster(socket: Path) -> Config:
    cluster = _cluster(_AGENT, {"pipe": {"path": str(socket)}})
    http2: Config = {"explicit_http_config": {"http2_protocol_options": {}}}
    return cluster | {"typed_extension_protocol_options": _http(http2)}


def _config(listener: Config, cluster: Config) -> Config:
    return {
        "node": {"id": "sidecar", "cluster": "tests"},  # xDS wants to know who asks
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }

"""The whole chain, live: an order goes through, anybody else's call does not, and rotation costs nothing."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ztdev.options import SERVICES, StackOptions, spiffe_id
from ztdev.shop import Visitor
from ztdev.stack import BackgroundStack
from ztmtls.client import Client
from ztmtls.reasons import Reason
from ztmtls.testing import CertificateAuthority, StaticSource

CHARGE = {"order_id": "6f9f7c0e-3a53-4c55-9a7c-1c64a8d1f0aa", "amount": 1999, "currency": "EUR"}


def caller(stack: BackgroundStack, service: str) -> StaticSource:
    """An SVID as `service` has it, held by this test."""
    return StaticSource(stack.ca.context(stack.ca.issue(spiffe_id(service))))


def call(
    stack: BackgroundStack, source: StaticSource, callee: str, method: str, path: str, **more: Any
) -> httpx.Response:
    url = getattr(stack.urls, callee)
    with Client(source, peer=spiffe_id(callee), base_url=url) as client:
        return client.request(method, path, **more)


def test_an_order_travels_the_chain_with_both_sides_verified(stack: BackgroundStack) -> None:
    with Visitor(stack.urls.page) as visitor:
        document = visitor.order()
    assert document["order"]["status"] == "paid"
    links = {(link["from"], link["to"]): link for link in document["links"]}
    assert list(links) == [("frontend", "orders"), ("orders", "payments")]
    for (source, target), link in links.items():
        by_caller, by_callee = link["seen_by_caller"], link["seen_by_callee"]
        assert by_caller["own"]["id"] == by_callee["peer"]["id"] == spiffe_id(source)
        assert by_caller["peer"]["id"] == by_callee["own"]["id"] == spiffe_id(target)
        assert by_caller["own"]["serial"] == by_callee["peer"]["serial"]
        assert by_caller["peer"]["serial"] == by_callee["own"]["serial"]
        assert by_callee["rule"]
        assert by_caller["tls_version"] == by_callee["tls_version"] == "TLSv1.3"
        assert link["duration_ms"] > 0
    users = {use["service"]: use["user"] for use in document["databases"]}
    assert users == {"orders": "orders_app", "payments": "payments_app"}
    assert all(use["secret_version"] and use["tls_version"] == "TLSv1.3" for use in document["databases"])


def test_each_service_accepts_only_its_one_caller(stack: BackgroundStack) -> None:
    allowed = {"orders": "frontend", "payments": "orders"}
    for callee, right in allowed.items():
        assert call(stack, caller(stack, right), callee, "GET", "/status").status_code == 200
        for wrong in {*SERVICES, "rogue"} - {right}:
            before = len(stack.audit(callee))
            response = call(stack, caller(stack, wrong), callee, "GET", "/status")
            assert (response.status_code, response.json()["reason"]) == (403, Reason.CALLER_NOT_ALLOWED)
            line = stack.wait_for_audit(callee, after=before, decision="deny", peer_id=spiffe_id(wrong))
            assert (line["reason"], line["path"]) == (Reason.CALLER_NOT_ALLOWED, "/status")


@pytest.mark.parametrize(
    ("callee", "right", "method", "path"),
    [
        ("payments", "orders", "DELETE", "/payments/1"),
        ("payments", "orders", "GET", "/payments"),
        ("payments", "orders", "GET", "/docs"),
        ("payments", "orders", "GET", "/metrics"),
        ("orders", "frontend", "DELETE", "/orders/1"),
        ("orders", "frontend", "POST", "/products"),
        ("orders", "frontend", "GET", "/openapi.json"),
    ],
)
def test_right_caller_on_a_route_no_rule_names(
    stack: BackgroundStack, callee: str, right: str, method: str, path: str
) -> None:
    assert call(stack, caller(stack, right), callee, "GET", "/status").status_code == 200
    response = call(stack, caller(stack, right), callee, method, path)
    assert (response.status_code, response.json()["reason"]) == (403, Reason.ROUTE_NOT_ALLOWED)


def test_a_refused_charge_leaves_no_row(stack: BackgroundStack) -> None:
    rightful = call(
        stack, caller(stack, "orders"), "payments", "POST", "/payments",
        json=CHARGE, headers={"Idempotency-Key": "rightful"},
    )  # fmt: skip
    assert rightful.status_code in (200, 201), rightful.text
    headers = {
        "Idempotency-Key": "forged",
        "X-SPIFFE-ID": spiffe_id("orders"),
        "X-Forwarded-Client-Cert": f"URI={spiffe_id('orders')}",
    }
    response = call(
        stack, caller(stack, "frontend"), "payments", "POST", "/payments", json=CHARGE, headers=headers
    )
    assert response.status_code == 403
    answer = call(stack, caller(stack, "orders"), "payments", "GET", "/payments/by-key/forged")
    assert answer.status_code == 404
    assert (
        call(stack, caller(stack, "orders"), "payments", "GET", "/payments/by-key/rightful").status_code
        == 200
    )


def test_strangers_fail_in_the_handshake(stack: BackgroundStack) -> None:
    assert call(stack, caller(stack, "orders"), "payments", "GET", "/status").status_code == 200
    imitation = CertificateAuthority("zt.example")
    stranger = StaticSource(stack.ca.context(imitation.issue(spiffe_id("orders"))))
    before = len(stack.audit("payments"))
    with pytest.raises(httpx.TransportError):
        call(stack, stranger, "payments", "POST", "/payments", json=CHARGE)
    line = stack.wait_for_audit("payments", after=before, event="handshake", decision="deny")
    assert line["reason"] == Reason.UNTRUSTED_AUTHORITY

    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.verify_mode = ssl.CERT_NONE  # an attacker does not care who answers
    before = len(stack.audit("payments"))
    with (
        pytest.raises((httpx.TransportError, ssl.SSLError)),
        httpx.Client(verify=anonymous, trust_env=False) as client,
    ):
        client.get(f"{stack.urls.payments}/status")
    line = stack.wait_for_audit("payments", after=before, event="handshake", decision="deny")
    assert line["reason"] == Reason.NO_CERTIFICATE


def test_no_secret_reaches_a_log(stack: BackgroundStack) -> None:
    with Visitor(stack.urls.page) as visitor:
        visitor.order()
    secrets = [
        stack.run(stack.cloud.secret_value(f"zt-demo/{service}/{kind}"))["password"]
        for service in ("orders", "payments")
        for kind in ("db", "db-owner")
    ]
    logs = list((Path(stack.options.state_dir) / "logs").iterdir())
    assert len(logs) >= 3
    for log in logs:
        text = log.read_text(errors="replace")
        assert not any(secret in text for secret in secrets), log
        assert "PRIVATE KEY" not in text, log


# --- a minute of rotation under load ------------------------------------------------------------------


@pytest.fixture(scope="module")
def restless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundStack]:
    """A stack whose SVIDs live four seconds and whose authorities live twenty-four."""
    options = StackOptions(
        state_dir=tmp_path_factory.mktemp("restless"), free_ports=True, svid_ttl=4.0, ca_ttl=24.0
    )
    with BackgroundStack(options) as stack:
        yield stack


@pytest.mark.timeout(180)
def test_a_minute_of_orders_while_svids_and_authorities_rotate(restless: BackgroundStack) -> None:
    serials: defaultdict[str, set[str]] = defaultdict(set)
    authorities: set[str] = set()
    failures: list[str] = []
    placed = 0
    lock = threading.Lock()
    end = time.monotonic() + 60

    def shop() -> None:
        nonlocal placed
        with Visitor(restless.urls.page) as visitor:
            while time.monotonic() < end:
                try:
                    document = visitor.order()
                    assert document["order"]["status"] == "paid", document["order"]["status"]
                except Exception as error:
                    with lock:
                        failures.append(f"{type(error).__name__}: {error}")
                    continue
                with lock:
                    placed += 1
                    for link in document["links"]:
                        seen = link["seen_by_callee"]
                        serials[link["from"]].add(seen["peer"]["serial"])
                        serials[link["to"]].add(seen["own"]["serial"])
                        authorities.add(seen["peer"]["authority"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shop(), range(4)))
    counted = {service: len(found) for service, found in serials.items()}
    print(f"{placed} orders, {len(failures)} failed, serials {counted}, {len(authorities)} authorities")
    assert failures == []
    assert placed > 100
    assert set(counted) == set(SERVICES)
    assert min(counted.values()) >= 10, counted
    assert len(authorities) >= 3


@pytest.mark.timeout(120)
def test_agent_outage_and_withdrawal_show_in_readiness_and_heal(restless: BackgroundStack) -> None:
    probe = f"http://127.0.0.1:{restless.ports.payments_probe}/readyz"

    def readiness() -> tuple[int, str]:
        answer = httpx.get(probe, trust_env=False)
        return answer.status_code, answer.json()["checks"]["identity"]

    async def until(condition: Any, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.1)

    def liveness() -> int:
        return httpx.get(probe.replace("readyz", "livez"), trust_env=False).status_code

    workload = restless.workload_api.workloads["payments"]
    asyncio.run(until(lambda: readiness() == (200, "ok"), 10))

    # The socket goes away for longer than the SVID lives.
    restless.run(workload.stop())
    asyncio.run(until(lambda: readiness()[1].startswith("expired"), 20))
    assert readiness()[0] == 503
    assert liveness() == 200
    with pytest.raises(httpx.TransportError):
        call(restless, caller(restless, "orders"), "payments", "GET", "/status")
    restless.run(workload.start())
    asyncio.run(until(lambda: readiness() == (200, "ok"), 15))

    # The identity is withdrawn while everything else is well.
    async def on_loop(action: Any) -> None:
        action()

    restless.run(on_loop(workload.redact))
    asyncio.run(until(lambda: readiness()[1].startswith("denied"), 6))
    assert liveness() == 200
    with pytest.raises(httpx.TransportError):
        call(restless, caller(restless, "orders"), "payments", "GET", "/status")
    restless.run(on_loop(workload.restore))
    asyncio.run(until(lambda: readiness() == (200, "ok"), 15))
    with Visitor(restless.urls.page) as visitor:
        assert visitor.order()["order"]["status"] == "paid"

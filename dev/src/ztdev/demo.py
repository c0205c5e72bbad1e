"""`ztdev demo`: an order that is carried through, two calls that are refused, passwords that change."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from ztmtls.client import AsyncClient
from ztmtls.testing import StaticSource

from .chain import chain_tree
from .console import Progress
from .errors import ExitStatus, StackError
from .interrupts import stop_signals
from .options import DATABASE_SERVICES, NAMESPACE, TRUST_DOMAIN, StackOptions, spiffe_id
from .shop import Visitor
from .stack import Stack

#: A workload that exists in the trust domain, with an SVID as good as any, and is allowed nothing.
ROGUE = f"spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/rogue"

_CHARGE = {
    "order_id": "00000000-0000-4000-8000-000000000000",
    "amount": 100,
    "currency": "EUR",
}


class DemoFailed(StackError):
    """Something did not go as it should."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call was refused: what the caller saw, and the line in the audit log of the service."""

    seen: str
    audit: dict[str, Any]


async def run_demo(options: StackOptions, console: Console, progress: Progress) -> ExitStatus:
    """Start, order, be refused twice, rotate the database passwords, stop."""
    began = time.monotonic()
    stack = Stack(options)
    async with stop_signals(stack.hurry, console) as stop:
        work = asyncio.create_task(_demo(stack, console, progress))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            console.print("Interrupted.")
            return ExitStatus.INTERRUPTED
        await work
    console.print(
        f"\nDone in {time.monotonic() - began:.1f} s: orders carried through, two calls refused, "
        "passwords rotated."
    )
    return ExitStatus.OK


async def _demo(stack: Stack, console: Console, progress: Progress) -> None:
    console.print("[bold]1. Start everything[/]")
    try:
        async with stack:
            progress.close()
            console.print("\n[bold]2. Place an order, as a person does on the page[/]")
            document = await asyncio.to_thread(_order, stack.urls.page)
            console.print(chain_tree(document), soft_wrap=True)
            if document["order"]["status"] != "paid":
                raise DemoFailed(f"The order is {document['order']['status']}, not paid.")
            await _refused(
                console,
                "3. Call payments as another workload of the same trust domain",
                f"{ROGUE} has a valid SVID, and is not orders.",
                lambda: call_as_rogue(stack),
            )
            await _refused(
                console,
                "4. Call payments without a certificate",
                "The caller trusts the right authority, and shows nothing of its own.",
                lambda: call_without_certificate(stack),
            )
            await _rotate(stack, console)
            console.print("\n[bold]6. Stop everything[/]")
    finally:
        progress.close()


def _order(page: str) -> dict[str, Any]:
    with Visitor(page) as visitor:
        return visitor.order()


async def _rotate(stack: Stack, console: Console) -> None:
    """Raises `DemoFailed` unless both services go on with the new logins."""
    console.print("\n[bold]5. Rotate the database passwords, and order again[/]")
    rotations = [await stack.rotations.rotate(service) for service in DATABASE_SERVICES]
    for rotation in rotations:
        console.print(f"  {rotation.service:9} {rotation}", soft_wrap=True)
        await stack.wait_for_audit(rotation.service, event="credentials", version=rotation.after.id)
    document = await asyncio.to_thread(_order, stack.urls.page)
    used = {use["service"]: use for use in document["databases"]}
    for rotation in rotations:
        use = used[rotation.service]
        if document["order"]["status"] != "paid" or use["user"] != rotation.after.user:
            raise DemoFailed(f"The order is {document['order']['status']}, by {use['user']}.")
        version = use["secret_version"][:8]
        console.print(f"  [green]paid[/]  {rotation.service} as {use['user']}, version {version}")


async def _refused(
    console: Console, title: str, situation: str, attempt: Callable[[], Awaitable[Refusal]]
) -> None:
    console.print(f"\n[bold]{escape(title)}[/]\n  {escape(situation)}", soft_wrap=True)
    refusal = await attempt()
    console.print(f"  [green]refused[/]  the caller sees: {escape(refusal.seen)}", soft_wrap=True)
    line = refusal.audit
    facts = [
        f"{name}={line[name]}"
        for name in ("event", "decision", "reason", "peer_id", "method", "path")
        if line.get(name)
    ]
    console.print(f"           payments' audit log: {escape(' '.join(facts))}", soft_wrap=True)


async def call_as_rogue(stack: Stack) -> Refusal:
    """A charge by a workload of our own trust domain that no rule names: HTTP 403, `caller_not_allowed`.

    Raises `DemoFailed` when it is not refused so.
    """
    seen_before = len(stack.audit("payments"))
    source = StaticSource(stack.ca.context(stack.ca.issue(ROGUE)))
    async with AsyncClient(source, peer=spiffe_id("payments"), base_url=stack.urls.payments) as client:
        answer = await client.post("/payments", json=_CHARGE, headers={"Idempotency-Key": "rogue-1"})
    reason = answer.json().get("reason") if "json" in answer.headers.get("content-type", "") else None
    if answer.status_code != 403 or reason != "caller_not_allowed":
        raise DemoFailed(f"payments answered the rogue with {answer.status_code} {reason}, not 403.")
    line = await stack.wait_for_audit(
        "payments", after=seen_before, decision="deny", reason="caller_not_allowed", peer_id=ROGUE
    )
    return Refusal(f"HTTP 403 {reason}: {answer.json().get('detail', '')}", line)


async def call_without_certificate(stack: Stack) -> Refusal:
    """A charge without a client certificate: the TLS handshake fails, no byte of the request is read.

    Raises `DemoFailed` when it is not refused so.
    """
    seen_before = len(stack.audit("payments"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # SPIFFE certificates name no host; the chain is verified.
    context.check_hostname = False
    for authority in stack.ca.bundle.authorities:
        context.load_verify_locations(cadata=_pem(authority))
    try:
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            answer = await client.post(f"{stack.urls.payments}/payments", json=_CHARGE)
    except ssl.SSLError as error:  # httpx lets the alert of a handshake that it thought was over through
        seen = f"TLS alert: {(error.reason or str(error)).removeprefix('TLSV13_ALERT_').lower()}"
    except httpx.TransportError as error:
        seen = f"{type(error).__name__}: {str(error) or 'the connection was closed'}"
    else:
        raise DemoFailed(f"payments answered a caller without a certificate with {answer.status_code}.")
    line = await stack.wait_for_audit(
        "payments", after=seen_before, event="handshake", decision="deny", reason="no_certificate"
    )
    return Refusal(seen, line)


def _pem(certificate: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return str(certificate.public_bytes(Encoding.PEM).decode())

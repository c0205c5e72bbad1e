"""What callers do, rightly or not: the deeds that several attacks share."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from tests.attacks.lab import Answer, Lab, NotProved, Target
from ztdev.shop import QUANTITY, order_form

STATUS: Mapping[str, Any] = {"path": "/status"}

#: Who may call a service.
CALLER = {"orders": "frontend", "payments": "orders"}


#: The order that is paid for where it does not matter which.
ORDER = uuid.UUID("6f9f7c0e-3a53-4c55-9a7c-1c64a8d1f0aa")


def charge(amount: int = 1999, key: str | None = None, order: uuid.UUID = ORDER) -> dict[str, Any]:
    """A request that takes money for `order`, once per `key`."""
    return {
        "method": "POST",
        "path": "/payments",
        "headers": [("Content-Type", "application/json"), ("Idempotency-Key", key or uuid.uuid4().hex)],
        "body": json.dumps({"order_id": str(order), "amount": amount, "currency": "EUR"}),
    }


async def rightful_status(lab: Lab, target: Target) -> Answer:
    """The right caller asks for the status."""
    service = target.name.partition("-")[0]
    return await lab.attack(target, STATUS, svid=lab.svid(CALLER[service]))


async def rightful_charge(lab: Lab, target: Target) -> Answer:
    """Orders takes money."""
    return await lab.attack(target, charge(), svid=lab.svid("orders"))


async def fill_in(
    lab: Lab,
    target: Target,
    quantity: str,
    *,
    origin: str | None = None,
    cookie: str | None = None,
    token: str | None = None,
) -> Answer:
    """Open the order page, type `quantity` at the first thing, and send the form: from our own page, with the
    cookie that came with it and its token, unless another `origin`, `cookie` or `token` is given."""
    page = await lab.attack(target, {"path": "/"}, tls=False)
    form = order_form(page.body)
    assert form is not None
    first = next(name for name in form.fields if name.startswith(QUANTITY))
    host = f"127.0.0.1:{target.port}"
    person = origin is cookie is token is None
    fields = form.fields | {first: quantity} | ({} if token is None else {"csrf": token})
    request = {
        "method": "POST",
        "path": "/orders",
        "headers": [
            ("Host", host),
            ("Origin", origin or f"http://{host}"),
            ("Accept", "text/html" if person else "application/problem+json"),
            ("Content-Type", "application/x-www-form-urlencoded"),
            ("Cookie", page.headers["set-cookie"].partition(";")[0] if cookie is None else cookie),
        ],
        "body": urlencode(fields),
    }
    return await lab.attack(target, request, tls=False)


async def booked(lab: Lab, order: str) -> int:
    """How many charges the ledger holds for `order`."""
    async with lab.stack.postgres.administrator("payments") as connection:
        cursor = await connection.execute(
            "SELECT count(*) FROM entries JOIN charges ON charges.id = charge_id WHERE order_id = %s", [order]
        )
        found = await cursor.fetchone()
    return int(str(found[0])) if found else 0


async def booked_once(lab: Lab, request: Mapping[str, Any], answers: list[Answer]) -> Answer:
    """What repeating a charge came to: refused when the ledger holds one line for its order, and all answers
    tell of that."""
    payments = await booked(lab, json.loads(request["body"])["order_id"])
    if refused := [answer for answer in answers if answer.refused]:
        raise NotProved(f"the charge itself was refused: {refused[0]}")
    told = {json.loads(answer.body)["payment"]["id"] for answer in answers}
    if payments == len(told) == 1:
        return Answer(
            reason="replayed", error=f"{len(answers)} requests, one payment: the first answer again"
        )
    return Answer(status=201, body=f"{payments} payments booked, {len(told)} confirmed")


async def place_order(lab: Lab, target: Target, caller: str = "frontend") -> Answer:
    """An order for one of the first thing on offer, placed at orders."""
    return await lab.attack(target, await order_request(lab), svid=lab.svid(caller))


async def order_request(lab: Lab) -> dict[str, Any]:
    """The request that places it, with a key of its own."""
    answer = await lab.attack(lab.target("orders"), {"path": "/products"}, svid=lab.svid("frontend"))
    sku = json.loads(answer.body)["products"][0]["sku"]
    return {
        "method": "POST",
        "path": "/orders",
        "headers": [("Content-Type", "application/json"), ("Idempotency-Key", uuid.uuid4().hex)],
        "body": json.dumps({"items": [{"sku": sku, "quantity": 1}]}),
    }


async def ask_workload_api(lab: Lab, workload: str, registered_as: str | None = None) -> Answer:
    """A process, which may be registered as a workload, asks for the identity of `workload` at its socket."""
    workloads = lab.stack.workload_api.workloads
    admitted: list[int] = []

    def admit(pid: int) -> None:
        if registered_as is not None:
            workloads[registered_as].allow(pid=pid)
            admitted.append(pid)

    try:
        return await lab.attacker("agent_client.py", {"socket": workloads[workload].endpoint}, admit=admit)
    finally:
        for pid in admitted:
            await workloads[registered_as or ""].disallow(pid=pid)


#: The stand-in's line of a refused attempt to take a role.
TAKE_ROLE: Mapping[str, Any] = {"event": "cloud", "action": "AssumeRoleWithWebIdentity"}


async def read_secret(
    lab: Lab,
    target: Target,
    account: str,
    secret: str,
    token: str | None = None,
    keys: Mapping[str, str] | None = None,
) -> Answer:
    """Take the role of `account` with `token` (by default its own) and read `secret`; with `keys`, a pair of
    access key and secret, without any role."""
    cloud = lab.stack.cloud
    errand = {
        "endpoint": f"http://127.0.0.1:{target.port}",
        "region": cloud.region,
        "role": cloud.role_arn(account),
        "token": token or lab.stack.issuer.token("zt-demo", account),
        "keys": keys,
        "secret": secret,
    }
    return await lab.attacker("aws_client.py", errand)


async def read_own_secret(lab: Lab, target: Target) -> Answer:
    """Orders takes its role, and reads its secret."""
    return await read_secret(lab, target, "orders", "zt-demo/orders/db")


def claims(lab: Lab, **changes: Any) -> dict[str, Any]:
    """What the token of orders' service account says, with `changes`."""
    token = lab.stack.issuer.token("zt-demo", "orders")
    payload = token.split(".")[1]
    said: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return said | changes


def key_id(lab: Lab) -> str:
    """The ID of the issuer's key, as tokens name it."""
    header = lab.stack.issuer.token("zt-demo", "orders").split(".")[0]
    return str(json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"])


async def query(
    lab: Lab, service: str, database: str, statement: str, login: Mapping[str, Any] | None = None
) -> Answer:
    """Run `statement` in `database` with `login`, by default the one that `service` has now."""
    secret = login or await lab.stack.cloud.secret_value(f"zt-demo/{service}/db")
    connect = {
        "host": "127.0.0.1",
        "port": lab.stack.ports.postgres,
        "dbname": database,
        "user": secret["username"],
        "password": secret["password"],
        "sslmode": "verify-full",
        "sslrootcert": str(lab.stack.postgres.ca_file),
    }
    return await lab.attacker("sql_client.py", {"connect": connect, "statement": statement})

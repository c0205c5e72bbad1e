"""What callers do, rightly or not: the deeds that several attacks share."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from tests.attacks.lab import Answer, Lab, Target

STATUS: Mapping[str, Any] = {"path": "/status"}

#: Who may call a service.
CALLER = {"orders": "frontend", "payments": "orders"}


def charge(amount: int = 1999, key: str | None = None) -> dict[str, Any]:
    """A request that takes money, once per `key`."""
    order = "6f9f7c0e-3a53-4c55-9a7c-1c64a8d1f0aa"
    return {
        "method": "POST",
        "path": "/payments",
        "headers": [("Content-Type", "application/json"), ("Idempotency-Key", key or uuid.uuid4().hex)],
        "body": json.dumps({"order_id": order, "amount": amount, "currency": "EUR"}),
    }


async def rightful_status(lab: Lab, target: Target) -> Answer:
    """The right caller asks for the status."""
    service = target.name.partition("-")[0]
    return await lab.attack(target, STATUS, svid=lab.svid(CALLER[service]))


async def rightful_charge(lab: Lab, target: Target) -> Answer:
    """Orders takes money."""
    return await lab.attack(target, charge(), svid=lab.svid("orders"))


async def read_secret(lab: Lab, account: str, secret: str, token: str | None = None) -> Answer:
    """Take the role of `account` with `token` (by default its own) and read `secret`."""
    cloud = lab.stack.cloud
    errand = {
        "endpoint": cloud.endpoint_url,
        "region": cloud.region,
        "role": cloud.role_arn(account),
        "token": token or lab.stack.issuer.token("zt-demo", account),
        "secret": secret,
    }
    return await lab.attacker("aws_client.py", errand)


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

"""The ledger: each action happens once, and the database is what makes it so.

An action is named by `(caller, idempotency_key)`, which is unique. It is inserted and completed in one
transaction. A twin that arrives meanwhile waits at the unique index until that transaction has ended:
if it committed, the twin reads the winner's row; if it rolled back or its process died, the twin acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from ztmtls.database import database_use
from ztmtls.fastapi import Problem, key_reused
from ztmtls.idempotency import fingerprint
from ztmtls.reasons import Reason
from ztmtls.transactions import Database

from . import SERVICE
from .models import Charge, Entry, Refund
from .schemas import ChargeRequest, RefundRequest


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an action came to. `replayed` says that it had been done before, by the same key.

    `refunded` is the sum given back as it was right after the action: a replay repeats the first answer.
    """

    charge: Charge
    refunded: int
    replayed: bool
    database: dict[str, Any]
    refund: Refund | None = None


class Ledger:
    """Charges and refunds of all callers. A caller reaches its own only."""

    def __init__(self, database: Database, charge_limit: int) -> None:
        self._database = database
        self._charge_limit = charge_limit

    async def charge(self, caller: str, key: str, request: ChargeRequest) -> Receipt:
        """Take the money once. Raises `Problem`: 402 over the limit, 422 for a reused key."""
        asked = request.model_dump(mode="json")
        digest = fingerprint("charge", asked)

        async def work(session: AsyncSession) -> Receipt:
            charge = await session.scalar(
                insert(Charge)
                .values(caller=caller, idempotency_key=key, fingerprint=digest, **request.model_dump())
                .on_conflict_do_nothing(index_elements=["caller", "idempotency_key"])
                .returning(Charge)
            )
            use = await _database_use(session)
            if charge is None:
                winner = (await session.scalars(_charge_by_key(caller, key))).one()
                if winner.fingerprint != digest:
                    raise key_reused()
                return Receipt(winner, refunded=0, replayed=True, database=use)
            if charge.amount > self._charge_limit:
                raise _over_limit(self._charge_limit)
            session.add(Entry(charge_id=charge.id, amount=charge.amount))
            return Receipt(charge, refunded=0, replayed=False, database=use)

        return await self._database.run(work)

    async def refund(self, caller: str, key: str, payment_id: UUID, request: RefundRequest) -> Receipt:
        """Give money back once, never more than is left.

        Raises `Problem`: 404 for a payment that is not this caller's, 409 for more than is left, 422 for
        a reused key.
        """
        digest = fingerprint("refund", {"payment_id": str(payment_id), "amount": request.amount})

        async def work(session: AsyncSession) -> Receipt:
            # The row lock puts all refunds of this charge in a queue; each sees the sum of those before.
            charge = await session.scalar(_charge_by_id(caller, payment_id).with_for_update())
            use = await _database_use(session)
            if charge is None:
                raise _no_such_payment()
            done = await session.scalar(_refund_by_key(caller, key))
            if done is None:
                done = await _insert_refund(session, charge, key, digest, request.amount)
                if done is not None:
                    return Receipt(charge, done.refunded_total, replayed=False, database=use, refund=done)
                # The key was taken meanwhile for another charge: the lock above does not cover that one.
                done = (await session.scalars(_refund_by_key(caller, key))).one()
            if done.fingerprint != digest:
                raise key_reused()
            return Receipt(charge, done.refunded_total, replayed=True, database=use, refund=done)

        return await self._database.run(work)

    async def find(self, caller: str, payment_id: UUID) -> Receipt:
        """The payment as it is now. Raises `Problem` 404 when this caller has no such payment."""
        return await self._database.run(lambda session: _read(session, _charge_by_id(caller, payment_id)))

    async def find_by_key(self, caller: str, key: str) -> Receipt:
        """The payment that this caller's key names, as it is now. Raises `Problem` 404."""
        return await self._database.run(lambda session: _read(session, _charge_by_key(caller, key)))

    async def database_use(self) -> dict[str, Any]:
        """Who we are to the database at this moment."""
        return await self._database.run(_database_use)


async def _database_use(session: AsyncSession) -> dict[str, Any]:
    return {"service": SERVICE, **await database_use(await session.connection())}


def _charge_by_key(caller: str, key: str) -> Select[Charge]:
    return select(Charge).where(Charge.caller == caller, Charge.idempotency_key == key)


def _charge_by_id(caller: str, payment_id: UUID) -> Select[Charge]:
    return select(Charge).where(Charge.id == payment_id, Charge.caller == caller)


def _refund_by_key(caller: str, key: str) -> Select[Refund]:
    return select(Refund).where(Refund.caller == caller, Refund.idempotency_key == key)


async def _insert_refund(
    session: AsyncSession, charge: Charge, key: str, digest: str, amount: int
) -> Refund | None:
    """Book a refund of a locked charge, or return None when the key is taken."""
    left = charge.amount - charge.refunded
    if amount > left:
        raise _more_than_is_left(left)
    refund = await session.scalar(
        insert(Refund)
        .values(
            charge_id=charge.id,
            caller=charge.caller,
            idempotency_key=key,
            fingerprint=digest,
            amount=amount,
            refunded_total=charge.refunded + amount,
        )
        .on_conflict_do_nothing(index_elements=["caller", "idempotency_key"])
        .returning(Refund)
    )
    if refund is not None:
        charge.refunded = refund.refunded_total
        session.add(Entry(charge_id=charge.id, refund_id=refund.id, amount=-amount))
    return refund


async def _read(session: AsyncSession, query: Select[Charge]) -> Receipt:
    charge = await session.scalar(query)
    if charge is None:
        raise _no_such_payment()
    use = await _database_use(session)
    return Receipt(charge, charge.refunded, replayed=True, database=use)


def _over_limit(limit: int) -> Problem:
    return Problem(
        402,
        Reason.PAYMENT_DECLINED,
        "The payment was declined",
        f"One charge may be at most {limit} minor units. Nothing was charged.",
        limit=limit,
    )


def _more_than_is_left(left: int) -> Problem:
    return Problem(
        409,
        Reason.CONFLICT,
        "That is more than is left of the payment",
        f"{left} minor units can still be refunded.",
        refundable=left,
    )


def _no_such_payment() -> Problem:
    return Problem(404, Reason.NOT_FOUND, "No such payment", "This caller has no such payment.")

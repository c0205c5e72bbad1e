"""Charges, refunds and the append-only ledger."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

APPLICATION_ROLE = "payments_rw"


def upgrade() -> None:
    op.create_table(
        "charges",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("refunded", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="charges_pkey"),
        sa.UniqueConstraint("caller", "idempotency_key", name="charges_key_once_per_caller"),
        sa.CheckConstraint("caller LIKE 'spiffe://%'", name="charges_caller_is_spiffe_id"),
        sa.CheckConstraint("amount > 0", name="charges_amount_positive"),
        sa.CheckConstraint("currency = 'EUR'", name="charges_currency_known"),
        sa.CheckConstraint("refunded BETWEEN 0 AND amount", name="charges_refunded_within_amount"),
    )
    op.create_index("charges_order_id_idx", "charges", ["order_id"])
    op.create_table(
        "refunds",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("charge_id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("refunded_total", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="refunds_pkey"),
        sa.ForeignKeyConstraint(["charge_id"], ["charges.id"], name="refunds_charge_id_fkey"),
        sa.UniqueConstraint("caller", "idempotency_key", name="refunds_key_once_per_caller"),
        sa.UniqueConstraint("charge_id", "refunded_total", name="refunds_total_once_per_charge"),
        sa.CheckConstraint("amount > 0", name="refunds_amount_positive"),
        sa.CheckConstraint("refunded_total >= amount", name="refunds_total_includes_amount"),
    )
    op.create_table(
        "entries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("charge_id", sa.Uuid(), nullable=False),
        sa.Column("refund_id", sa.Uuid(), nullable=True),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("booked_by", sa.Text(), server_default=sa.func.session_user(), nullable=False),
        sa.Column("booked_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="entries_pkey"),
        sa.ForeignKeyConstraint(["charge_id"], ["charges.id"], name="entries_charge_id_fkey"),
        sa.ForeignKeyConstraint(["refund_id"], ["refunds.id"], name="entries_refund_id_fkey"),
        sa.UniqueConstraint("refund_id", name="entries_one_per_refund"),
        sa.CheckConstraint(
            "(refund_id IS NULL AND amount > 0) OR (refund_id IS NOT NULL AND amount < 0)",
            name="entries_charges_add_refunds_subtract",
        ),
    )
    op.create_index("entries_charge_id_idx", "entries", ["charge_id"])
    op.create_index(
        "entries_one_per_charge",
        "entries",
        ["charge_id"],
        unique=True,
        postgresql_where=sa.text("refund_id IS NULL"),
    )
    _keep_the_ledger_append_only()
    _keep_the_ledger_balanced()
    _grant()


def _keep_the_ledger_append_only() -> None:
    op.execute("""
        CREATE FUNCTION entries_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the ledger is append-only: % is refused', TG_OP
                USING ERRCODE = 'integrity_constraint_violation';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER entries_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
            FOR EACH STATEMENT EXECUTE FUNCTION entries_are_append_only()
    """)


def _keep_the_ledger_balanced() -> None:
    # Deferred to the commit: within the transaction the charge exists before its line does.
    op.execute("""
        CREATE FUNCTION ledger_is_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            this uuid := to_jsonb(NEW) ->> TG_ARGV[0];
            expected bigint := (SELECT amount - refunded FROM charges WHERE id = this);
            booked bigint := (SELECT coalesce(sum(amount), 0) FROM entries WHERE charge_id = this);
        BEGIN
            IF booked IS DISTINCT FROM expected THEN
                RAISE EXCEPTION 'charge %: the ledger holds %, the charge says %', this, booked, expected
                    USING ERRCODE = 'integrity_constraint_violation';
            END IF;
            RETURN NULL;
        END $$
    """)
    for table, charge in (("charges", "id"), ("entries", "charge_id")):
        op.execute(f"""
            CREATE CONSTRAINT TRIGGER {table}_balanced AFTER INSERT OR UPDATE ON {table}
                DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION ledger_is_balanced('{charge}')
        """)


def _grant() -> None:
    """Give the application what it needs and no more: nobody changes or removes what was booked."""
    for table in ("charges", "refunds", "entries", "alembic_version"):
        op.execute(f"REVOKE ALL ON {table} FROM PUBLIC, {APPLICATION_ROLE}")
        op.execute(f"GRANT SELECT ON {table} TO {APPLICATION_ROLE}")
    for table in ("charges", "refunds", "entries"):
        op.execute(f"GRANT INSERT ON {table} TO {APPLICATION_ROLE}")
    op.execute(f"GRANT UPDATE (refunded) ON charges TO {APPLICATION_ROLE}")

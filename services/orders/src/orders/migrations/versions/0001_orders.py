"""Catalogue and orders."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

APPLICATION_ROLE = "orders_rw"

# Prices in cents.
CATALOGUE = (
    ("coffee-beans", "Coffee beans", "A kilogram, roasted on Tuesday, gone by Friday.", 2190),
    ("tea-jasmine", "Jasmine tea", "Loose leaves, scented over seven nights.", 1450),
    ("mug-stoneware", "Stoneware mug", "Holds 300 ml and a morning.", 1800),
    ("notebook-a5", "Notebook A5", "192 dotted pages that lie flat.", 1290),
    ("pencil-set", "Twelve pencils", "From 4H to 6B, in a tin.", 1650),
    ("desk-lamp", "Desk lamp", "Warm light, brass switch, long arm.", 8900),
    ("wool-blanket", "Wool blanket", "Woven in one piece, 140 by 200 cm.", 12900),
    ("bicycle-bell", "Bicycle bell", "One clear note, impossible to ignore.", 2450),
)


def upgrade() -> None:
    products = op.create_table(
        "products",
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sku", name="products_pkey"),
        sa.CheckConstraint("price > 0", name="products_price_positive"),
        sa.CheckConstraint("currency = 'EUR'", name="products_currency_known"),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("payment_id", sa.Uuid(), nullable=True),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("links", JSONB(), nullable=False),
        sa.Column("databases", JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="orders_pkey"),
        sa.UniqueConstraint("caller", "idempotency_key", name="orders_key_once_per_caller"),
        sa.UniqueConstraint("payment_id", name="orders_payment_once"),
        sa.CheckConstraint("caller LIKE 'spiffe://%'", name="orders_caller_is_spiffe_id"),
        sa.CheckConstraint("status IN ('pending', 'paid', 'declined')", name="orders_status_known"),
        sa.CheckConstraint("(status = 'paid') = (payment_id IS NOT NULL)", name="orders_paid_has_payment"),
        sa.CheckConstraint("status <> 'declined' OR reason IS NOT NULL", name="orders_declined_has_reason"),
        sa.CheckConstraint("status <> 'paid' OR reason IS NULL", name="orders_paid_needs_no_reason"),
        sa.CheckConstraint("total > 0", name="orders_total_positive"),
        sa.CheckConstraint("currency = 'EUR'", name="orders_currency_known"),
    )
    op.create_index(
        "orders_pending_idx", "orders", ["next_attempt_at"], postgresql_where=sa.text("status = 'pending'")
    )
    op.create_index("orders_caller_created_at_idx", "orders", ["caller", sa.text("created_at DESC")])
    op.create_table(
        "order_items",
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("unit_price", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("order_id", "position", name="order_items_pkey"),
        sa.ForeignKeyConstraint(["order_id"], ["orders.id"], name="order_items_order_id_fkey"),
        sa.ForeignKeyConstraint(["sku"], ["products.sku"], name="order_items_sku_fkey"),
        sa.UniqueConstraint("order_id", "sku", name="order_items_product_once_per_order"),
        sa.CheckConstraint("quantity BETWEEN 1 AND 99", name="order_items_quantity_in_range"),
        sa.CheckConstraint("unit_price > 0", name="order_items_unit_price_positive"),
    )
    _keep_totals_true()
    op.bulk_insert(
        products,
        [
            {"sku": sku, "name": name, "description": description, "price": price, "currency": "EUR"}
            for sku, name, description, price in CATALOGUE
        ],
    )
    _grant()


def _keep_totals_true() -> None:
    # Deferred to the commit: within the transaction the order exists before its lines do.
    op.execute("""
        CREATE FUNCTION order_total_is_true() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            this uuid := to_jsonb(NEW) ->> TG_ARGV[0];
            said bigint := (SELECT total FROM orders WHERE id = this);
            lines bigint := (SELECT coalesce(sum(quantity * unit_price), 0) FROM order_items
                             WHERE order_id = this);
        BEGIN
            IF said IS DISTINCT FROM lines THEN
                RAISE EXCEPTION 'order %: its total is %, its lines say %', this, said, lines
                    USING ERRCODE = 'integrity_constraint_violation';
            END IF;
            RETURN NULL;
        END $$
    """)
    for table, order in (("orders", "id"), ("order_items", "order_id")):
        op.execute(f"""
            CREATE CONSTRAINT TRIGGER {table}_total_is_true AFTER INSERT ON {table}
                DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION order_total_is_true('{order}')
        """)


def _grant() -> None:
    """Give the application what it needs and no more: what was ordered, and for how much, is final."""
    for table in ("products", "orders", "order_items", "alembic_version"):
        op.execute(f"REVOKE ALL ON {table} FROM PUBLIC, {APPLICATION_ROLE}")
        op.execute(f"GRANT SELECT ON {table} TO {APPLICATION_ROLE}")
    for table in ("orders", "order_items"):
        op.execute(f"GRANT INSERT ON {table} TO {APPLICATION_ROLE}")
    op.execute(
        "GRANT UPDATE (status, reason, payment_id, attempts, next_attempt_at, links, databases, settled_at) "
        f"ON orders TO {APPLICATION_ROLE}"
    )

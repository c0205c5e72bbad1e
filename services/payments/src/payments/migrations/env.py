"""Alembic's entry point: runs the steps on the connection that `ztmtls.migrations` opened."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

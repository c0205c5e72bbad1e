"""The schema of the payments database, one step a file; `python -m payments migrate` runs them."""

from ztmtls.migrations import Migrations

MIGRATIONS = Migrations(__name__, owner="payments_owner")

"""The schema of the orders database, one step a file; `python -m orders migrate` runs them."""

from ztmtls.migrations import Migrations

MIGRATIONS = Migrations(__name__, owner="orders_owner")

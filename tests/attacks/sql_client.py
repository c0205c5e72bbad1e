"""An attacker with a database login: connects over TLS, and runs one statement.

One errand as JSON on standard input: `connect` (libpq's parameters) and `statement`. One answer on standard
output: the SQLSTATE and message of what PostgreSQL refused.
"""

from __future__ import annotations

import json
import sys

import psycopg


def main() -> None:
    errand = json.load(sys.stdin)
    try:
        with psycopg.connect(**errand["connect"]) as connection:
            connection.execute(errand["statement"])
    except psycopg.Error as error:
        json.dump({"error": str(error), "reason": error.sqlstate}, sys.stdout)
    else:
        json.dump({"status": 200}, sys.stdout)


if __name__ == "__main__":
    main()

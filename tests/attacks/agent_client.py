"""An attacker at the Workload API: asks one socket for an X509-SVID, and says what came.

One errand as JSON on standard input, `{"socket": "unix:///..."}`; one answer on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc

TIMEOUT = 10.0


def main() -> None:
    errand = json.load(sys.stdin)
    with grpc.insecure_channel(errand["socket"]) as channel:
        fetch: Any = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
        try:
            next(fetch(b"", metadata=(("workload.spiffe.io", "true"),), timeout=TIMEOUT))
        except grpc.RpcError as error:
            json.dump({"error": error.details(), "reason": error.code().name}, sys.stdout)
        else:
            json.dump({"status": 200}, sys.stdout)


if __name__ == "__main__":
    main()

"""What it costs, by order of magnitude: USD a month in eu-central-1, running all the time.

Prices are not asked for: they are those of the table in docs/eks.md, which a test holds against these.
"""

from __future__ import annotations

from .settings import Settings

_SIZES = {"medium": 1, "large": 2, "xlarge": 4}


def monthly(settings: Settings) -> list[tuple[str, int]]:
    """What each thing costs that the settings ask for. A database of a class that is not known here counts as
    one of the smallest."""
    nodes = int(settings.parameter("NodeCount"))
    size = settings.parameter("NodeSize")
    zones = 3 if settings.parameter("EndpointsInEveryZone") == "true" else 1
    standby = 2 if settings.parameter("DatabaseStandby") == "true" else 1
    return [
        ("the cluster's control plane", 73),
        (f"{nodes} nodes ({size}), with 24 GB of disk each", 30 * nodes * _SIZES.get(size, 1)),
        (f"nine endpoints of AWS in {zones} of three zones", 80 * zones),
        (f"two databases ({settings.parameter('DatabaseClass')}), 20 GB each", 35 * standby),
        ("keys: cluster, data, secrets, signatures", 4),
        ("secrets: six of ours, two of RDS", 4),
        ("logs of the control plane and of refused connections", 10),
        ("SPIRE's volume", 1),
        *([("the door: load balancer, firewall, an endpoint", 40)] if settings.door else []),
    ]

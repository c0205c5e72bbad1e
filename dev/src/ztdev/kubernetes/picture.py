"""Draw what an overlay's network policies allow: `python -m ztdev.kubernetes.picture k8s/overlays/local`.

It is written to arrows.md of the overlay, as a diagram and a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ztdev.errors import StackError

from .kubectl import rendered
from .reach import Arrow, Place, Port, arrows

DNS = "kube-system/kube-dns"

_TEXT = """# Who may connect to whom

What the network policies of this overlay allow, of all pairs of pods and ports: nothing else connects. The
diagram leaves out that all ask `{dns}` for names. Pods on the network of their node (SPIRE's agent)
are not pods to a policy. Written by `make arrows`.

```mermaid
flowchart LR
{edges}
```

| from | to | ports |
|---|---|---|
{rows}
"""


def beyond(overlay: Path) -> list[Place]:
    """Who is no pod of ours, as beyond.yaml of the overlay says."""
    return [
        Place(
            each["name"],
            each.get("namespace", ""),
            tuple(each.get("labels", {}).items()),
            tuple(Port(int(number), protocol.upper()) for number, protocol in map(_split, each["ports"])),
            each.get("address", ""),
            each.get("calls", False),
        )
        for each in yaml.safe_load((overlay / "beyond.yaml").read_text())
    ]


def _split(port: str) -> tuple[str, str]:
    number, _, protocol = port.partition("/")
    return number, protocol


def picture(allowed: Sequence[Arrow]) -> str:
    """The text of arrows.md."""
    ports: dict[tuple[str, str], list[str]] = {}
    for arrow in allowed:
        ports.setdefault((arrow.sender, arrow.receiver), []).append(arrow.port)
    edges = [
        f"  {_node(sender)} -->|{'<br>'.join(at)}| {_node(receiver)}"
        for (sender, receiver), at in ports.items()
        if receiver != DNS
    ]
    rows = [f"| {sender} | {receiver} | {', '.join(at)} |" for (sender, receiver), at in ports.items()]
    return _TEXT.format(dns=DNS, edges="\n".join(edges), rows="\n".join(rows))


def _node(name: str) -> str:
    key = "".join(letter if letter.isalnum() else "_" for letter in name)
    return f'{key}["{name}"]'


def main() -> int:
    """Write the picture of each overlay that is named."""
    parser = argparse.ArgumentParser(
        prog="python -m ztdev.kubernetes.picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("overlay", type=Path, nargs="+")
    try:
        for overlay in parser.parse_args().overlay:
            (overlay / "arrows.md").write_text(picture(arrows(rendered(overlay), beyond(overlay))))
            print(overlay / "arrows.md")
    except StackError as error:
        print(error, file=sys.stderr)
        return int(error.exit_status)
    return 0


if __name__ == "__main__":
    sys.exit(main())

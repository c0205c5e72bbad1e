"""The command `ztmtls`, run as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CONSOLE_SCRIPT = str(Path(sys.executable).with_name("ztmtls"))


def environment(**changes: str) -> dict[str, str]:
    """Ours, without what would change the command's answers."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SPIFFE_ENDPOINT_SOCKET", "NO_COLOR")}
    return kept | changes


def ztmtls(
    *arguments: object, cwd: Path = REPOSITORY, timeout: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ztmtls`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ztmtls", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=timeout,
        check=False,
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON document it printed; it must have said nothing else."""
    assert done.stderr == ""
    return json.loads(done.stdout)

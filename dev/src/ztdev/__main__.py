"""`ztdev`, also as `python -m ztdev`."""

from __future__ import annotations

import sys

from .cli import main as run


def main() -> None:
    """Entry point: exits with the status of the command."""
    sys.exit(run())


if __name__ == "__main__":
    main()

"""Build the API reference from the docstrings: ``python libs/ztmtls/docs/reference.py build/docs``.

A warning of the generator (an annotation or a name that it can't resolve) ends it.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pdoc
import pdoc.render

import ztmtls

# Commands are described in the pages; what stands behind them is not for import.
HIDDEN = ("ztmtls.cli.", "ztmtls.__main__.", "ztmtls.testing.__main__.")
# Their names are loaded on first use, which pdoc does not wait for.
LAZY = ("ztmtls", "ztmtls.testing")


def modules() -> list[str]:
    """The public modules. pdoc by itself takes only those that the package's ``__all__`` names."""
    found = ["ztmtls", *(module.name for module in walk_packages(ztmtls.__path__, "ztmtls."))]
    return [name for name in found if not f"{name}.".startswith(HIDDEN)]


def adopt(public: type) -> None:
    """Give a class what it has from private bases: pdoc names what is inherited and does not describe it."""
    for base in public.__mro__[1:]:
        if base.__module__.startswith("ztmtls.") and base.__name__.startswith("_"):
            for name, member in vars(base).items():
                if not name.startswith("_") and name not in vars(public):
                    setattr(public, name, member)


def build(directory: Path) -> None:
    """Write one page for each module into `directory`."""
    for name in LAZY:
        module = import_module(name)
        for public in module.__all__:
            setattr(module, public, getattr(module, public))
    for name in modules():
        module = import_module(name)
        vars(module).pop("logger", None)  # each has one; it is nobody's to use
        for found in vars(module).values():
            if isinstance(found, type) and found.__module__ == name:
                adopt(found)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*modules(), output_directory=directory)


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    # gRPC's classes take parameters in type stubs only, and what we inherit may have names for type checkers
    # alone: such annotations are shown as they are written.
    warnings.filterwarnings("ignore", message=r"Error parsing type annotation .*\bgrpc\.")
    warnings.filterwarnings("ignore", message=r"Error parsing type annotation .* for (?!ztmtls\.)")
    build(Path(sys.argv[1]))

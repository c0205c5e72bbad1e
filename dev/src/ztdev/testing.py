"""One stack for all the tests of a session that want one, whichever folder they are in.

@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    with shared_stack(lambda: tmp_path_factory.mktemp("stack")) as stack:
        yield stack
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .options import StackOptions
from .stack import BackgroundStack

_running: BackgroundStack | None = None
_users = 0


@contextmanager
def shared_stack(make_directory: Callable[[], Path]) -> Iterator[BackgroundStack]:
    """The stack of this process: started for the first user, on free ports, stopped after the last one.

    `make_directory` gives it a state directory when it is started.
    """
    global _running, _users
    if _running is None:
        started = BackgroundStack(StackOptions(state_dir=make_directory(), free_ports=True))
        started.start()
        _running = started
    _users += 1
    try:
        yield _running
    finally:
        _users -= 1
        if _users == 0:
            stopped, _running = _running, None
            stopped.close()

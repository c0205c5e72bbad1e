"""What tests of several folders share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.attacks.proof import write_page
from ztdev.options import StackOptions
from ztdev.stack import BackgroundStack

# A shell that runs the tests in the background lets them ignore Ctrl-C, and so every program that they start:
# those that should end by it would not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundStack]:
    """The whole stack on free ports, with data of its own and the attack lab on its page. Its coroutines are
    called through `stack.run`.

    It rotates the database passwords when a test asks for it, and not while another one looks at them.
    """
    state = tmp_path_factory.mktemp("stack")
    write_page(state / "pillars.json", {})
    options = StackOptions(
        state_dir=state,
        free_ports=True,
        rotate_every=0,
        lab="tests.attacks.serve",
        proofs=state / "pillars.json",
    )
    with BackgroundStack(options) as stack:
        yield stack

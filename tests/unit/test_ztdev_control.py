"""What commands ask of the supervisor."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ztdev.control import SOCKET, Control, ask
from ztdev.errors import NotRunning, StackError


async def twice(request: Mapping[str, Any]) -> Any:
    return request["number"] * 2


async def fails(request: Mapping[str, Any]) -> Any:
    raise StackError("It is Sunday.")


async def takes_long(request: Mapping[str, Any]) -> Any:
    await asyncio.Event().wait()


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[Path]:
    control = Control(tmp_path, {"twice": twice, "fails": fails, "takes long": takes_long})
    await control.start()
    yield tmp_path
    await control.close()


async def test_an_answer_comes_back(directory: Path) -> None:
    assert await asyncio.to_thread(ask, directory, "twice", timeout=10, number=21) == 42


async def test_what_cannot_be_done_is_raised_where_it_was_asked(directory: Path) -> None:
    with pytest.raises(StackError, match=r"^It is Sunday\.$"):
        await asyncio.to_thread(ask, directory, "fails", timeout=10)


async def test_a_question_that_is_not_known_gets_an_answer(directory: Path) -> None:
    with pytest.raises(StackError, match="another version"):
        await asyncio.to_thread(ask, directory, "juggle", timeout=10)


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b'{"ask": []}\n', b"\xff\n", b'"' + b"x" * 70_000 + b'"\n'])
async def test_nonsense_does_not_stop_it(directory: Path, line: bytes) -> None:
    def send() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(directory / SOCKET))
            connection.sendall(line)
            while connection.recv(1000):
                pass

    await asyncio.to_thread(send)

    assert await asyncio.to_thread(ask, directory, "twice", timeout=10, number=1) == 2


async def test_patience_has_an_end(directory: Path) -> None:
    with pytest.raises(StackError, match="not answered"):
        await asyncio.to_thread(ask, directory, "takes long", timeout=0.2)


async def test_nobody_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        await asyncio.to_thread(ask, tmp_path, "twice", timeout=10, number=1)


async def test_closing_ends_what_is_being_asked(tmp_path: Path) -> None:
    control = Control(tmp_path, {"takes long": takes_long})
    await control.start()
    asking = asyncio.create_task(asyncio.to_thread(ask, tmp_path, "takes long", timeout=30))
    while not control._answering:
        await asyncio.sleep(0.01)

    await control.close()

    with pytest.raises(NotRunning):
        await asking

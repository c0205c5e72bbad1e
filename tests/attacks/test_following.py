"""Logs that are followed: each line once, its number for ever, also when the log is rotated meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.attacks.following import Followed
from ztdev.logfile import LogFile


def numbered(text: str) -> list[dict[str, Any]]:
    return [{"number": int(text)}] if text.isdigit() else []


def numbers(followed: Followed) -> list[int]:
    return [line["number"] for line in followed()]


def test_lines_from_now_on_or_from_the_beginning(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.feed(b"1\n2\n")
    now, all_of_it = Followed(log.path, numbered), Followed(log.path, numbered, from_the_beginning=True)
    log.feed(b"no number\n3\n4")
    assert (numbers(now), numbers(all_of_it)) == ([3], [1, 2, 3])
    log.feed(b"4\n")
    assert (numbers(now), numbers(all_of_it)) == ([3, 44], [1, 2, 3, 44])


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    followed = Followed(tmp_path / "a.log", numbered)
    assert followed() == []
    LogFile(tmp_path / "a.log").feed(b"1\n")
    assert numbers(followed) == [1]


def test_lines_before_and_after_a_rotation(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", max_bytes=64, backups=2)
    followed = Followed(log.path, numbered)
    for number in range(1000):
        log.feed(b"%d\n" % number)
        if number % 7 == 0:
            followed()
    assert numbers(followed) == list(range(1000))

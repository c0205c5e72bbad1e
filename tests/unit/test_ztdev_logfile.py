"""Logs of the processes: whole lines, bounded size, readable for people."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ztdev.logfile import MAX_LINE, LogFile
from ztdev.logview import readable


def test_lines_are_whole_however_the_output_arrives(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    for piece in (b"fir", b"st\nsec", b"ond\n", b"last"):
        log.feed(piece)
    assert list(log.lines()) == ["first", "second"]
    log.end_of_output()
    assert list(log.lines()) == ["first", "second", "last"]
    assert log.tail(2) == ["second", "last"]
    log.close()


def test_rotation_keeps_the_newest_lines_in_order(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", max_bytes=100, backups=2)
    for number in range(100):
        log.feed(b"line %04d\n" % number)
    kept = list(log.lines())
    assert kept == [f"line {number:04d}" for number in range(100 - len(kept), 100)]
    assert 20 <= len(kept) <= 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    log.close()


def test_new_run_starts_a_new_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    yesterday = LogFile(path)
    yesterday.feed(b"yesterday\n")
    yesterday.close()
    today = LogFile(path)
    today.feed(b"today\n")
    assert list(today.lines()) == ["today"]
    assert (tmp_path / "a.log.1").read_text() == "yesterday\n"
    today.close()


def test_log_is_for_its_owner_only(tmp_path: Path) -> None:
    LogFile(tmp_path / "logs" / "a.log").close()
    assert (tmp_path / "logs" / "a.log").stat().st_mode & 0o077 == 0
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0


def test_endless_line_is_cut(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.feed(b"x" * (2 * MAX_LINE + 5))
    log.end_of_output()
    assert [len(line) for line in log.lines()] == [MAX_LINE, MAX_LINE, 5]
    log.close()


def test_full_disk_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path / "a.log")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.feed(b"lost\n")
    log.feed(b"kept\n")
    assert log.dropped == 1
    assert list(log.lines()) == ["kept"]
    assert log.tail() == ["lost", "kept"]
    log.close()


def test_application_line_is_readable() -> None:
    line = (
        '{"time": "2026-01-02T03:04:05.678Z", "log": "app", "level": "error", "logger": "orders.api", '
        '"message": "no answer", "exception": "Traceback\\nBoom"}'
    )
    assert readable(line) == "03:04:05.678 error   orders.api: no answer\nTraceback\nBoom"


def test_audit_line_is_readable() -> None:
    line = (
        '{"time": "2026-01-02T03:04:05.678Z", "log": "audit", "decision": "deny", "event": "request", '
        '"reason": "caller_not_allowed", "method": "POST", "path": "/payments", "status": 403, '
        '"peer_id": "spiffe://zt.example/x"}'
    )
    assert readable(line) == (
        "03:04:05.678 audit deny request caller_not_allowed POST /payments 403 peer spiffe://zt.example/x"
    )


@pytest.mark.parametrize("line", ["Traceback (most recent call last):", "{not json", '{"a": 1', "[1]"])
def test_plain_text_passes_unchanged(line: str) -> None:
    assert readable(line) == line


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert readable("\x1b[31mred\x07") == "\\x1b[31mred\\x07"

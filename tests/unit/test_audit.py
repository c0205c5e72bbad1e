"""Audit lines, ordinary logs and reason codes: one line each, readable by machines, never a secret."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ztmtls import logs
from ztmtls.audit import AuditLog
from ztmtls.hop import HopView
from ztmtls.reasons import Reason, Refusal, printable
from ztmtls.secrets import SecretValue
from ztmtls.svid import IdentitySummary
from ztmtls.testing import CertificateAuthority

CANARY = "Zz-CANARY-%40/:#"

HOP = HopView(
    side="callee",
    own=IdentitySummary("spiffe://zt.example/ns/zt-demo/sa/orders", "0a", "2026-05-01T12:00:00Z"),
    peer=IdentitySummary("spiffe://zt.example/ns/zt-demo/sa/frontend", "0b", "2026-05-01T13:00:00Z"),
    authority="0c",
    tls_version="TLSv1.3",
    cipher="TLS_AES_256_GCM_SHA384",
    generation=7,
    connection="c-1",
    rule="frontend-reads",
)


def line_of(stream: io.StringIO) -> dict[str, Any]:
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert text.isascii()
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def audit(stream: io.StringIO) -> AuditLog:
    return AuditLog("orders", stream)


# -- What a status page is told -------------------------------------------------------------------------


def test_a_request_counts_once_whatever_the_application_made_of_it(audit: AuditLog) -> None:
    for _ in range(3):
        audit.record("request", "allow", hop=HOP)
    audit.record("application", "deny", reason=Reason.CONFLICT, hop=HOP)
    audit.record("application", "allow", hop=HOP, replayed=True)
    audit.record("request", "deny", reason=Reason.CALLER_NOT_ALLOWED, method="M" * 999, path="/" * 999)
    report = audit.report()
    assert (report["allowed"], report["denied"]) == (2, 2)
    assert [denial["reason"] for denial in report["latest"]] == ["conflict", "caller_not_allowed"]
    assert report["latest"][0]["peer_id"] == HOP.peer.id
    assert len(report["latest"][1]["method"]) == len(report["latest"][1]["path"]) == 256


# -- Audit lines ----------------------------------------------------------------------------------------


def test_allowed_request_shows_both_identities(audit: AuditLog, stream: io.StringIO) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    audit.record("request", "allow", hop=HOP, method="GET", path="/orders", status=200)

    line = line_of(stream)

    moment = line.pop("time")
    assert moment.endswith("Z")
    assert before <= datetime.fromisoformat(moment) <= datetime.now(UTC)
    assert line == {
        "log": "audit", "service": "orders", "event": "request", "decision": "allow", "reason": None,
        "side": "callee", "own_id": HOP.own.id, "own_serial": "0a", "peer_id": HOP.peer.id,
        "peer_serial": "0b", "peer_not_after": "2026-05-01T13:00:00Z", "authority": "0c",
        "rule": "frontend-reads", "connection": "c-1", "generation": 7, "method": "GET", "path": "/orders",
        "status": 200,
    }  # fmt: skip


def test_denial_shows_its_reason_code(audit: AuditLog, stream: io.StringIO) -> None:
    audit.record("handshake", "deny", reason=Reason.LEAF_IS_CA, detail="a CA certificate")

    line = line_of(stream)

    assert (line["decision"], line["reason"], line["detail"]) == ("deny", "leaf_is_ca", "a CA certificate")
    assert "peer_id" not in line


def test_denial_without_a_reason_is_an_error_and_no_line(audit: AuditLog, stream: io.StringIO) -> None:
    with pytest.raises(ValueError, match="reason"):
        audit.record("request", "deny", hop=HOP)

    assert stream.getvalue() == ""
    assert not audit.counts


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\r\nb", '","decision":"allow', '\n{"log":"audit","decision":"allow"}', "\0", "\x1b[31m",
     "\u2028", "\u2029", "\x85", "\u202e", "é", "😀", "\ud800", "\\n", "x" * 100_000],
)  # fmt: skip
def test_values_stay_on_their_line(audit: AuditLog, stream: io.StringIO, text: str) -> None:
    audit.record("request", "deny", reason=Reason.ROUTE_NOT_ALLOWED, detail=text, path=text, method=text)

    line = line_of(stream)

    assert (line["detail"], line["path"], line["method"]) == (text, text, text)
    assert line["decision"] == "deny"
    assert len(stream.getvalue().splitlines()) == 1


def test_decisions_are_counted_by_event_outcome_and_reason(audit: AuditLog) -> None:
    audit.record("request", "allow", hop=HOP)
    audit.record("request", "allow", hop=HOP)
    audit.record("request", "deny", reason=Reason.ROUTE_NOT_ALLOWED)
    audit.record("handshake", "deny", reason=Reason.EXPIRED)

    assert audit.counts == {
        ("request", "allow", ""): 2,
        ("request", "deny", "route_not_allowed"): 1,
        ("handshake", "deny", "expired"): 1,
    }


def test_key_material_and_secrets_show_in_no_line(audit: AuditLog, stream: io.StringIO) -> None:
    # Given objects that hold secrets, handed over whole by mistake.
    ca = CertificateAuthority("zt.example")
    svid = ca.issue("spiffe://zt.example/a")
    secret = SecretValue("v1", {"username": "orders_app", "password": CANARY})

    audit.record("credentials", "allow", svid=svid, key=svid.key, context=ca.context(svid), secret=secret)

    text = stream.getvalue()
    line_of(stream)
    assert "CANARY" not in text
    assert "BEGIN" not in text
    assert str(svid.key.private_numbers().private_value) not in text  # type: ignore[union-attr]


def test_lines_of_many_threads_do_not_mix() -> None:
    # Given a stream that takes one character at a time.
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            return sum(super(Slow, self).write(character) for character in text)

    stream = Slow()
    audit = AuditLog("orders", stream)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait(5)
        for i in range(25):
            audit.record("request", "allow", hop=HOP, path=f"/{number}/{i}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    paths = {json.loads(line)["path"] for line in stream.getvalue().splitlines()}
    assert paths == {f"/{number}/{i}" for number in range(8) for i in range(25)}
    assert audit.counts["request", "allow", ""] == 200


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    AuditLog("orders").record("request", "allow", hop=HOP)

    assert json.loads(capsys.readouterr().out)["peer_id"] == HOP.peer.id


def test_each_line_is_written_out_at_once() -> None:
    raw = io.BytesIO()
    audit = AuditLog("orders", io.TextIOWrapper(io.BufferedWriter(raw, 1 << 20), encoding="ascii"))  # type: ignore[type-var,arg-type]

    audit.record("request", "allow", hop=HOP)

    assert raw.getvalue().endswith(b"\n")


# -- Ordinary logs --------------------------------------------------------------------------------------


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    noisy = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in noisy.items():
        logging.getLogger(name).setLevel(before)


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    return logging.LogRecord(
        "orders.app", logging.WARNING, __file__, 1, message, args, **{"exc_info": None} | more
    )


def test_log_line_is_one_json_object() -> None:
    line = logs.JsonFormatter("orders").format(record("got %s\nand %d", "a\nb", 7))

    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "log": "app", "service": "orders", "level": "warning", "logger": "orders.app",
        "message": "got a\nb\nand 7",
    }  # fmt: skip


def test_exception_is_part_of_its_line() -> None:
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        line = logs.JsonFormatter("orders").format(record("failed", exc_info=(type(error), error, None)))

    assert "\n" not in line
    assert "RuntimeError: first\nsecond" in json.loads(line)["exception"]


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("level", ["debug", "info", "error"])
def test_wire_logs_stay_silent_at_every_level(capsys: pytest.CaptureFixture[str], level: str) -> None:
    logs.setup("orders", level)

    for name in ("botocore.endpoint", "botocore", "urllib3.connectionpool", "httpx", "httpcore.connection",
                 "boto3", "uvicorn.access"):  # fmt: skip
        logging.getLogger(name).info("Authorization: %s", CANARY)
        logging.getLogger(name).debug("Authorization: %s", CANARY)
    logging.getLogger("orders").error("done")

    out = capsys.readouterr().out
    assert "CANARY" not in out
    assert [json.loads(line)["message"] for line in out.splitlines()] == ["done"]


@pytest.mark.usefixtures("logging_as_it_was")
def test_logs_begin_at_the_level_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("orders", "warning")

    logging.getLogger("orders").info("not this")
    logging.getLogger("orders").warning("but this")

    assert json.loads(capsys.readouterr().out)["message"] == "but this"


# -- Reason codes and untrusted text --------------------------------------------------------------------


def test_reason_codes_are_words_for_machines() -> None:
    for reason in Reason:
        assert reason == reason.name.lower()
        assert f"{reason}" == reason.value
        assert json.dumps(reason) == f'"{reason.value}"'


def test_reason_codes_that_alerts_are_built_on_are_there() -> None:
    assert {str(reason) for reason in Reason} >= {
        "no_certificate", "malformed_certificate", "no_uri_san", "multiple_uri_sans", "invalid_spiffe_id",
        "root_path_id", "leaf_is_ca", "leaf_can_sign_certificates", "leaf_can_sign_crls",
        "leaf_without_digital_signature", "unknown_trust_domain", "untrusted_authority", "expired",
        "not_yet_valid", "chain_too_long", "session_resumed", "not_tls", "tls_failure", "caller_not_allowed",
        "route_not_allowed", "ambiguous_path", "no_peer", "identity_expired", "no_identity",
        "identity_denied", "wrong_server_identity", "refused_by_server", "refused_by_caller",
        "invalid_request",
        "idempotency_key_missing", "idempotency_key_invalid", "idempotency_key_reused", "not_found",
        "conflict", "internal_error", "dependency_unavailable", "payment_unknown", "payment_declined",
        "csrf_failed", "web_identity_missing", "web_identity_conflict", "web_identity_refused",
        "secret_denied", "secret_unavailable", "secret_malformed",
    }  # fmt: skip


def test_refusal_reads_as_reason_and_detail() -> None:
    refusal = Refusal(Reason.EXPIRED, "the SVID expired")

    assert str(refusal) == "expired: the SVID expired"
    assert (refusal.reason, refusal.detail) == (Reason.EXPIRED, "the SVID expired")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("a\nb", r"a\nb"), ("a\0b", r"a\x00b"), ("\x1b[0m", r"\x1b[0m"), ("é", r"\xe9"),
     ("\u2028", r"\u2028"), ("😀", r"\U0001f600"), ("\ud800", r"\ud800"), ("a\\b", r"a\\b"), ("", "")],
)  # fmt: skip
def test_untrusted_text_is_shown_on_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_untrusted_text_is_cut() -> None:
    assert printable("x" * 256) == "x" * 256
    assert printable("x" * 257) == "x" * 256 + "…"
    assert len(printable("\n" * 10_000, 16)) == 17


def test_flood_of_refused_handshakes_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [100.0]
    monkeypatch.setattr("ztmtls.audit.time.monotonic", lambda: now[0])
    audit = AuditLog("orders", stream)
    for _ in range(1000):
        audit.record("handshake", "deny", reason=Reason.NO_CERTIFICATE)
    audit.record("handshake", "deny", reason=Reason.EXPIRED)
    for _ in range(50):
        audit.record("request", "deny", reason=Reason.CALLER_NOT_ALLOWED)
    now[0] = 101.0
    audit.record("handshake", "deny", reason=Reason.NO_CERTIFICATE)

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    refused = [line for line in lines if line["reason"] == Reason.NO_CERTIFICATE]
    assert len(refused) == AuditLog.HANDSHAKES_PER_SECOND + 1
    assert refused[-1]["suppressed"] == 1000 - AuditLog.HANDSHAKES_PER_SECOND
    assert [line["reason"] for line in lines].count(Reason.EXPIRED) == 1, "another reason is not drowned"
    assert [line["reason"] for line in lines].count(Reason.CALLER_NOT_ALLOWED) == 50, "verified callers: all"
    assert audit.counts["handshake", "deny", Reason.NO_CERTIFICATE] == 1001

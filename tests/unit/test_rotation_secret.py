"""The rotation function without AWS and without a database: what a secret holds, what an event is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rotate_db_credentials import handler
from rotate_db_credentials.database import session
from rotate_db_credentials.failure import Reason, RotationFailed
from rotate_db_credentials.secret import DatabaseSecret

CANARY = "Zz-CANARY-%40/:#'\\ \""

SECRET: dict[str, Any] = {
    "engine": "postgres",
    "host": "db.example",
    "port": 5432,
    "dbname": "orders",
    "username": "orders_app",
    "password": CANARY,
    "masterarn": "arn:aws:secretsmanager:eu-central-1:111122223333:secret:rotator",
}


def secret(**changes: Any) -> DatabaseSecret:
    return DatabaseSecret.from_json(json.dumps(SECRET | changes), "it")


def test_a_secret_is_written_as_it_was_read() -> None:
    assert json.loads(secret().to_json()) == SECRET


def test_the_twin_of_the_twin_is_the_first_again() -> None:
    second = secret().for_twin("next")

    assert (second.username, second.password) == ("orders_app_clone", "next")
    assert second.place == secret().place
    assert second.for_twin(CANARY) == secret()


def test_a_user_name_that_leaves_no_room_for_its_twin_is_refused() -> None:
    assert len(secret(username="a" * 57).twin) == 63

    with pytest.raises(RotationFailed, match="username"):
        secret(username="a" * 58).for_twin("next")


@pytest.mark.parametrize("port", [5432, "5432"])
def test_a_port_is_a_number_or_its_text(port: object) -> None:
    assert secret(port=port).port == 5432


@pytest.mark.parametrize("port", [0, 65536, -1, "", "5432 ", "٥٤٣٢", 5432.0, None, True, [5432]])
def test_what_is_no_port_is_refused(port: object) -> None:
    with pytest.raises(RotationFailed, match="port") as refused:
        secret(port=port)

    assert refused.value.reason is Reason.SECRET_MALFORMED


def test_no_password_is_in_a_repr_or_a_refusal() -> None:
    assert "CANARY" not in repr(secret())
    for fault in ({"host": ""}, {"username": CANARY}, {"masterarn": [CANARY]}, {"password": CANARY * 100}):
        with pytest.raises(RotationFailed) as refused:
            secret(**fault)
        assert "CANARY" not in str(refused.value)
        assert refused.value.__cause__ is refused.value.__context__ is None


def test_no_text_of_the_secret_is_in_the_context_of_the_refusal() -> None:
    """A JSONDecodeError holds the document."""
    with pytest.raises(RotationFailed) as refused:
        DatabaseSecret.from_json("{" + CANARY, "it")

    assert refused.value.__cause__ is refused.value.__context__ is None


def test_without_the_authorities_there_is_no_connection(tmp_path: Path) -> None:
    with pytest.raises(RotationFailed) as refused, session(secret(), tmp_path / "none.pem"):
        pass

    assert refused.value.reason is Reason.CA_FILE_MISSING


@pytest.mark.parametrize(
    "event",
    [
        None,
        "createSecret",
        [],
        {},
        {"Step": "createSecret"},
        {"Step": 1, "SecretId": "a", "ClientRequestToken": "b"},
    ],
)
def test_what_is_no_event_is_refused_and_logged(event: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RotationFailed) as refused:
        handler.lambda_handler(event, None)

    assert refused.value.reason is Reason.EVENT_MALFORMED
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["outcome"], line["reason"]) == ("rotation", "failed", "event_malformed")

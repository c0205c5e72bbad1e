"""What Lambda calls: one step of a rotation, and one line of JSON about it on standard error."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config

from .failure import Reason, RotationFailed
from .rotation import Rotation

#: In the package, unless DB_CA_FILE names another (a layer's is below /opt).
PACKAGED_CA_FILE = Path(__file__).resolve().parent.parent / "database-ca.pem"


def lambda_handler(event: Any, context: object) -> None:
    """Do the step that Secrets Manager asks for.

    Args:
        event: ``Step``, ``SecretId`` (ARN) and ``ClientRequestToken``, as Secrets Manager sends them.

    Raises:
        RotationFailed: Lambda hands it to Secrets Manager, which tries again.
    """
    step = token = secret_id = None
    try:
        step, secret_id, token = _read(event)
        ca_file = Path(os.environ.get("DB_CA_FILE") or PACKAGED_CA_FILE)
        done = Rotation(_secrets_manager(), secret_id, token, ca_file).run(step)
    except RotationFailed as failed:
        _log(step, secret_id, token, outcome="failed", reason=str(failed.reason), detail=failed.detail)
        raise
    _log(step, secret_id, token, outcome="done", detail=done)


def _read(event: Any) -> tuple[str, str, str]:
    members = event if isinstance(event, dict) else {}
    step, secret_id, token = (members.get(name) for name in ("Step", "SecretId", "ClientRequestToken"))
    for member in (step, secret_id, token):
        if not isinstance(member, str) or not 0 < len(member) <= 2048:
            raise RotationFailed(Reason.EVENT_MALFORMED, "Step, SecretId and ClientRequestToken are needed")
    return str(step), str(secret_id), str(token)


@functools.cache
def _secrets_manager() -> Any:
    config = Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 3})
    make: Any = botocore.session.get_session().create_client
    return make("secretsmanager", config=config)


def _log(step: str | None, secret_id: str | None, token: str | None, **more: str) -> None:
    line = {"event": "rotation", "step": step, "secret_id": secret_id, "version": token, **more}
    print(json.dumps(line), file=sys.stderr, flush=True)

"""The four steps of a rotation by alternating users, each of which can be cut off anywhere and run again.

The secret has the login of one of two database roles, `X` or `X_clone`. A rotation makes a version for the
other one (createSecret), sets that one's password (setSecret), logs in with it (testSecret) and makes the
version the current one (finishSecret). The role in use is never touched, so a rotation that stops halfway
harms nobody: what AWSCURRENT names goes on working.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from . import database
from .failure import Reason, RotationFailed
from .secret import DatabaseSecret

CURRENT, PENDING = "AWSCURRENT", "AWSPENDING"

#: 40 letters and digits are 238 bits, and nothing that a shell, a URL or a connection string would mangle.
PASSWORD = {"PasswordLength": 40, "ExcludePunctuation": True, "RequireEachIncludedType": True}


class Rotation:
    """The rotation of one secret to one version.

    Args:
        secrets_manager: botocore's client.
        secret_id: ARN of the secret.
        token: ClientRequestToken, the ID of the version that is being made.
        ca_file: PEM file with the authorities that the database's certificate may come from.
    """

    def __init__(self, secrets_manager: Any, secret_id: str, token: str, ca_file: Path) -> None:
        self._client = secrets_manager
        self._secret_id = secret_id
        self._token = token
        self._ca_file = ca_file

    def run(self, step: str) -> str:
        """Do one step. The answer says in a few words what was done, with the user's name.

        Raises:
            RotationFailed: it could not be done. Nothing was promoted; the step can be run again.
        """
        action = _STEPS.get(step)
        if action is None:
            raise RotationFailed(Reason.EVENT_MALFORMED, "the step is none of " + ", ".join(_STEPS))
        stages = self._stages()
        if CURRENT in stages[self._token] and step != "finishSecret":
            return "this version is current already: nothing to do"
        if PENDING not in stages[self._token] and CURRENT not in stages[self._token]:
            raise RotationFailed(Reason.VERSION_NOT_PENDING, f"version {self._token} is not {PENDING}")
        return action(self)

    # -- the steps

    def _create_secret(self) -> str:
        current = self._read(CURRENT)
        pending = self._read_pending()
        if pending is None:
            password = self._call("get_random_password", **PASSWORD)["RandomPassword"]
            self._put(current.for_twin(password))
            pending = self._read_pending()
            done = "made a version for"
        else:
            done = "there is a version already for"
        if pending is None:
            raise RotationFailed(Reason.AWS_REFUSED, "the version that was put is not there")
        return f"{done} {self._checked_twin(current, pending).username}"

    def _set_secret(self) -> str:
        pending = self._checked_twin(*self._both())
        superuser = self._superuser(pending)
        with database.session(superuser, self._ca_file) as connection:
            database.set_password(connection, pending)
        return f"set the password of {pending.username}"

    def _test_secret(self) -> str:
        current, pending = self._both()
        # When a schedule is set up, Secrets Manager tries this step with a version of its own: no twin.
        if pending != current:
            self._checked_twin(current, pending)
        with database.session(pending, self._ca_file) as connection:
            lacking = database.roles_lacking(connection, pending.username, current.username)
        if lacking:
            raise RotationFailed(
                Reason.GRANTS_MISSING,
                f"{pending.username} is no member of {', '.join(lacking)}, as {current.username} is",
            )
        return f"{pending.username} can log in"

    def _finish_secret(self) -> str:
        stages = self._stages()
        before = next((version for version, labels in stages.items() if CURRENT in labels), None)
        if before is None:
            raise RotationFailed(Reason.VERSION_UNKNOWN, f"no version is {CURRENT}")
        if before != self._token:
            # What cannot log in is never promoted, whoever calls and in whatever order.
            self._test_secret()
            # One call moves both labels: AWSCURRENT to this version, AWSPREVIOUS to the one that had it.
            self._call(
                "update_secret_version_stage",
                SecretId=self._secret_id,
                VersionStage=CURRENT,
                MoveToVersionId=self._token,
                RemoveFromVersionId=before,
            )
            stages = self._stages()
        if PENDING in stages[self._token]:
            self._call(
                "update_secret_version_stage",
                SecretId=self._secret_id,
                VersionStage=PENDING,
                RemoveFromVersionId=self._token,
            )
        return "this version is current"

    # -- Secrets Manager

    def _stages(self) -> dict[str, list[str]]:
        """Labels by version, after the checks that keep anybody else's event out."""
        described = self._call("describe_secret", SecretId=self._secret_id)
        if not described.get("RotationEnabled"):
            raise RotationFailed(Reason.ROTATION_NOT_ENABLED, f"{self._secret_id} is not set up for rotation")
        stages: dict[str, list[str]] = described.get("VersionIdsToStages", {})
        if self._token not in stages:
            raise RotationFailed(
                Reason.VERSION_UNKNOWN, f"the token is no version of {self._secret_id} that has a label"
            )
        return stages

    def _both(self) -> tuple[DatabaseSecret, DatabaseSecret]:
        current, pending = self._read(CURRENT), self._read_pending()
        if pending is None:
            raise RotationFailed(Reason.VERSION_NOT_PENDING, f"version {self._token} has no value yet")
        return current, pending

    def _checked_twin(self, current: DatabaseSecret, pending: DatabaseSecret) -> DatabaseSecret:
        same_place = pending.place == current.place and pending.superuser_arn == current.superuser_arn
        if pending.username != current.twin or not same_place:
            raise RotationFailed(
                Reason.SECRETS_DISAGREE,
                f"version {self._token} is not for {current.twin} of the database that {CURRENT} names: "
                f"remove {PENDING} from it and rotate anew",
            )
        return pending

    def _superuser(self, secret: DatabaseSecret) -> DatabaseSecret:
        """The login that sets passwords. It must be in the same database: no secret may send it elsewhere."""
        if not secret.superuser_arn:
            raise RotationFailed(Reason.SECRET_MALFORMED, f"version {self._token} has no masterarn")
        value = self._call("get_secret_value", SecretId=secret.superuser_arn, VersionStage=CURRENT)
        superuser = DatabaseSecret.from_json(value.get("SecretString", ""), "the secret that masterarn names")
        if superuser.place != secret.place:
            raise RotationFailed(
                Reason.SECRETS_DISAGREE, "the secret that masterarn names is for another database"
            )
        return superuser

    def _read(self, stage: str) -> DatabaseSecret:
        value = self._call("get_secret_value", SecretId=self._secret_id, VersionStage=stage)
        return DatabaseSecret.from_json(value.get("SecretString", ""), f"version {stage}")

    def _read_pending(self) -> DatabaseSecret | None:
        """The version of the token, or None while it has no value."""
        try:
            value = self._call(
                "get_secret_value", SecretId=self._secret_id, VersionId=self._token, VersionStage=PENDING
            )
        except _AwsRefused as refused:
            if refused.code == "ResourceNotFoundException":
                return None
            raise
        return DatabaseSecret.from_json(value.get("SecretString", ""), f"version {PENDING}")

    def _put(self, secret: DatabaseSecret) -> None:
        try:
            self._call(
                "put_secret_value",
                SecretId=self._secret_id,
                ClientRequestToken=self._token,
                SecretString=secret.to_json(),
                VersionStages=[PENDING],
            )
        except _AwsRefused as refused:
            # Another run of this step was quicker; its value is the one that counts.
            if refused.code != "ResourceExistsException":
                raise

    def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client, operation)(**parameters)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
        except BotoCoreError as error:
            code = type(error).__name__
        else:
            return answer
        # Outside of the except block: botocore's exceptions can hold parameters.
        raise _AwsRefused(operation, code)


class _AwsRefused(RotationFailed):
    def __init__(self, operation: str, code: str) -> None:
        super().__init__(Reason.AWS_REFUSED, f"{operation}: {code}")
        self.code = code


_STEPS: dict[str, Callable[[Rotation], str]] = {
    "createSecret": Rotation._create_secret,
    "setSecret": Rotation._set_secret,
    "testSecret": Rotation._test_secret,
    "finishSecret": Rotation._finish_secret,
}

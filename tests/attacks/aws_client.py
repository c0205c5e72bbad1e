"""An attacker with a web-identity token: takes a role with it, and reads a secret.

One errand as JSON on standard input: `endpoint`, `region`, `token`, `role`, `secret`, and `keys` (access key
and secret, to be used without any role) or null. One answer on standard output: the code and message of what
AWS refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError


def main() -> None:
    errand = json.load(sys.stdin)
    try:
        carry_out(errand)
    except ClientError as error:
        told = error.response["Error"]
        json.dump({"error": told["Message"], "reason": told["Code"]}, sys.stdout)
    else:
        json.dump({"status": 200}, sys.stdout)


def carry_out(errand: dict[str, Any]) -> None:
    make: Any = botocore.session.Session().create_client
    place = {"region_name": errand["region"], "endpoint_url": errand["endpoint"]}
    credentials = errand["keys"]
    if credentials is None:
        sts = make("sts", config=Config(signature_version=UNSIGNED, proxies={}), **place)
        credentials = sts.assume_role_with_web_identity(
            RoleArn=errand["role"], RoleSessionName="attacker", WebIdentityToken=errand["token"]
        )["Credentials"]
    secrets = make(
        "secretsmanager",
        config=Config(proxies={}),
        aws_access_key_id=credentials["AccessKeyId"],
        aws_secret_access_key=credentials["SecretAccessKey"],
        aws_session_token=credentials.get("SessionToken"),
        **place,
    )
    secrets.get_secret_value(SecretId=errand["secret"])


if __name__ == "__main__":
    main()

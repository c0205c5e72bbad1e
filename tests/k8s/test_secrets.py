"""Secrets of the cluster, as they are written down."""

from __future__ import annotations

import os
import shlex

from ztdev.kubernetes.kubectl import read, run


def test_a_secret_is_written_down_encrypted() -> None:
    """`K8S_ETCD` is a command that prints the raw value of a key of the cluster's etcd."""
    found = read("secret", "database-administrator", "--namespace", "zt-local")
    assert found["data"]["password"]
    key = "/registry/secrets/zt-local/database-administrator"
    raw = run(*shlex.split(os.environ["K8S_ETCD"]), key)
    assert raw.startswith("k8s:enc:kms:v2:")
    assert "password" not in raw
    account = run(*shlex.split(os.environ["K8S_ETCD"]), "/registry/serviceaccounts/zt-local/data")
    assert "automountServiceAccountToken" not in raw
    assert account.startswith("k8s\0"), "what is not a Secret is readable there"

"""SVIDs on their way into OpenSSL: where the key is while it is loaded, and that nothing of it stays."""

from __future__ import annotations

import os
import ssl
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ztmtls.material import UnusableMaterial, check_bundle, check_svid, load_svid
from ztmtls.reasons import Reason
from ztmtls.svid import X509Bundle
from ztmtls.testing import CertificateAuthority, with_other_key

ID = "spiffe://zt.example/a"


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
def without_memory_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Spy(ssl.SSLContext):
    """Looks at the file that the key is loaded from."""

    seen: tuple[str, int, int]

    def load_cert_chain(self, certfile: Any, *args: Any, **kwargs: Any) -> None:
        file, directory = os.stat(certfile), os.stat(os.path.dirname(certfile))
        self.seen = (str(certfile), stat.S_IMODE(file.st_mode), stat.S_IMODE(directory.st_mode))
        super().load_cert_chain(certfile, *args, **kwargs)


def test_key_is_loaded_from_memory_where_there_are_memory_files(ca: CertificateAuthority) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memory files")
    spy = Spy(ssl.PROTOCOL_TLS_SERVER)
    load_svid(spy, ca.issue(ID))
    assert spy.seen[0].startswith("/proc/self/fd/")


def test_key_is_loaded_from_a_private_file_elsewhere_and_the_file_is_gone(
    ca: CertificateAuthority, without_memory_files: Path
) -> None:
    spy = Spy(ssl.PROTOCOL_TLS_SERVER)
    load_svid(spy, ca.issue(ID))
    path, file_mode, directory_mode = spy.seen
    assert path.startswith(str(without_memory_files))
    assert (file_mode, directory_mode) == (0o600, 0o700)
    assert list(without_memory_files.iterdir()) == []


def test_private_file_is_gone_after_a_failure_too(
    ca: CertificateAuthority, without_memory_files: Path
) -> None:
    check_svid(ca.issue(ID))
    with pytest.raises(UnusableMaterial, match="key values mismatch") as caught:
        check_svid(with_other_key(ca.issue(ID)))
    assert caught.value.reason is Reason.INVALID_UPDATE
    assert list(without_memory_files.iterdir()) == []


def test_empty_bundle_is_usable_and_trusts_nobody(ca: CertificateAuthority) -> None:
    check_bundle(ca.bundle)
    check_bundle(X509Bundle(ca.trust_domain, ()))

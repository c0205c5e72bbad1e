"""SVIDs and bundles on their way into OpenSSL, and whether it takes them.

Two parsers read every certificate: `cryptography`, which decides, and OpenSSL, which speaks TLS. What only
the first one understands would stop every handshake, so a source tries both before it publishes anything.
"""

from __future__ import annotations

import os
import ssl
import tempfile

from .reasons import Reason, Refusal
from .svid import X509Bundle, X509Svid


class UnusableMaterial(Refusal):
    """OpenSSL can't load a certificate or key that otherwise reads well. Reason: `invalid_update`."""


def load_svid(context: ssl.SSLContext, svid: X509Svid) -> None:
    """Make `context` present `svid`. Raises `UnusableMaterial`.

    CPython loads keys from files only. An anonymous memory file never reaches a disk and ends with its
    descriptor. Elsewhere: a private file in a private directory, gone before this returns.
    """
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("ztmtls", os.MFD_CLOEXEC)
            with os.fdopen(fd, "wb") as memory:
                memory.write(svid.pem())
                memory.flush()
                context.load_cert_chain(f"/proc/self/fd/{fd}")
            return
        with tempfile.TemporaryDirectory(prefix="ztmtls-") as private:
            path = os.path.join(private, "svid.pem")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(svid.pem())
            context.load_cert_chain(path)
    except ssl.SSLError as error:
        raise _unusable(f"OpenSSL can't load the SVID of {svid.id}", error) from error


def load_authorities(context: ssl.SSLContext, bundle: X509Bundle) -> None:
    """Make `context` trust the authorities of `bundle`. Raises `UnusableMaterial`."""
    if not bundle.authorities:
        return
    try:
        context.load_verify_locations(cadata=bundle.der())
    except ssl.SSLError as error:
        raise _unusable(f"OpenSSL can't load the bundle of {bundle.trust_domain}", error) from error


def check_svid(svid: X509Svid) -> None:
    """Raise `UnusableMaterial` if no context could present `svid`."""
    load_svid(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), svid)


def check_bundle(bundle: X509Bundle) -> None:
    """Raise `UnusableMaterial` if no context could trust `bundle`."""
    load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), bundle)


def _unusable(what: str, error: ssl.SSLError) -> UnusableMaterial:
    why = (error.reason or "unreadable").lower().replace("_", " ")
    return UnusableMaterial(Reason.INVALID_UPDATE, f"{what}: {why}")

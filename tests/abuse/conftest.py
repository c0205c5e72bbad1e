"""The server and its callers are those of the tests of mutual TLS."""

from tests.mtls.conftest import ca, caller, served, server_source

__all__ = ["ca", "caller", "served", "server_source"]

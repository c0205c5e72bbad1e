"""Coverage-guided fuzzing of every parser that meets foreign bytes (libFuzzer, by way of atheris).

    make fuzz BUDGET=600                                     all of it, and the Hypothesis tests
    python -m tests.fuzz.coverage_guided policy --seconds 60   one parser

A parser may return a value or raise a `Refusal`. Anything else is a crash: libFuzzer writes the input to
`build/fuzz/` and this program ends with status 1. What was learned stays in `build/fuzz/<parser>/`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import atheris

with atheris.instrument_imports(include=["ztmtls", "yaml"], enable_loader_override=False):
    from ztmtls.authz import Policy, is_ambiguous, load_policy
    from ztmtls.ids import SpiffeId, TrustDomain
    from ztmtls.reasons import Refusal
    from ztmtls.source import X509Source
    from ztmtls.svid import X509Bundle, X509Svid, certificates_from_der
    from ztmtls.verify import verify_peer
    from ztmtls.workload_endpoint import parse_endpoint

from google.protobuf.message import DecodeError
from spiffe._proto import workload_pb2 as pb

from tests.fuzz.models import is_spiffe_id, is_trust_domain, policy_allows, readings
from ztmtls.testing import CertificateAuthority

HOME = Path("build/fuzz")
OURS = TrustDomain("zt.example")
CALLER = SpiffeId.parse("spiffe://zt.example/caller")
RULES = {"name": "r", "callers": [str(CALLER)], "methods": ["GET"], "paths": ["/", "/orders", "/orders/{id}"]}
POLICY = Policy.parse({"version": 1, "rules": [RULES]})
AUTHORITY = CertificateAuthority("zt.example")
SVID = AUTHORITY.issue(CALLER)
SOURCE = X509Source("unix:/nowhere")


def ids(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        assert str(SpiffeId.parse(text)) == text
        assert is_spiffe_id(text)
    except Refusal:
        assert not is_spiffe_id(text)
    assert is_trust_domain(TrustDomain.parse(text).name)


def endpoint(data: bytes) -> None:
    assert parse_endpoint(data.decode("latin-1")).split(":")[0] in ("unix", "ipv4", "ipv6")


def chain(data: bytes) -> None:
    certificates = certificates_from_der(data, limit=16)
    verify_peer(certificates, {OURS: AUTHORITY.bundle}, datetime.now(UTC))


def svid(data: bytes) -> None:
    cut = int.from_bytes(data[:2], "big")
    X509Svid.from_der(data[2 : 2 + cut], data[2 + cut :])


def bundle(data: bytes) -> None:
    X509Bundle.from_der(OURS, data)


def policy(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert load_policy(file.name).rules


def path(data: bytes) -> None:
    raw = data.split(b"?", 1)[0]
    text = unquote(raw.decode("latin-1"), "utf-8", "replace")
    allowed = POLICY.decide(CALLER, "GET", text).allowed
    assert allowed == policy_allows(POLICY.rules, str(CALLER), "GET", text)
    if not is_ambiguous(text, raw):
        assert len(readings(raw)) == 1


def update(data: bytes) -> None:
    try:
        message = pb.X509SVIDResponse.FromString(data)
    except DecodeError:
        return
    SOURCE._read(message, datetime.now(UTC))


PARSERS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (ids, endpoint, chain, svid, bundle, policy, path, update)
}
UPDATE = pb.X509SVIDResponse(
    svids=[
        pb.X509SVID(
            spiffe_id=str(CALLER),
            x509_svid=SVID.chain_der(),
            x509_svid_key=SVID.key_der(),
            bundle=AUTHORITY.bundle.der(),
        )
    ]
).SerializeToString()
SEEDS = {
    "ids": str(CALLER).encode(),
    "endpoint": b"tcp://[::1]:8081",
    "chain": SVID.chain_der(),
    "svid": len(SVID.chain_der()).to_bytes(2, "big") + SVID.chain_der() + SVID.key_der(),
    "bundle": AUTHORITY.bundle.der() * 2,
    "policy": b"version: 1\nrules:\n  - {name: r, callers: ['spiffe://a/b'], methods: [GET], paths: [/x]}\n",
    "path": b"/orders/7%c3%a4",
    "update": UPDATE,
}


def fuzz(name: str, seconds: int) -> None:
    """Run in this process until `seconds` are over, or something is found. Does not return."""
    parser, corpus = PARSERS[name], HOME / name
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "seed").write_bytes(SEEDS[name])

    def one(data: bytes) -> None:
        with contextlib.suppress(Refusal):
            parser(data)

    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={HOME}/{name}-",
        "-timeout=20",
        "-verbosity=0",
    ]
    options += ["-print_final_stats=1", "-rss_limit_mb=2048", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument(
        "parsers", nargs="*", metavar="parser", help=f"of {', '.join(PARSERS)}; default: all"
    )
    options.add_argument("--seconds", type=int, default=60, help="for all together; default: 60")
    chosen = options.parse_args()
    names = chosen.parsers or list(PARSERS)
    if unknown := set(names) - set(PARSERS):
        options.error(f"no such parser: {', '.join(sorted(unknown))}")
    each = max(1, chosen.seconds // len(names))
    if len(names) == 1:
        fuzz(names[0], each)
    failed = []
    for name in names:
        print(f"== {name}: {each} s", flush=True)
        command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, "--seconds", str(each)]
        if subprocess.run(command, env=os.environ).returncode:
            failed.append(name)
    print(f"coverage-guided: {len(names) - len(failed)} of {len(names)} parsers stood", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

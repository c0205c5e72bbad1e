"""``ztmtls doctor``: what the Workload API says, and whether what it gives can be used."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Generator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from spiffe._proto import workload_pb2

from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason, Refusal
from ztmtls.source import X509Source
from ztmtls.stream import CHANNEL_OPTIONS, METADATA, stub_of
from ztmtls.svid import MAX_CHAIN, InvalidSvid, X509Context, certificates_from_der

from .checks import Check, Deadline, fail, ok, skip, warn
from .output import duration, expiry, moment, shown

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def agent_checks(
    endpoint: str | None, target: str, expected: SpiffeId | None, deadline: Deadline
) -> Generator[Check, None, X509Context | None]:
    """gRPC, Workload API, SVID, clock, identity, bundles. Returns the context when it can be used."""
    with grpc.insecure_channel(target, options=list(CHANNEL_OPTIONS.items())) as channel:
        found = _speaks_grpc(channel, target, deadline)
        yield found
        if found.status != "ok":
            return None
        response = _fetch(channel, deadline)
    if isinstance(response, Check):
        yield response
        return None
    yield ok("agent", "the agent knows this workload")
    now = datetime.now(UTC)
    yield _clock(response, now)
    try:
        # What the library itself makes of this message, not a second opinion.
        svids, bundles, dropped = X509Source(endpoint).read(response, now)
        context = X509Context(1, svids, bundles, now)
    except Refusal as refusal:
        yield fail("svid", refusal.detail, _svid_advice(refusal.reason), refusal.reason)
        return None
    yield from _svid(context, now)
    if expected is not None:
        yield _identity(context, expected)
    yield from _bundles(context, dropped)
    return context


def _speaks_grpc(channel: grpc.Channel, target: str, deadline: Deadline) -> Check:
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    try:
        while True:
            state = states.get(timeout=deadline.remaining)
            if state is grpc.ChannelConnectivity.READY:
                return ok("grpc", f"{target} speaks gRPC")
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                return fail(
                    "grpc",
                    f"whoever listens at {target} does not speak gRPC (HTTP/2 without TLS)",
                    "another program's socket? Point the address at the agent's Workload API",
                )
    except queue.Empty:
        return fail(
            "grpc",
            f"whoever listens at {target} took the connection and said nothing within the deadline",
            "another program's socket, or an agent that hangs: look at its log, restart it",
        )
    finally:
        channel.unsubscribe(states.put)


def _fetch(channel: grpc.Channel, deadline: Deadline) -> Any:
    """The first message of FetchX509SVID, or the check that failed."""

    def first_message() -> Any:
        call = stub_of(channel).FetchX509SVID(
            workload_pb2.X509SVIDRequest(), timeout=deadline.remaining, metadata=METADATA
        )
        try:
            return next(call)
        finally:
            call.cancel()

    try:
        # All of it on a thread. gRPC waits where Ctrl-C is not heard; and a Ctrl-C that comes while it begins
        # a call leaves one that nobody ends, for which closing the channel would wait for ever.
        return deadline.bounded(first_message)
    except StopIteration:
        return fail(
            "agent",
            "the agent ended the stream without an SVID",
            "look at the agent's log",
            Reason.NO_IDENTITY,
        )
    except TimeoutError:
        return _status(grpc.StatusCode.DEADLINE_EXCEEDED, "")
    except grpc.RpcError as error:
        return _status(error.code(), shown(str(error.details() or "")))


def _status(code: grpc.StatusCode, detail: str) -> Check:
    said = f"{code.name}: {detail}" if detail else code.name
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return fail(
            "agent",
            f"the agent answers {said}. It has no entry for this process",
            _entry_advice(),
            Reason.IDENTITY_DENIED,
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return fail(
            "agent",
            f"this gRPC server is no Workload API: it answers {said}",
            "point the address at the agent's Workload API (SPIRE: socket_path; not its admin socket, nor "
            "the server's)",
        )
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return fail(
            "agent",
            f"the agent refuses the call itself: {said}",
            "we sent the header 'workload.spiffe.io: true' that the standard wants (Workload Endpoint, 3): a "
            "proxy in between may strip it. Connect to the agent directly",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return fail(
            "agent",
            "the agent took the call and did not answer within the deadline",
            "it may wait for its server, or for the kubelet to attest us: look at its log; --timeout waits "
            "longer",
        )
    return fail("agent", f"the agent answers {said}", "look at the agent's log")


def _entry_advice() -> str:
    try:
        program = os.readlink("/proc/self/exe")
    except OSError:
        program = os.path.realpath(sys.executable)
    selectors = [f"unix:uid:{os.geteuid()}", f"unix:gid:{os.getegid()}", f"unix:path:{program}"]
    if _NAMESPACE.is_file():
        selectors = [f"k8s:ns:{_NAMESPACE.read_text().strip()}", "k8s:sa:<service account>", *selectors]
    return (
        f"create an entry with selectors that this process (pid {os.getpid()}) fulfils, such as "
        f"{', '.join(selectors)}. If there is one: it takes some seconds to reach the agent, and the process "
        "must run as the service does (same user, same container). `spire-server entry show` lists entries"
    )


def _clock(response: Any, now: datetime) -> Check:
    try:
        leaves = [certificates_from_der(m.x509_svid, limit=MAX_CHAIN)[0] for m in response.svids]
    except InvalidSvid:
        return skip("clock", "the message holds no certificate to compare with")
    if not leaves:
        return skip("clock", "the message holds no certificate to compare with")
    issued = max(leaf.not_valid_before_utc for leaf in leaves)
    ahead = (issued - now).total_seconds()
    if ahead > 0:
        return fail(
            "clock",
            f"the SVID is valid from {moment(issued)}, and our clock says {moment(now)}: we are at least "
            f"{duration(ahead + 1)} behind the authority",
            "set the clock of this machine, or the authority's: NTP (chronyc tracking, timedatectl)",
            Reason.NOT_YET_VALID,
        )
    return ok("clock", f"the SVID is valid since {moment(issued)}, {duration(-ahead)} ago by our clock")


def _svid_advice(reason: Reason) -> str:
    if reason is Reason.NOT_YET_VALID:
        return "a clock is wrong: see 'clock'"
    if reason is Reason.EXPIRED:
        return (
            "the agent serves an SVID that ran out: it can't renew (look at its log), or our clock is ahead"
        )
    if reason is Reason.UNTRUSTED_AUTHORITY:
        return "SVID and bundle don't belong together: restart the agent, look at its server's authorities"
    return (
        "the agent sent what X509-SVID does not allow: look at its version, its plugins, and what is between"
    )


def _svid(context: X509Context, now: datetime) -> Iterator[Check]:
    for svid in context.svids:
        life = svid.not_after - svid.leaf.not_valid_before_utc
        text = (
            f"{svid.id}{f' (hint {shown(svid.hint)})' if svid.hint else ''}, serial {svid.serial}, verifies "
            f"against the bundle of {svid.id.trust_domain}; it ends {expiry(svid.not_after, now)}"
        )
        if svid.not_after - now < max(life / 4, timedelta(seconds=1)):
            yield warn(
                "svid", text, "agents renew at half of the life, and this one did not: look at its log"
            )
        else:
            yield ok("svid", text)


def _identity(context: X509Context, expected: SpiffeId) -> Check:
    offered = [svid.id for svid in context.svids]
    if expected not in offered:
        return fail(
            "identity",
            f"we expect to be {expected}, and are {', '.join(map(str, offered))}",
            "another entry fits this process: compare the selectors of both. A service that expects this ID "
            "would not start",
            Reason.NO_IDENTITY,
        )
    if offered[0] != expected:
        return warn(
            "identity",
            f"{expected} is offered, but the default is {offered[0]}",
            "X509Source(expected_id=…) picks the right one; other software takes the default",
        )
    return ok("identity", f"we are {expected}, as expected")


def _bundles(context: X509Context, dropped: list[str]) -> Iterator[Check]:
    known = ", ".join(f"{td} ({len(b.authorities)})" for td, b in sorted(context.bundles.items()))
    faults = [*dropped, *(f"{td} has no authority" for td, b in context.bundles.items() if not b.authorities)]
    text = f"we trust peers of these domains (authorities): {known}"
    if faults:
        yield warn(
            "bundles", f"{text}; {'; '.join(faults)}", "peers of that domain are refused: mend federation"
        )
    else:
        yield ok("bundles", text)

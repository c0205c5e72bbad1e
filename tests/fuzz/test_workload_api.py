"""A live source and an agent that sends anything: the last good identity stays, the next one is followed."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError
from hypothesis import event, given
from hypothesis import strategies as st
from spiffe._proto import workload_pb2 as pb

from tests.fuzz.mutations import MUTATIONS, mutate, mutate_der
from ztmtls.source import SourceState, X509Source
from ztmtls.svid import X509Context, X509Svid
from ztmtls.testing import BackgroundWorkloadApi, CertificateAuthority, Workload
from ztmtls.verify import verify_peer
from ztmtls.workload_endpoint import parse_endpoint

OURS = "spiffe://zt.example/ours"
DEADLINE = 20.0


class Followed:
    """A source on a thread of its own, the agent that it follows, and every context it ever held."""

    def __init__(self, api: BackgroundWorkloadApi, workload: Workload, source: X509Source) -> None:
        self.api, self.workload, self.source = api, workload, source
        self.held: list[X509Context] = []
        source.subscribe(lambda: self.held.append(source.context))

    def message(self) -> pb.X509SVIDResponse:
        """What the agent would send now."""
        return self.api.run(self.workload.build_response)

    def send(self, message: pb.X509SVIDResponse) -> None:
        self.api.run(lambda: self.workload.push_raw(message))

    def renew(self) -> X509Svid:
        return self.api.run(self.workload.rotate)

    def wait_for(self, svid: X509Svid) -> None:
        """Until the source holds this one."""
        with self.source._changed:
            assert self.source._changed.wait_for(
                lambda: self.source.context.svid.serial == svid.serial, DEADLINE
            ), self.source.status()


@pytest.fixture(scope="module")
def followed() -> Iterator[Followed]:
    ca, friend = CertificateAuthority("zt.example"), CertificateAuthority("friend.example")
    with BackgroundWorkloadApi() as api:

        async def add() -> Workload:
            workload = await api.api.add_workload("ours", OURS, ca=ca, federates_with=(friend,))
            workload.allow(pid=os.getpid())
            return workload

        workload = api.run(add)
        with X509Source(workload.endpoint) as source:
            source.wait(DEADLINE)
            yield Followed(api, workload, source)


TEXTS = st.sampled_from(
    [
        "",
        OURS,
        "spiffe://zt.example",
        "spiffe://friend.example/x",
        "zt.example",
        "friend.example",
        "\0",
        "x" * 3000,
    ]
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("wire"), MUTATIONS),
        st.tuples(st.sampled_from(["x509_svid", "x509_svid_key", "bundle"]), MUTATIONS),
        st.tuples(st.sampled_from(["x509_svid", "x509_svid_key", "bundle"]), st.binary(max_size=40)),
        st.tuples(st.sampled_from(["spiffe_id", "hint", "federated"]), TEXTS),
        st.tuples(st.sampled_from(["again", "no svid", "crl"]), st.none()),
    ),
    min_size=1,
    max_size=3,
)


def changed(message: pb.X509SVIDResponse, what: str, how: object) -> pb.X509SVIDResponse:
    """`message` with one thing in it changed."""
    result = pb.X509SVIDResponse()
    result.CopyFrom(message)
    if what == "wire":
        return pb.X509SVIDResponse.FromString(mutate(message.SerializeToString(), how))  # type: ignore[arg-type]
    if what == "crl":
        result.crl.append(b"\x30\x00")
    elif what == "no svid" or not result.svids:
        del result.svids[:]
    elif what == "again":
        result.svids.append(result.svids[0])
    elif what == "federated":
        result.federated_bundles[str(how)] = b"\x30\x03\x02\x01"
    elif isinstance(how, list):
        change = mutate_der if how[0][2] % 2 else mutate
        try:
            setattr(result.svids[0], what, change(getattr(result.svids[0], what), how))
        except ValueError:
            setattr(result.svids[0], what, b"")
    else:
        setattr(result.svids[0], what, how)
    return result


@given(CHANGES)
def test_the_last_good_identity_stays_and_the_next_is_followed(
    followed: Followed, changes: list[tuple[str, object]]
) -> None:
    before = followed.renew()
    followed.wait_for(before)
    del followed.held[:]
    message = followed.message()
    try:
        for what, how in changes:
            message = changed(message, what, how)
    except DecodeError:
        event("not protobuf")
        return

    followed.send(message)
    after = followed.renew()
    followed.wait_for(after)

    for context in followed.held:
        event("taken" if context.svid.serial not in (before.serial, after.serial) else "good")
        assert verify_peer(context.svid.chain, context.bundles, context.received_at).id == context.svid.id
        assert context.svid.key.public_key() == context.svid.leaf.public_key()
        assert context.svid.serial in (before.serial, after.serial), "only an issuer makes another SVID"
    assert followed.source.state is SourceState.SERVING
    assert followed.source.context.svid == after


class RawAgent:
    """A gRPC server that sends these bytes, one answer for each stream, and then what is right."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = itertools.chain(answers)
        self.streams = 0
        self.good = b""

    async def fetch(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        self.streams += 1
        yield next(self.answers, self.good)
        await asyncio.Event().wait()


async def test_bytes_that_are_no_message_are_survived(tmp_path: object) -> None:
    ca = CertificateAuthority("zt.example")
    svid = ca.issue(OURS)
    good = pb.X509SVIDResponse(
        svids=[
            pb.X509SVID(
                spiffe_id=OURS,
                x509_svid=svid.chain_der(),
                x509_svid_key=svid.key_der(),
                bundle=ca.bundle.der(),
            )
        ]
    ).SerializeToString()
    agent = RawAgent(good[:-1], b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f")
    agent.good = good
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(agent.fetch)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": method})]
    )
    endpoint = f"unix:{tmp_path}/agent.sock"
    server.add_insecure_port(parse_endpoint(endpoint))
    await server.start()
    try:
        async with X509Source(endpoint) as source:
            assert (await source.ready(DEADLINE)).svid.serial == svid.serial
            assert source.state is SourceState.SERVING
    finally:
        await server.stop(None)
    assert agent.streams == 4

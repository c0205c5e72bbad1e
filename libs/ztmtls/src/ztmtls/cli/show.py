"""``ztmtls show``: the identity that the Workload API gives to this process, and the bundles it trusts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from ztmtls.source import NoIdentity, SourceState, X509Source
from ztmtls.svid import X509Bundle, X509Context, X509Svid, rfc3339, serial_text
from ztmtls.workload_endpoint import ENVIRONMENT_VARIABLE, InvalidEndpoint

from .output import (
    CommandError,
    Exit,
    Style,
    UsageError,
    command,
    complain,
    duration,
    expiry,
    moment,
    shown,
    write,
    write_json,
)

EXAMPLES = """\
  ztmtls show
  ztmtls show --endpoint unix:/run/spire/agent.sock --json
  ztmtls show --watch
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "show",
        "the SVIDs and bundles of this workload",
        "Fetch this process's X.509 context from the Workload API and print it: SVIDs with their chains, the "
        "default one first, and the authorities of each trust domain. Private keys are never printed.",
        EXAMPLES,
    )
    add_endpoint(parser)
    parser.add_argument("--json", action="store_true", help="for machines; with --watch a document per line")
    parser.add_argument(
        "--watch", action="store_true", help="go on, and print each update and what it changed"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=5.0,
        help="seconds to wait for the first identity (default: 5)",
    )
    parser.set_defaults(run=run)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the Workload API."""
    parser.add_argument(
        "--endpoint",
        metavar="ADDRESS",
        help="Workload API, unix:/path or tcp://IP:port (default: $SPIFFE_ENDPOINT_SOCKET)",
    )


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> Exit:
    """Show it once, or until Ctrl-C."""
    logger = logging.getLogger("ztmtls")
    logger.propagate = False
    if arguments.watch:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ztmtls: %(message)s"))
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)
    else:
        logger.addHandler(logging.NullHandler())
    try:
        source = X509Source(arguments.endpoint)
    except InvalidEndpoint as error:
        named = ENVIRONMENT_VARIABLE if arguments.endpoint is None else "--endpoint"
        raise UsageError(f"{named}: {error.detail}") from None
    asyncio.run(_show(source, arguments))
    return Exit.OK


async def _show(source: X509Source, arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(changed.set)

    source.subscribe(wake)
    async with source:
        try:
            async with asyncio.timeout(arguments.timeout):
                context = await _first(source, changed)
        except TimeoutError:
            raise _no_identity(source, f"within {arguments.timeout:g} s") from None
        _print(context, source, arguments, [])
        patience: float | None = _seconds_left(context)
        while arguments.watch:
            # That an SVID runs out is no update: nobody tells.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await changed.wait()
            changed.clear()
            try:
                newer = source.context
            except NoIdentity as error:
                _print_loss(error, source, arguments)
                patience = None
                continue
            patience = _seconds_left(newer)
            if newer is not context:
                _print(newer, source, arguments, changes(context, newer))
                context = newer


def _seconds_left(context: X509Context) -> float:
    return max((context.svid.not_after - datetime.now(UTC)).total_seconds(), 0.01)


async def _first(source: X509Source, changed: asyncio.Event) -> X509Context:
    while True:
        try:
            return source.context
        except NoIdentity:
            if source.state is SourceState.DENIED:
                raise _no_identity(source, "") from None
        await changed.wait()
        changed.clear()


def _no_identity(source: X509Source, when: str) -> CommandError:
    return CommandError(
        f"no identity from {source.target}{f' {when}' if when else ''}: {source.status().reason}. "
        "`ztmtls doctor` says what to do"
    )


def _print(
    context: X509Context, source: X509Source, arguments: argparse.Namespace, changed: list[str]
) -> None:
    now = datetime.now(UTC)
    if arguments.json:
        document = as_dict(context, now) | {"state": str(source.state), "changes": changed}
        write_json(document, indent=None if arguments.watch else 2)
        return
    style = Style(sys.stdout)
    if changed:
        write(style.strong(f"-- {moment(now)}, generation {context.generation}"))
        for change in changed:
            write(f"   {change}")
    for line in lines(context, now, style):
        write(line)
    if source.state is SourceState.DEGRADED:
        complain(source.status().reason)


def _print_loss(error: NoIdentity, source: X509Source, arguments: argparse.Namespace) -> None:
    if arguments.json:
        loss = {"reason": str(error.reason), "detail": error.detail}
        write_json({"time": rfc3339(datetime.now(UTC)), "state": str(source.state)} | loss, indent=None)
    else:
        write(f"-- {moment(datetime.now(UTC))}: no identity any more: {error.reason}: {shown(error.detail)}")


def lines(context: X509Context, now: datetime, style: Style) -> Iterator[str]:
    """The context for people."""
    for i, svid in enumerate(context.svids):
        note = " (default)" if i == 0 and len(context.svids) > 1 else ""
        yield style.strong(f"SVID {svid.id}{note}")
        if svid.hint:
            yield f"  hint     {shown(svid.hint)}"
        yield f"  serial   {svid.serial}"
        yield f"  since    {moment(svid.leaf.not_valid_before_utc)}"
        yield f"  until    {_coloured_expiry(svid.leaf, now, style)}"
        for issuer in svid.chain[1:]:
            until = expiry(issuer.not_valid_after_utc, now)
            yield f"  issuer   {_name(issuer)}, serial {serial_text(issuer)}, until {until}"
    for bundle in _own_first(context):
        count = len(bundle.authorities)
        yield style.strong(f"Bundle {bundle.trust_domain}: {count} authorit{'y' if count == 1 else 'ies'}")
        for authority in bundle.authorities:
            yield f"  {_name(authority)}"
            yield f"    serial {serial_text(authority)}"
            yield f"    until  {_coloured_expiry(authority, now, style)}"


def _coloured_expiry(certificate: x509.Certificate, now: datetime, style: Style) -> str:
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    left = certificate.not_valid_after_utc - now
    paint = style.good if left > life / 4 else style.doubtful if left.total_seconds() > 0 else style.bad
    return paint(expiry(certificate.not_valid_after_utc, now))


def _own_first(context: X509Context) -> list[X509Bundle]:
    own = context.svid.id.trust_domain
    return sorted(context.bundles.values(), key=lambda b: (b.trust_domain != own, b.trust_domain))


def _name(certificate: x509.Certificate) -> str:
    return shown(certificate.subject.rfc4514_string()) or "(no subject)"


def as_dict(context: X509Context, now: datetime) -> dict[str, Any]:
    """The context for machines. Times are RFC 3339 in UTC, serials lower-case hexadecimal."""
    return {
        "time": rfc3339(now),
        "generation": context.generation,
        "svids": [_svid(svid, now, default=i == 0) for i, svid in enumerate(context.svids)],
        "bundles": {
            str(bundle.trust_domain): [_certificate(authority, now) for authority in bundle.authorities]
            for bundle in _own_first(context)
        },
    }


def _svid(svid: X509Svid, now: datetime, *, default: bool) -> dict[str, Any]:
    return {
        "id": str(svid.id),
        "hint": svid.hint,
        "default": default,
        **_certificate(svid.leaf, now),
        "chain": [_certificate(certificate, now) for certificate in svid.chain],
    }


def _certificate(certificate: x509.Certificate, now: datetime) -> dict[str, Any]:
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": serial_text(certificate),
        "not_before": rfc3339(certificate.not_valid_before_utc),
        "not_after": rfc3339(certificate.not_valid_after_utc),
        "seconds_left": round((certificate.not_valid_after_utc - now).total_seconds(), 1),
    }


def changes(old: X509Context, new: X509Context) -> list[str]:
    """What is different in `new`, one sentence each."""
    return [*_svid_changes(old, new), *_bundle_changes(old, new)]


def _svid_changes(old: X509Context, new: X509Context) -> Iterator[str]:
    before = {(svid.id, svid.hint): svid for svid in old.svids}
    after = {(svid.id, svid.hint): svid for svid in new.svids}
    for key, svid in after.items():
        if key not in before:
            yield f"SVID added: {svid.id}{_hint(svid)}, serial {svid.serial}"
        elif svid.chain != before[key].chain:
            life = (svid.not_after - svid.leaf.not_valid_before_utc).total_seconds()
            yield (
                f"SVID renewed: {svid.id}{_hint(svid)}, serial {before[key].serial} is now {svid.serial}, "
                f"valid for {duration(life)}"
            )
    for key, svid in before.items():
        if key not in after:
            yield f"SVID removed: {svid.id}{_hint(svid)}, serial {svid.serial}"
    if (old.svid.id, old.svid.hint) != (new.svid.id, new.svid.hint):
        yield f"default is now {new.svid.id}{_hint(new.svid)}"


def _hint(svid: X509Svid) -> str:
    return f" (hint {shown(svid.hint)})" if svid.hint else ""


def _bundle_changes(old: X509Context, new: X509Context) -> Iterator[str]:
    for domain in sorted({*old.bundles, *new.bundles}):
        if domain not in new.bundles:
            yield f"trust domain removed: {domain}"
            continue
        if domain not in old.bundles:
            yield f"trust domain added: {domain}"
        before = set(old.bundles[domain].authorities) if domain in old.bundles else set()
        after = set(new.bundles[domain].authorities)
        yield from _authorities("added to", after - before, new.bundles[domain])
        yield from _authorities("removed from", before - after, new.bundles[domain])


def _authorities(what: str, which: Iterable[x509.Certificate], bundle: X509Bundle) -> Iterator[str]:
    for authority in which:
        yield f"authority {what} {bundle.trust_domain}: {_name(authority)}, serial {serial_text(authority)}"

"""How values are written on the pages. Everything returned is plain text or escaped markup."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
SYMBOLS = {"EUR": "€", "USD": "$", "GBP": "£"}


def money(minor: int, currency: str) -> str:
    """Write an amount in minor units: ``money(1290, "EUR")`` is ``€12.90``."""
    sign = "-" if minor < 0 else ""
    whole, cents = divmod(abs(minor), 100)
    symbol = SYMBOLS.get(currency)
    amount = f"{whole:,}.{cents:02d}"
    return f"{sign}{symbol}{amount}" if symbol else f"{sign}{amount} {currency}"


def spiffe(text: str) -> Markup:
    """Let a SPIFFE ID (or any path) break after its slashes: each segment is a unit of its own."""
    scheme, separator, rest = text.partition("://")
    head, tail = (scheme + separator, rest) if separator else ("", text)
    segments = [part for part in re.split(r"(?<=/)", tail) if part]
    units = [head, *segments] if head else segments
    return Markup().join(Markup('<span class="seg">{}</span>').format(unit) for unit in units)


def possessive(name: str) -> str:
    """The possessive of `name`: with an apostrophe alone after an s."""
    return name + (APOSTROPHE if name.endswith("s") else APOSTROPHE + "s")


def prose(text: str) -> str:
    """Typewriter apostrophes as printed ones."""
    return text.replace("'", APOSTROPHE)


def inline(text: str) -> Markup:
    """Prose in which words between backquotes are code."""
    parts = prose(text).split("`")
    return Markup().join(
        Markup("<code>{}</code>").format(spiffe(part)) if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


def serial(text: str) -> Markup:
    """Let a serial number break every eight digits."""
    return Markup("<wbr>").join(escape(text[i : i + 8]) for i in range(0, len(text), 8))


def short(text: str) -> str:
    """The first eight digits of a serial number or version: enough to tell two apart."""
    return text[:8]


def cipher(text: str) -> Markup:
    """Let the name of a cipher suite break after its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in text.split("_"))


def clock(moment: datetime) -> str:
    """The time of day in UTC, ``14:03:22``."""
    return f"{moment.astimezone(UTC):%H:%M:%S}"


def stamp(moment: datetime) -> str:
    """Date and time in UTC, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def rfc3339(moment: datetime) -> str:
    """For machines: RFC 3339, UTC."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span(seconds: float) -> str:
    """A length of time, short: ``48 s``, ``3:20`` (minutes and seconds), ``2 h``, ``5 d``."""
    whole = int(abs(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h" if whole < 48 * 3600 else f"{whole // 86400} d"


def left(moment: datetime, at: datetime, past: str = "ended") -> str:
    """What remains until `moment`, or how long ago it was: ``48 s left``, ``ended 3:20 ago``."""
    seconds = (moment - at) / timedelta(seconds=1)
    return f"{span(seconds)} left" if seconds > 0 else f"{past} {span(seconds)} ago".lstrip()


def duration(milliseconds: float) -> str:
    """``7.4 ms``, ``182 ms``, ``1.25 s``."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def glyph(text: str) -> Markup:
    """A small symmetric figure drawn from a hash of `text`.

    The same serial number gives the same figure, so that a person sees at a glance whether two sides
    speak of one certificate, and when it was replaced. It decorates; the numbers beside it are the proof.
    """
    digest = hashlib.sha256(text.encode()).digest()
    paths = ["", "", ""]  # nothing, half tone, full tone
    for row in range(5):
        for column in range(5):
            tone = digest[row * 3 + min(column, 4 - column)] % 3
            paths[tone] += f"M{column} {row}h1v1h-1z"
    return Markup(
        '<svg class="glyph" viewBox="0 0 5 5" aria-hidden="true" shape-rendering="crispEdges">'
        '<path d="{}" opacity=".4"/><path d="{}"/></svg>'
    ).format(*paths[1:])

"""How the path templates of a policy relate to those of an application's routes.

A policy template stands for paths with a fixed number of segments: each a literal, or anything that is not
empty. A route's template may say more (``{id:int}``) or less (``{rest:path}``, which spans segments), so a
template can cover all of a route, part of it, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from ztmtls.authz import template_segments

_PARAMETER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?::([A-Za-z_][A-Za-z0-9_]*))?\}")


class Cover(StrEnum):
    """How much of a route's paths a template stands for."""

    ALL = "all"
    PARTLY = "partly"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a segment: a literal text, or a regular expression that a converter brings."""

    text: str
    literal: bool
    spans: bool = False


_Segment = tuple[_Piece, ...]
_ANYTHING = _Piece("[^/]*", literal=False)


def cover(template: str, route: str) -> Cover:
    """How much of `route` (Starlette's form) the policy's `template` stands for.

    Exact for the converters of Starlette. A converter of the application's own whose expression may match
    a slash is taken to span segments, like ``path``; then the answer is never more than "partly".
    """
    wanted = template_segments(template)
    found = Cover.NONE
    for segments in _expanded(_segments(route), len(wanted)):
        found = max(found, _compare(wanted, segments), key=_ORDER.index)
    if found is Cover.ALL and any(piece.spans for segment in _segments(route) for piece in segment):
        return Cover.PARTLY  # the route also has paths of other lengths
    return found


_ORDER = [Cover.NONE, Cover.PARTLY, Cover.ALL]


def ends_in_slash(route: str) -> bool:
    """True for a route whose paths hold an empty segment: no template can stand for them."""
    return route != "/" and any(segment == () for segment in _segments(route))


@lru_cache(maxsize=1024)
def _segments(route: str) -> tuple[_Segment, ...]:
    from starlette.convertors import CONVERTOR_TYPES

    segments: list[list[_Piece]] = [[]]

    def literal(text: str) -> None:
        first, *rest = text.split("/")
        for i, part in enumerate((first, *rest)):
            if i:
                segments.append([])
            if part:
                segments[-1].append(_Piece(part, literal=True))

    position = 0
    for match in _PARAMETER.finditer(route):
        literal(route[position : match.start()])
        regex = CONVERTOR_TYPES[match[2] or "str"].regex
        segments[-1].append(_Piece(regex, literal=False, spans=_may_match_slash(regex)))
        position = match.end()
    literal(route[position:])
    return tuple(map(tuple, segments[1:]))  # before the first slash there is nothing


def _may_match_slash(regex: str) -> bool:
    if regex == "[^/]+":
        return False
    plain = re.sub(r"\\[.dws]", "", regex)  # these never match a slash
    ranges = re.findall(r"([^\\])-([^\]])", plain)
    return bool(re.search(r"[./\\]|\[\^", plain)) or any(low <= "/" <= high for low, high in ranges)


def _expanded(segments: tuple[_Segment, ...], count: int) -> Iterator[tuple[_Segment, ...]]:
    """`segments` as those of paths with exactly `count` segments: parameters that span are stretched."""
    if not segments:
        if count == 0:
            yield ()
        return
    first, rest = segments[0], segments[1:]
    for head in _stretched(first, count - len(rest)):
        for tail in _expanded(rest, count - len(head)):
            yield head + tail


def _stretched(segment: _Segment, most: int) -> Iterator[tuple[_Segment, ...]]:
    spanning = [i for i, piece in enumerate(segment) if piece.spans]
    if most >= 1:
        yield (segment,)
    if not spanning:
        return
    before, after = segment[: spanning[0]], segment[spanning[-1] + 1 :]
    for length in range(2, most + 1):
        yield ((*before, _ANYTHING), *[(_ANYTHING,)] * (length - 2), (_ANYTHING, *after))


def _compare(wanted: tuple[str | None, ...], segments: tuple[_Segment, ...]) -> Cover:
    found = Cover.ALL
    for want, segment in zip(wanted, segments, strict=True):
        regex = "".join(re.escape(piece.text) if piece.literal else f"(?:{piece.text})" for piece in segment)
        if want is None:
            if not segment:
                return Cover.NONE
            if re.fullmatch(regex, ""):
                found = Cover.PARTLY
        elif not re.fullmatch(regex, want):
            return Cover.NONE
        elif not all(piece.literal for piece in segment):
            found = Cover.PARTLY
    return found

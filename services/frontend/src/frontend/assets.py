"""Static files, named by their content so that browsers may keep them for ever."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.responses import Response

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One static file: its published name, its content, its type."""

    name: str
    content: bytes
    media_type: str


class Assets:
    """The package's ``static/`` folder, read once."""

    def __init__(self) -> None:
        self._published: dict[str, Asset] = {}
        self._names: dict[str, str] = {}
        for entry in files("frontend").joinpath("static").iterdir():
            stem, dot, suffix = entry.name.rpartition(".")
            if (media_type := MEDIA_TYPES.get(dot + suffix)) is None:
                continue
            content = entry.read_bytes()
            name = f"{stem}.{hashlib.sha256(content).hexdigest()[:16]}{dot}{suffix}"
            self._published[name] = Asset(name, content, media_type)
            self._names[entry.name] = name

    def url(self, name: str) -> str:
        """The address of the file `name`; it changes with the file's content."""
        return f"/static/{self._names[name]}"

    def response(self, name: str) -> Response:
        """The file published as `name`. Raises a 404 for any other name."""
        asset = self._published.get(name)
        if asset is None:
            raise HTTPException(404, "No such file.")
        return Response(
            asset.content,
            media_type=asset.media_type,
            headers={"Cache-Control": "public, max-age=31536000, immutable"},
        )

"""The routes of an ASGI application, read from Starlette's and FastAPI's own tables."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .output import UsageError, shown

_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True)
class AppRoute:
    """One route: its path template as the application has it, and the methods it takes.

    `methods` is ``("WEBSOCKET",)`` for a WebSocket, and empty where the application takes any.
    `opaque` is set when another application decides behind this path, or when the kind of route is not
    known: its own routes can't be read.
    """

    path: str
    methods: tuple[str, ...]
    opaque: str = ""


def load_app(reference: str, *, factory: bool = False) -> Any:
    """Import ``module:attribute``, or with `factory` call it without arguments. Raises `UsageError`."""
    module_name, colon, attribute = reference.partition(":")
    attribute = attribute.removesuffix("()") if factory else attribute
    if not module_name or not colon or not _ATTRIBUTE.fullmatch(attribute):
        raise UsageError(
            f"--app: '{shown(reference)}' must be module:attribute, for example orders.app:app"
            + ("" if factory else "; a function that makes the app also needs --factory")
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does it, and the console script does not
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"--app: {module_name} can't be imported: {type(error).__name__}: {shown(str(error))}. "
            "Run this where the application itself runs: same environment, same directory"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageError(f"--app: {module_name} has no '{attribute}'")
        found = getattr(found, name)
    return _made_by(found, reference) if factory else found


def _made_by(maker: Any, reference: str) -> Any:
    if not callable(maker):
        raise UsageError(f"--factory: {shown(reference)} is a {type(maker).__name__} and can't be called")
    try:
        inspect.signature(maker).bind()
    except TypeError as error:
        raise UsageError(
            f"--factory: {shown(reference)} can't be called without arguments ({error}). Name the router "
            "that holds the routes, or a function without arguments that makes the app"
        ) from None
    try:
        return maker()
    except Exception as error:
        raise UsageError(
            f"--factory: {shown(reference)} failed: {type(error).__name__}: {shown(str(error))}"
        ) from error


def routes_of(app: Any) -> list[AppRoute]:
    """Every route of a Starlette or FastAPI application or router, in order.

    Mounted applications, included routers and hosts are walked through; middleware that keeps what it wraps
    in ``app`` is looked into. Raises `UsageError` for an object that has no routes.
    """
    table = _with_routes(app)
    if table is None:
        raise UsageError(
            f"--app: a {type(app).__name__} has no routes that can be read: name a Starlette or FastAPI "
            "application or router"
            + ("; it is a function: did you mean --factory?" if inspect.isfunction(app) else "")
        )
    return list(_walk(table, ""))


def _with_routes(app: Any) -> Any | None:
    seen: set[int] = set()
    while not hasattr(app, "routes"):
        if id(app) in seen or not hasattr(app, "app"):
            return None
        seen.add(id(app))
        app = app.app
    return app


def _walk(table: Any, prefix: str) -> Iterator[AppRoute]:
    for route in _flat(table.routes):
        yield from _routes(route, prefix)
    # FastAPI has no public list of the directories that `frontend()` serves behind all other routes.
    late = getattr(getattr(table, "router", table), "_iter_low_priority_routes", None)
    for context in late() if late else ():
        group = getattr(context, "original_route", context)
        for route in group.routes:
            at = (prefix + getattr(context, "frontend_prefix", "") + route.path).rstrip("/")
            methods = tuple(sorted(route.methods))
            if at:
                yield AppRoute(at, methods)
            yield AppRoute(at + "/{path:path}", methods)


def _flat(routes: Iterable[Any]) -> Iterable[Any]:
    # A router that FastAPI includes is one entry of the table, and its routes are told by this.
    try:
        from fastapi.routing import iter_route_contexts
    except ImportError:
        return routes
    return iter_route_contexts(list(routes))


def _routes(route: Any, prefix: str) -> Iterator[AppRoute]:
    from starlette.routing import Host, Mount, Route, WebSocketRoute

    # What FastAPI made of a route that came with an included router has the prefix in its path.
    kind = getattr(route, "original_route", route)
    if isinstance(kind, Route):
        yield AppRoute(prefix + str(route.path), tuple(sorted(route.methods or ())))
    elif isinstance(kind, WebSocketRoute):
        yield AppRoute(prefix + str(route.path), ("WEBSOCKET",))
    elif isinstance(kind, (Mount, Host)):
        at = prefix + (str(route.path) if isinstance(kind, Mount) else "")
        below = _with_routes(route.app)
        if below is None:
            name = type(route.app).__name__
            yield AppRoute(at + "/{path:path}", (), f"mounted {name}")
        else:
            yield from _walk(below, at)
    else:
        path = getattr(route, "path", None) or "/{path:path}"
        yield AppRoute(prefix + str(path), (), f"a route of kind {type(kind).__name__}")

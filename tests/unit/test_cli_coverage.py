"""How policy templates relate to an application's routes, and which routes an application has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.convertors import CONVERTOR_TYPES, Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute, compile_path
from starlette.staticfiles import StaticFiles

from ztmtls.authz import Policy, is_ambiguous
from ztmtls.cli.coverage import Cover, cover, ends_in_slash
from ztmtls.cli.output import UsageError
from ztmtls.cli.routes import AppRoute, load_app, routes_of
from ztmtls.ids import SpiffeId

PEER = "spiffe://zt.example/peer"


class _Year(Convertor[str]):
    regex = "[0-9]{4}"


class _Anything(Convertor[str]):
    regex = ".+"


@pytest.fixture(autouse=True)
def own_converters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette.convertors.CONVERTOR_TYPES", CONVERTOR_TYPES)
    for name, converter in (("year", _Year()), ("anything", _Anything())):
        monkeypatch.setitem(CONVERTOR_TYPES, name, converter)
        register_url_convertor(name, converter)


@pytest.mark.parametrize(
    ("template", "route", "expected"),
    [
        ("/", "/", Cover.ALL), ("/a", "/", Cover.NONE), ("/", "/a", Cover.NONE), ("/{x}", "/", Cover.NONE),
        ("/a", "/a", Cover.ALL), ("/a", "/b", Cover.NONE), ("/A", "/a", Cover.NONE),
        ("/a", "/a/", Cover.NONE),
        ("/a/b", "/a", Cover.NONE), ("/a.b", "/a.b", Cover.ALL), ("/axb", "/a.b", Cover.NONE),
        ("/{x}", "/a", Cover.ALL), ("/{x}", "/{y}", Cover.ALL), ("/a", "/{y}", Cover.PARTLY),
        ("/o/{x}", "/o/{id:int}", Cover.ALL), ("/o/42", "/o/{id:int}", Cover.PARTLY),
        ("/o/new", "/o/{id:int}", Cover.NONE), ("/o/1.5", "/o/{id:float}", Cover.PARTLY),
        ("/o/x", "/o/{id:uuid}", Cover.NONE), ("/o/{x}", "/o/{id:uuid}", Cover.ALL),
        ("/{x}", "/v{n:int}", Cover.ALL), ("/v1", "/v{n:int}", Cover.PARTLY),
        ("/w1", "/v{n:int}", Cover.NONE),
        ("/{x}", "/{a}.{b}", Cover.ALL), ("/a.b", "/{a}.{b}", Cover.PARTLY), ("/ab", "/{a}.{b}", Cover.NONE),
        ("/{x}/{y}", "/{a}/b", Cover.ALL), ("/a/{y}", "/{a}/b", Cover.PARTLY), ("/a/c", "/{a}/b", Cover.NONE),
        # `path` takes any number of segments, also none: a template is at most part of it.
        ("/f", "/f/{rest:path}", Cover.NONE), ("/f/{x}", "/f/{rest:path}", Cover.PARTLY),
        ("/f/a/{x}/c", "/f/{rest:path}", Cover.PARTLY), ("/g/a", "/f/{rest:path}", Cover.NONE),
        ("/f/a/end", "/f/{rest:path}/end", Cover.PARTLY), ("/f/a/b", "/f/{rest:path}/end", Cover.NONE),
        ("/f/a/b.json", "/f/{rest:path}.json", Cover.PARTLY),
        ("/f/a/b.txt", "/f/{rest:path}.json", Cover.NONE),
        ("/f/pre1/b", "/f/pre{rest:path}", Cover.PARTLY), ("/f/b", "/f/pre{rest:path}", Cover.NONE),
        ("/{x}", "/{rest:path}", Cover.PARTLY), ("/", "/{rest:path}", Cover.PARTLY),
        # Converters of the application.
        ("/y/{x}", "/y/{y:year}", Cover.ALL), ("/y/2026", "/y/{y:year}", Cover.PARTLY),
        ("/y/now", "/y/{y:year}", Cover.NONE), ("/y/{a}/{b}", "/y/{y:year}", Cover.NONE),
        ("/y/{a}/{b}", "/y/{y:anything}", Cover.PARTLY), ("/y/{a}", "/y/{y:anything}", Cover.PARTLY),
    ],
)  # fmt: skip
def test_how_much_of_a_route_a_template_covers(template: str, route: str, expected: Cover) -> None:
    assert cover(template, route) is expected


SEGMENTS = ["a", "b", "1", "12", "1.5", "a.b", "v1", "é", "end", "b.json"]
PATHS = ["/", "/a/"] + ["/" + "/".join(p) for n in (1, 2, 3) for p in itertools.product(SEGMENTS, repeat=n)]
TEMPLATES = ["/", "/a", "/{x}", "/a/{x}", "/{x}/b", "/{x}/{y}", "/v1", "/1", "/a/b/{z}", "/{x}/{y}/end"]
ROUTES = [
    "/", "/a", "/a/", "/{x}", "/{n:int}", "/{n:float}", "/a/{n}", "/v{n:int}", "/{a}.{b}", "/{p:path}",
    "/a/{p:path}", "/{p:path}/end", "/{p:path}.json", "/{x}/{p:path}", "/{x}/{y}/{n:int}", "/{y:anything}",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_coverage_agrees_with_router_and_policy_on_real_paths(route: str) -> None:
    served = [
        path for path in PATHS if compile_path(route)[0].match(path) and not is_ambiguous(path, path.encode())
    ]
    for template in TEMPLATES:
        rule = {"name": "r", "callers": [PEER], "methods": ["GET"], "paths": [template]}
        policy = Policy.parse({"version": 1, "rules": [rule]})
        allowed = {p for p in served if policy.decide(SpiffeId.parse(PEER), "GET", p).allowed}

        found = cover(template, route)

        if found is Cover.ALL:
            assert allowed == set(served), template
        elif found is Cover.NONE:
            assert not allowed, template
        elif len(served) > 30:  # enough samples to see both
            assert allowed != set(served), template


def test_route_that_ends_in_a_slash_is_known_to_be_out_of_reach() -> None:
    assert ends_in_slash("/a/")
    assert ends_in_slash("/a//b")
    assert not ends_in_slash("/")
    assert not ends_in_slash("/a/{p:path}")


# -- Routes of an application ---------------------------------------------------------------------------


async def _answer(request: Any) -> PlainTextResponse:
    return PlainTextResponse("")


async def _watch(websocket: WebSocket) -> None:
    await websocket.close()


def test_routes_of_starlette_with_mounts_hosts_and_middleware(tmp_path: Path) -> None:
    inner: list[BaseRoute] = [Route("/", _answer), Route("/{id:int}", _answer, methods=["DELETE"])]
    app = Starlette(
        routes=[
            Route("/a", _answer),
            WebSocketRoute("/ws", _watch),
            Mount("/in/{tenant}", routes=inner, middleware=[Middleware(GZipMiddleware)]),
            Mount("/static", StaticFiles(directory=tmp_path)),
            Host("api.example", Router([Route("/hosted", _answer, methods=["POST"])])),
        ]
    )

    assert routes_of(GZipMiddleware(app)) == [
        AppRoute("/a", ("GET", "HEAD")),
        AppRoute("/ws", ("WEBSOCKET",)),
        AppRoute("/in/{tenant}/", ("GET", "HEAD")),
        AppRoute("/in/{tenant}/{id:int}", ("DELETE",)),
        AppRoute("/static/{path:path}", (), "mounted StaticFiles"),
        AppRoute("/hosted", ("POST",)),
    ]


def test_routes_of_fastapi_with_included_routers(tmp_path: Path) -> None:
    leaf = APIRouter(prefix="/leaf")
    leaf.add_api_route("/{id}", _answer, methods=["PUT"])
    leaf.add_api_websocket_route("/ws", _watch)
    branch = APIRouter()
    branch.include_router(leaf, prefix="/branch")
    branch.mount("/sub", Starlette(routes=[Route("/b", _answer)]))
    branch.frontend("/ui", directory=tmp_path)
    app = FastAPI(openapi_url=None)
    app.get("/top")(_answer)
    app.include_router(branch, prefix="/v1")

    assert set(routes_of(app)) == {
        AppRoute("/top", ("GET",)),
        AppRoute("/v1/branch/leaf/{id}", ("PUT",)),
        AppRoute("/v1/branch/leaf/ws", ("WEBSOCKET",)),
        AppRoute("/v1/sub/b", ("GET", "HEAD")),
        AppRoute("/v1/ui", ("GET", "HEAD")),
        AppRoute("/v1/ui/{path:path}", ("GET", "HEAD")),
    }


def test_documentation_pages_of_fastapi_are_routes_too() -> None:
    paths = {route.path for route in routes_of(FastAPI())}

    assert paths == {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def test_route_of_an_unknown_kind_is_not_overlooked() -> None:
    class Strange(BaseRoute):
        path = "/strange"

    assert routes_of(Router([Strange()])) == [AppRoute("/strange", (), "a route of kind Strange")]


@pytest.mark.parametrize("app", [object(), _answer, 7])
def test_what_has_no_routes_is_refused(app: object) -> None:
    with pytest.raises(UsageError, match="has no routes that can be read"):
        routes_of(app)


# -- Loading an application -----------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("shop")
    module.app = Starlette()  # type: ignore[attr-defined]
    module.make = Starlette  # type: ignore[attr-defined]
    module.needs = lambda parts: Starlette()  # type: ignore[attr-defined]
    module.broken = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "shop", module)
    return module


def test_app_and_factory_are_found(module: ModuleType) -> None:
    assert load_app("shop:app") is module.app
    assert isinstance(load_app("shop:make", factory=True), Starlette)
    assert isinstance(load_app("shop:make()", factory=True), Starlette)


@pytest.mark.parametrize(
    ("reference", "factory", "expected"),
    [
        ("shop", False, "must be module:attribute"), ("shop:", False, "must be module:attribute"),
        (":app", False, "must be module:attribute"), ("shop:make()", False, "also needs --factory"),
        ("shop:nothing", False, "shop has no 'nothing'"), ("no.such.module:app", False, "can't be imported"),
        ("shop:app.nothing", False, "shop has no 'app.nothing'"),
        ("shop:__name__", True, "is a str and can't be called"),
        ("shop:needs", True, "can't be called without arguments"), ("shop:broken", True, "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_app_that_can_not_be_had_says_why(
    module: ModuleType, reference: str, factory: bool, expected: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        load_app(reference, factory=factory)

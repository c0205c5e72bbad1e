"""Problem documents (RFC 9457): every failure of an application reads alike, unexpected ones say nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ztmtls.bearer import jwt_caller
from ztmtls.fastapi import Hop, Peer, Problem, field_name, install, problem
from ztmtls.jwt_svid import JwtRefused
from ztmtls.problems import problem_body
from ztmtls.reasons import NoDatabase, Reason, Refusal

CANARY = "Zz-CANARY-%40/:#"
MEMBERS = {"type", "title", "status", "detail", "reason"}


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sku: str
    quantity: int = Field(ge=1, le=99)


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    items: list[Item] = Field(min_length=1)
    tags: dict[str, int] = Field(default_factory=dict)
    note: str = ""

    @field_validator("note")
    @classmethod
    def _note(cls, text: str) -> str:
        if text == "bad":
            raise ValueError("a note must not be bad")
        return text


def make_app() -> FastAPI:
    app = FastAPI(openapi_url=None)
    install(app)

    @app.post("/orders")
    async def orders(order: Order) -> dict[str, int]:
        return {"items": len(order.items)}

    @app.get("/orders")
    async def listed(
        limit: Annotated[int, Query(ge=1)] = 1,
        key: Annotated[str, Header(alias="Idempotency-Key", max_length=3)] = "",
    ) -> int:
        return limit

    @app.get("/orders/{number}")
    async def one(number: int) -> int:
        return number

    @app.get("/problem")
    async def raised() -> None:
        raise Problem(
            409, Reason.CONFLICT, "Already there", "order 7 exists", headers={"retry-after": "3"}, order=7
        )

    @app.get("/refusal/{reason}")
    async def refused(reason: str) -> None:
        raise Refusal(Reason(reason), f"connection to {CANARY} failed")

    @app.get("/no-database/{reason}")
    async def no_database(reason: str) -> None:
        raise NoDatabase(Reason(reason), f"login of {CANARY} refused")

    @app.get("/token/{reason}")
    async def token(reason: str) -> None:
        raise JwtRefused(Reason(reason), "the token is no good")

    @app.get("/without-the-guard")
    async def without_the_guard(request: Request) -> str:
        return str(jwt_caller(request.scope).id)

    @app.get("/http/{status}")
    async def http(status: int) -> None:
        raise HTTPException(status, "said so", headers={"www-authenticate": "none"})

    @app.get("/unexpected")
    async def unexpected() -> None:
        raise RuntimeError(f"postgresql://orders:{CANARY}@db")

    @app.get("/peer")
    async def peer(peer: Peer) -> str:
        return str(peer.id)

    @app.get("/hop")
    async def hop(hop: Hop) -> dict[str, Any]:
        return hop.as_dict()

    @app.get("/fine")
    async def fine() -> PlainTextResponse:
        return PlainTextResponse("fine")

    return app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    # The server answers an unexpected error and then raises it for its own log; a client sees the answer.
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://orders") as found:
        yield found


def document(response: httpx.Response, status: int, reason: Reason) -> dict[str, Any]:
    """The problem document of a response, checked for what all of them have in common."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert isinstance(body, dict)
    assert body.keys() >= MEMBERS
    assert body["status"] == status
    assert body["reason"] == reason
    assert body["type"] == f"urn:ztmtls:problem:{reason}"
    assert body["title"]
    return body


# -- What applications raise ------------------------------------------------------------------------------


async def test_success_is_left_alone(client: httpx.AsyncClient) -> None:
    response = await client.get("/fine")

    assert (response.status_code, response.text) == (200, "fine")


async def test_problem_becomes_its_document(client: httpx.AsyncClient) -> None:
    response = await client.get("/problem")

    body = document(response, 409, Reason.CONFLICT)
    assert (body["title"], body["detail"], body["order"]) == ("Already there", "order 7 exists", 7)
    assert body.keys() == MEMBERS | {"order"}
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, Reason.HTTP_ERROR), (401, Reason.HTTP_ERROR), (404, Reason.NOT_FOUND),
        (405, Reason.METHOD_NOT_ALLOWED), (413, Reason.TOO_LARGE), (418, Reason.HTTP_ERROR),
        (503, Reason.HTTP_ERROR), (420, Reason.HTTP_ERROR), (499, Reason.HTTP_ERROR),
        (599, Reason.HTTP_ERROR),
    ],
)  # fmt: skip
async def test_http_exception_becomes_a_document(
    client: httpx.AsyncClient, status: int, reason: Reason
) -> None:
    response = await client.get(f"/http/{status}")

    assert document(response, status, reason)["detail"] == "said so"
    assert response.headers["www-authenticate"] == "none"


async def test_unknown_path_and_method(client: httpx.AsyncClient) -> None:
    document(await client.get("/nowhere"), 404, Reason.NOT_FOUND)
    response = await client.delete("/fine")
    document(response, 405, Reason.METHOD_NOT_ALLOWED)
    assert response.headers["allow"] == "GET"


async def test_unexpected_error_tells_the_log_and_not_the_caller(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        response = await client.get("/unexpected")

    body = document(response, 500, Reason.INTERNAL_ERROR)
    assert body.keys() == MEMBERS
    assert body["detail"] == ""
    for word in ("CANARY", "RuntimeError", "Traceback", "postgresql"):
        assert word not in response.text
        assert word not in str(response.headers)
    assert "GET /unexpected failed" in caplog.text
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize(
    "reason",
    [Reason.NO_IDENTITY, Reason.SECRET_DENIED, Reason.DATABASE_UNAVAILABLE, Reason.WRONG_SERVER_IDENTITY],
)
async def test_refusal_of_something_needed_is_503_with_its_reason_only(
    client: httpx.AsyncClient, reason: Reason
) -> None:
    response = await client.get(f"/refusal/{reason}")

    assert document(response, 503, reason)["detail"] == ""
    assert "CANARY" not in response.text


@pytest.mark.parametrize(
    ("reason", "challenge"),
    [
        (Reason.JWT_EXPIRED, 'Bearer error="invalid_token"'),
        (Reason.JWT_MISSING, "Bearer"),
    ],
)
async def test_a_callers_token_that_is_no_good_is_its_fault_and_not_ours(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, reason: Reason, challenge: str
) -> None:
    response = await client.get(f"/token/{reason}")

    assert document(response, 401, reason)["detail"] == "the token is no good"
    assert response.headers["www-authenticate"] == challenge
    assert "failed" not in caplog.text


async def test_a_request_that_no_bearer_guard_let_in_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.get("/without-the-guard", headers={"authorization": "Bearer a.b.c"})

    document(response, 403, Reason.JWT_MISSING)
    assert "www-authenticate" not in response.headers


@pytest.mark.parametrize(
    "reason", [Reason.DATABASE_UNAVAILABLE, Reason.DATABASE_DENIED, Reason.SECRET_UNAVAILABLE]
)
async def test_without_its_database_a_request_may_come_again(
    client: httpx.AsyncClient, reason: Reason
) -> None:
    response = await client.get(f"/no-database/{reason}")

    body = document(response, 503, reason)
    assert response.headers["Retry-After"] == "1"
    assert body["title"] == "The database can't be used at the moment"
    assert body["detail"] == (
        "Nothing is lost: repeat the request, with the same Idempotency-Key if it had one."
    )
    assert "CANARY" not in response.text


@pytest.mark.parametrize("path", ["/peer", "/hop"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-forwarded-client-cert": 'By=spiffe://zt.example/a;URI="spiffe://zt.example/b"'},
        {"ztmtls": "spiffe://zt.example/a", "x-spiffe-id": "spiffe://zt.example/a"},
    ],
)
async def test_without_mutual_tls_there_is_no_peer(
    client: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    document(await client.get(path, headers=headers), 403, Reason.NO_PEER)


# -- Requests that are not valid ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"items": [{"sku": "a", "quantity": 0}]}, {"items[0].quantity"}),
        ({"items": [{"sku": "a", "quantity": 1}, {"sku": "b", "quantity": 100}]}, {"items[1].quantity"}),
        ({"items": [{"sku": 7, "quantity": "x"}]}, {"items[0].sku", "items[0].quantity"}),
        ({"items": [{}]}, {"items[0].sku", "items[0].quantity"}),
        ({"items": [{"sku": "a", "quantity": 1, "price": 0}]}, {"items[0].price"}),
        ({"items": []}, {"items"}), ({"items": {}}, {"items"}), ({}, {"items"}),
        ({"items": [None]}, {"items[0]"}),
        ({"items": [{"sku": "a", "quantity": 1}], "tags": {"x": "y"}}, {"tags.x"}),
        ({"items": [{"sku": "a", "quantity": 1}], "note": "bad"}, {"note"}),
        ({"items": [{"sku": "a", "quantity": 1}], "admin": True}, {"admin"}),
        ([], {"body"}), ("text", {"body"}), (None, {"body"}),
    ],
)  # fmt: skip
async def test_faults_are_named_by_field(client: httpx.AsyncClient, body: object, fields: set[str]) -> None:
    response = await client.post("/orders", json=body)

    found = document(response, 422, Reason.INVALID_REQUEST)
    assert {fault["field"] for fault in found["errors"]} == fields
    assert all(fault.keys() == {"field", "message"} and fault["message"] for fault in found["errors"])
    assert all(name in found["detail"] for name in fields)


@pytest.mark.parametrize("content", [b"", b"{", b'{"items": [CANARY', b"not json", b"{'a': 1}"])
async def test_body_that_is_no_json_is_a_fault_of_the_body(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/orders", content=content, headers={"content-type": "application/json"})

    found = document(response, 422, Reason.INVALID_REQUEST)
    assert [fault["field"] for fault in found["errors"]] == ["body"]
    assert "CANARY" not in response.text


@pytest.mark.parametrize(
    ("path", "headers", "field"),
    [
        ("/orders?limit=0", {}, "query.limit"), ("/orders?limit=x", {}, "query.limit"),
        ("/orders", {"idempotency-key": "12345"}, "header.Idempotency-Key"), ("/orders/x", {}, "path.number"),
    ],
)  # fmt: skip
async def test_faults_outside_the_body_say_where(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], field: str
) -> None:
    found = document(await client.get(path, headers=headers), 422, Reason.INVALID_REQUEST)

    assert [fault["field"] for fault in found["errors"]] == [field]


async def test_values_sent_are_not_echoed(client: httpx.AsyncClient) -> None:
    for body in (
        {"items": [{"sku": [CANARY], "quantity": CANARY}]},
        {"items": CANARY, "tags": {"a": CANARY}},
    ):
        response = await client.post("/orders", json=body)

        document(response, 422, Reason.INVALID_REQUEST)
        assert "CANARY" not in response.text


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"[" * 100_000, b'{"\\ud83d": 1}', b'{"a\\nb": 1}', b'{"items":[{"sku":"a","quantity":1e999}]}',
     b'{"items":[{"sku":"a","quantity":' + b"9" * 5000 + b"}]}", b'{"\\u0000": NaN}'],
)  # fmt: skip
async def test_strange_body_is_the_callers_fault(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/orders", content=content, headers={"content-type": "application/json"})

    assert response.status_code in (400, 422), response.text
    assert response.json().keys() >= MEMBERS
    assert "\n" not in response.text


async def test_invented_field_name_is_cut(client: httpx.AsyncClient) -> None:
    response = await client.post("/orders", json={"x" * 100_000: 1})

    document(response, 422, Reason.INVALID_REQUEST)
    assert len(response.content) < 4000


# -- Documents made by hand -----------------------------------------------------------------------------


def test_document_has_its_members_in_order() -> None:
    assert list(problem_body(403, Reason.NO_PEER, "Refused", "no", order=7).items()) == [
        ("type", "urn:ztmtls:problem:no_peer"),
        ("title", "Refused"),
        ("status", 403),
        ("detail", "no"),
        ("reason", "no_peer"),
        ("order", 7),
    ]


def test_title_is_the_phrase_of_the_status_when_none_is_given() -> None:
    assert problem_body(404, Reason.NOT_FOUND)["title"] == "Not Found"


def test_response_has_type_status_and_headers() -> None:
    response = problem(429, Reason.HTTP_ERROR, "Slow down", headers={"retry-after": "1"})

    assert response.status_code == 429
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["retry-after"] == "1"
    assert json.loads(response.body)["title"] == "Slow down"


@pytest.mark.parametrize("text", ["a\nb", 'quote "', "é", "😀", "\0", "\ud83d"])
def test_any_text_fits_into_a_document(text: str) -> None:
    # A lone surrogate comes in through JSON (`"\ud83d"`) and must not turn the answer into a 500.
    response = problem(422, Reason.INVALID_REQUEST, "No such product", f"unknown SKU {text}", sku=text)

    body = json.loads(response.body)
    assert body["detail"].startswith("unknown SKU ")
    assert b"\n" not in bytes(response.body)


def test_problem_reads_well_as_an_exception() -> None:
    assert str(Problem(409, Reason.CONFLICT, "Already there", "order 7 exists")) == "conflict: order 7 exists"
    assert str(Problem(409, Reason.CONFLICT, "Already there")) == "conflict: Already there"


@pytest.mark.parametrize(
    ("loc", "name"),
    [
        (("body", "items", 0, "quantity"), "items[0].quantity"), (("body", "items"), "items"),
        (("body", 3, "sku"), "[3].sku"), (("body", "a", 0, 1, "b"), "a[0][1].b"), (("body",), "body"),
        ((), "body"),
        (("query", "limit"), "query.limit"), (("header", "Idempotency-Key"), "header.Idempotency-Key"),
        (("path", "body"), "path.body"), (("body", "body"), "body"),
    ],
)  # fmt: skip
def test_field_names_are_written_as_people_write_them(loc: tuple[int | str, ...], name: str) -> None:
    assert field_name(loc) == name

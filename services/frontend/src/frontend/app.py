"""The application: pages for people, each made from what orders answers over mutual TLS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from uuid import UUID

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason, Refusal

from .assets import Assets
from .evidence import Hop, Placings, chain_of
from .forms import OrderForm
from .lab import Lab, LabUnavailable, lab_problem, lab_routes
from .live import Watcher, live_parts
from .models import Order, Product, now
from .orders import Orders, OrdersFailure
from .pages import Pages, wants_json
from .pillars import Record, read_record
from .security import Csrf, CsrfFailed, Guard
from .settings import Settings
from .status import Decisions, Fault, IdentityReport, Overview, overview
from .streams import Streams, TooManyStreams
from .tour import PAGES, STEPS

logger = logging.getLogger(__name__)

READ = ["GET", "HEAD"]


def create_app(
    settings: Settings,
    *,
    orders: Orders,
    identity: Callable[[], dict[str, Any]],
    audit: AuditLog,
    streams: Streams,
    lab: Lab | None = None,
) -> ASGIApp:
    """Build the frontend.

    `identity` tells the state of our own identity (`SourceStatus` as a mapping). Without `lab` nothing below
    `/lab` exists. Close `streams` when the process begins to stop. What is returned is the application inside
    its `Guard`.
    """
    assets = Assets()
    csrf = Csrf(settings.csrf_key(), https=settings.https)
    pages = Pages(settings, assets, csrf)
    placings = Placings()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _install_failures(app, pages)
    if lab is not None:
        app.include_router(lab_routes(lab, pages, csrf, audit, streams))

    def record() -> Record | None:
        return read_record(settings.proof_file) if settings.proof_file else None

    async def look() -> Overview:
        own = IdentityReport.model_validate(identity())
        decisions = Decisions.model_validate(audit.report())
        try:
            return overview(now(), own, await orders.status(), decisions)
        except OrdersFailure as failure:
            fault = Fault(failure.reason, failure.title, failure.detail)
            return overview(now(), own, fault, decisions)

    async def recent_orders() -> tuple[Order, ...] | None:
        try:
            return await orders.recent()
        except OrdersFailure as failure:
            logger.warning("no recent orders: %s", failure)
            return None

    async def order_page(request: Request, form: OrderForm, status: int = 200) -> Response:
        products, recent, chain = await asyncio.gather(orders.products(), recent_orders(), look())
        return pages.render(
            request,
            "home.html",
            status=status,
            form=True,
            order_form=form,
            products=products,
            recent=recent,
            overview=chain,
        )

    @app.api_route("/", methods=READ)
    async def home(request: Request) -> Response:
        """The order form, the chain as it is now, the recent orders."""
        return await order_page(request, OrderForm())

    @app.api_route("/orders", methods=READ)
    async def no_list() -> Response:
        """Where a person lands who reloads the answer to a form."""
        return RedirectResponse("/", 303)

    @app.post("/orders")
    async def place(request: Request) -> Response:
        """Take an order from the form."""
        form = OrderForm.read(await csrf.take(request, audit))
        if not form.valid:
            detail = form.fault or f"{len(form.errors)} quantities are no numbers"
            audit.record(
                "form", "deny", reason=Reason.INVALID_REQUEST, detail=detail, method="POST", path="/orders"
            )
            return await order_page(request, form, 422)
        try:
            answer = await orders.place(form.items, form.key)
        except OrdersFailure as failure:
            return await not_placed(request, form, failure)
        order_id = answer.placed.order.id
        if not answer.replayed:
            placings.keep(order_id, answer.link)
        return RedirectResponse(f"/orders/{order_id}", 303)

    async def not_placed(request: Request, form: OrderForm, failure: OrdersFailure) -> Response:
        if failure.reason == Reason.IDEMPOTENCY_KEY_REUSED:
            form.renew(
                "This form has already placed an order with other quantities: see the recent orders. "
                "Send it again to place a second one."
            )
            return await order_page(request, form, 422)
        if failure.status in (409, 422):
            form.refuse(failure.errors, failure.detail)
            return await order_page(request, form, 422)
        logger.warning("order not placed: %s", failure)
        return _failed(pages, request, failure, retry=form)

    @app.api_route("/orders/{order_id}", methods=READ)
    async def order(request: Request, order_id: str) -> Response:
        """One order, and the chain that placed it."""
        answer = await orders.read(_uuid(order_id))
        placed, own = answer.placed, placings.of(answer.placed.order.id)
        chain = chain_of(placed, own)
        if wants_json(request):
            links = [link.model_dump(mode="json", by_alias=True) for link in chain.links]
            return _json(
                placed.model_dump(mode="json", by_alias=True)
                | {"links": links, "this_request": answer.link.model_dump(mode="json", by_alias=True)}
            )
        return pages.render(
            request,
            "order.html",
            order=placed.order,
            chain=chain,
            complete=own is not None,
            this_request=Hop(answer.link),
        )

    @app.api_route("/status", methods=READ)
    async def status(request: Request) -> Response:
        """The identity and the credentials of every service, and the hops between them, now."""
        chain = await look()
        if wants_json(request):
            return _json(
                {
                    "at": chain.at.isoformat(),
                    "services": [service.model_dump(mode="json") for service in chain.services],
                    "fault": chain.fault and {"reason": chain.fault[1].reason},
                }
            )
        return pages.render(request, "status.html", overview=chain)

    watcher = Watcher(look, lambda: orders.calls)

    @app.api_route("/live", methods=READ)
    async def live(request: Request) -> Response:
        """What changes, and what is served and refused meanwhile."""
        _, product = await asyncio.gather(watcher.look(), first_product())
        return pages.render(request, "live.html", form=True, watch=watcher.watch, product=product)

    async def first_product() -> Product | None:
        try:
            return next(iter(await orders.products()), None)
        except OrdersFailure:
            return None

    @app.get("/live/events")
    async def live_events() -> Response:
        """The parts of that page, each when it has changed, as server-sent events."""
        return streams.answer("/live/events", live_parts(watcher, pages))

    @app.api_route("/pillars", methods=READ)
    async def pillars(request: Request) -> Response:
        """What is proved, pillar by pillar."""
        return pages.render(request, "pillars.html", record=record())

    @app.api_route("/tour", methods=READ)
    async def tour(request: Request) -> Response:
        """The guided tour."""
        return pages.render(request, "tour.html", steps=STEPS, names=PAGES)

    @app.api_route("/static/{name}", methods=READ)
    async def static(name: str) -> Response:
        """A static file under its published name."""
        return assets.response(name)

    def refuse(request: Request, status: int, refusal: Refusal) -> Response:
        audit.record("door", "deny", reason=refusal.reason, method=request.method, path=request.url.path)
        return pages.problem(request, status, refusal.reason, HTTPStatus(status).phrase, refusal.detail)

    return Guard(
        app,
        hosts=settings.allowed_hosts,
        max_body=settings.max_body_bytes,
        https=settings.https,
        refuse=refuse,
    )


def _uuid(text: str) -> UUID:
    # Nothing but a UUID becomes part of an address we ask orders for.
    try:
        return UUID(text)
    except ValueError:
        raise HTTPException(404, "There is no such order.") from None


def _json(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"Vary": "Accept"})


def _failed(
    pages: Pages, request: Request, failure: OrdersFailure, *, retry: OrderForm | None = None
) -> Response:
    context: dict[str, Any] = {"retry": retry} if retry and failure.order_id is None else {}
    if failure.status == 404:
        return pages.problem(
            request, 404, failure.reason, "There is no such order", failure.detail, **context
        )
    return pages.problem(
        request,
        failure.status,
        failure.reason,
        failure.title,
        failure.detail,
        hop=(failure.caller, failure.callee),
        unknown=failure.unknown,
        order_id=failure.order_id,
        **context,
    )


def _install_failures(app: FastAPI, pages: Pages) -> None:
    async def on_orders_failure(request: Request, error: Exception) -> Response:
        assert isinstance(error, OrdersFailure)
        logger.warning("%s %s: %s", request.method, request.url.path, error)
        return _failed(pages, request, error)

    async def on_lab(request: Request, error: Exception) -> Response:
        assert isinstance(error, LabUnavailable)
        return lab_problem(pages, request, error)

    async def on_too_many(request: Request, error: Exception) -> Response:
        assert isinstance(error, TooManyStreams)
        title = "Too many pages show things live"
        headers = {"Retry-After": "10"}
        return pages.problem(request, 503, error.reason, title, error.detail, headers=headers)

    async def on_csrf(request: Request, error: Exception) -> Response:
        assert isinstance(error, CsrfFailed)
        return pages.problem(request, 403, error.reason, "This form was refused", error.detail)

    async def on_invalid(request: Request, error: Exception) -> Response:
        title = "The request is not valid"
        return pages.problem(request, 422, Reason.INVALID_REQUEST, title, "")

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = error.status_code
        reason = {
            404: Reason.NOT_FOUND,
            405: Reason.METHOD_NOT_ALLOWED,
            413: Reason.TOO_LARGE,
        }.get(code, Reason.HTTP_ERROR)
        phrase = HTTPStatus(code).phrase
        detail = "" if error.detail == phrase else str(error.detail)
        return pages.problem(request, code, reason, phrase, detail, headers=dict(error.headers or {}))

    async def on_unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        title = "Something went wrong in the frontend"
        return pages.problem(request, 500, Reason.INTERNAL_ERROR, title, "")

    app.add_exception_handler(OrdersFailure, on_orders_failure)
    app.add_exception_handler(LabUnavailable, on_lab)
    app.add_exception_handler(TooManyStreams, on_too_many)
    app.add_exception_handler(CsrfFailed, on_csrf)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_unexpected)

"""Pages and problem answers: one place that renders, for people (HTML) and for programs (JSON)."""

from __future__ import annotations

from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from ztmtls.fastapi import problem
from ztmtls.reasons import Reason

from . import formats
from .assets import Assets
from .evidence import Verdict
from .guidance import guidance
from .models import now
from .security import Csrf
from .settings import Settings


class Pages:
    """Renders the templates. Autoescape is on for all of them; an unknown variable is an error."""

    def __init__(self, settings: Settings, assets: Assets, csrf: Csrf) -> None:
        self._csrf = csrf
        self._templates = Environment(
            loader=PackageLoader("frontend"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "cipher": formats.cipher,
            "clock": formats.clock,
            "duration": formats.duration,
            "glyph": formats.glyph,
            "inline": formats.inline,
            "left": formats.left,
            "possessive": formats.possessive,
            "prose": formats.prose,
            "rfc3339": formats.rfc3339,
            "serial": formats.serial,
            "span": formats.span,
            "spiffe": formats.spiffe,
            "stamp": formats.stamp,
        }
        self._templates.globals |= {
            "asset": assets.url,
            "guidance": guidance,
            "code_url": lambda file: _code_url(settings, file),
            "lab": settings.lab_socket is not None,
            "navigation": _navigation(settings),
            "mode": settings.mode,
            "money": formats.money,
            "short": formats.short,
            "Verdict": Verdict,
        }

    def render(
        self, request: Request, template: str, *, status: int = 200, form: bool = False, **context: Any
    ) -> Response:
        """Render `template`. With `form`, it holds a form: the page gets a token, the browser its cookie."""
        cookie = self._csrf.cookie_for(request) if form else ""
        html = self._templates.get_template(template).render(
            context,
            now=now(),
            path=request.url.path,
            csrf=self._csrf.token(cookie) if form else "",
            csrf_field=Csrf.FIELD,
        )
        response = HTMLResponse(html, status, {"Vary": "Accept"})
        if form:
            self._csrf.remember(response, cookie)
        return response

    def fragment(self, template: str, **context: Any) -> str:
        """Render a part of a page, for a stream."""
        return self._templates.get_template(template).render(context, now=now())

    def problem(
        self,
        request: Request,
        status: int,
        reason: str,
        title: str,
        detail: str,
        *,
        headers: dict[str, str] | None = None,
        hop: tuple[str, str] | None = None,
        **context: Any,
    ) -> Response:
        """A refusal or failure: a page that says what it means and what to do, or a problem document."""
        if wants_json(request):
            members = {"caller": hop[0], "callee": hop[1]} if hop else {}
            known = Reason(reason) if reason in set(Reason) else Reason.HTTP_ERROR
            return problem(
                status, known, title, detail, headers={**(headers or {}), "Vary": "Accept"}, **members
            )
        response = self.render(
            request,
            "problem.html",
            status=status,
            form="retry" in context,
            **{"retry": None, "unknown": False, "order_id": None, **context},
            code=status,
            reason=reason,
            title=title,
            detail=detail,
            hop=hop,
        )
        response.headers.update(headers or {})
        return response


def _navigation(settings: Settings) -> list[tuple[str, str]]:
    lab = [("/lab", "Lab")] if settings.lab_socket is not None else []
    return [
        ("/", "Order"),
        ("/live", "Live"),
        *lab,
        ("/pillars", "Pillars"),
        ("/tour", "Tour"),
        ("/status", "Status"),
    ]


def _code_url(settings: Settings, file: str) -> str | None:
    """Where a file of this project can be read: in the lab, else at `SOURCE_URL`, else nowhere."""
    if settings.lab_socket is not None:
        return f"/lab/code/{file}"
    return settings.source_url and f"{settings.source_url}/{file}"


def wants_json(request: Request) -> bool:
    """True for a client that asks for JSON and not for HTML."""
    accept = request.headers.get("accept", "")
    return "json" in accept and "text/html" not in accept

"""`ztmtls policy`: faults with their lines, the fit with an application, and why a caller is refused."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import uvicorn
import yaml
from fastapi import FastAPI

from tests.unit.cli_process import CONSOLE_SCRIPT, REPOSITORY, answer, environment, ztmtls
from ztmtls.authz import METHODS, Policy, PolicyDocument, PolicyError, is_ambiguous, load_policy
from ztmtls.cli.decision import Request, mismatches
from ztmtls.cli.policy_check import compare
from ztmtls.cli.policy_schema import schema_text
from ztmtls.cli.routes import AppRoute
from ztmtls.ids import SpiffeId
from ztmtls.listen import bind
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser
from ztmtls.testing import calling_as

NAMESPACE = "spiffe://zt.example/ns/zt-demo/sa"
FRONTEND, ORDERS = f"{NAMESPACE}/frontend", f"{NAMESPACE}/orders"

POLICY = f"""\
version: 1
rules:
  - name: reads
    callers: ["{FRONTEND}"]
    methods: [GET]
    paths:
      - /orders
      - /orders/{{id}}
  - name: writes
    callers: ["{FRONTEND}", "{ORDERS}"]
    methods: [POST, DELETE]
    paths: ["/orders"]
"""

APP = """\
from starlette.applications import Starlette
from starlette.routing import Route

async def answer(request): ...

def create_app():
    return Starlette(routes=[
        Route("/orders", answer, methods=["GET", "POST", "DELETE"]),
        Route("/orders/{id:int}", answer),
    ])

app = create_app()
unfit = Starlette(routes=[
    Route("/orders", answer, methods=["GET"]),
    Route("/secret", answer, methods=["GET"]),
    Route("/files/{rest:path}", answer, methods=["GET"]),
    Route("/orders/", answer, methods=["POST"]),
])
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    (tmp_path / "small_shop.py").write_text(APP)
    return path


# -- Faults ---------------------------------------------------------------------------------------------


def test_every_fault_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "# comment\nversion: 2\nrules:\n  - name: a\n    callers:\n"
        "      - spiffe://zt.example/ok\n      - SPIFFE://zt.example/x\n"
        "    methods: [get]\n    paths: ['/a', '/b/']\n    extra: 1\n"
        "  - callers: [spiffe://zt.example]\n    methods: [GET]\n    paths: [/a]\n"
        "  - nothing\n"
    )

    done = ztmtls("policy", "check", path)

    assert done.returncode == 1
    found = [line.removeprefix(f"{path}:").split(":", 1) for line in done.stdout.splitlines()]
    assert [int(line) for line, _ in found] == [2, 10, 7, 8, 9, 11, 11, 14]
    assert "'version' must be 1" in found[0][1]
    assert "caller 'SPIFFE://zt.example/x' does not begin with" in found[2][1]
    assert "'name' must be a non-empty string" in found[5][1]


def test_name_used_twice_is_told_where_the_second_stands(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace("name: writes", "name: reads"))

    answered = answer(ztmtls("policy", "check", path, "--json"))

    assert answered["valid"] is False
    assert answered["faults"] == [
        {"line": 9, "place": ["rules", 1, "name"], "text": "rule name 'reads' is used twice"}
    ]


def test_file_that_is_not_there_is_a_finding() -> None:
    done = ztmtls("policy", "check", "/no/policy.yaml")

    assert done.returncode == 1
    assert "can't be read" in done.stdout
    assert "/no/policy.yaml" in done.stdout


# -- The fit of policy and application ------------------------------------------------------------------


def test_policy_that_fits_lists_each_route_with_its_callers(policy: Path) -> None:
    done = ztmtls("policy", "check", policy, "--app", "small_shop:app", cwd=policy.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    rows = {tuple(re.split(r"  +", line.strip())) for line in done.stdout.splitlines() if "/orders" in line}
    assert ("GET", "/orders", FRONTEND, "rule reads") in rows
    assert ("POST", "/orders", ORDERS, "rule writes") in rows
    assert ("GET", "/orders/{id:int}", FRONTEND, "rule reads") in rows
    # HEAD came with GET: listed, and not held against anybody.
    assert ("HEAD", "/orders/{id:int}", "nobody") in rows


def test_console_script_and_factory(policy: Path) -> None:
    done = subprocess.run(
        [CONSOLE_SCRIPT, "policy", "check", policy, "--app", "small_shop:create_app", "--factory", "--json"],
        cwd=policy.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert answer(done)["findings"] == []
    assert done.returncode == 0


def test_rules_and_routes_without_each_other_are_found(policy: Path) -> None:
    done = ztmtls("policy", "check", policy, "--app", "small_shop:unfit", "--json", cwd=policy.parent)

    assert done.returncode == 1
    assert answer(done)["findings"] == [
        {
            "kind": "rule_matches_nothing",
            "line": 8,
            "text": "rule 'reads': no route of the application takes /orders/{id}",
        },
        {
            "kind": "rule_matches_nothing",
            "line": 12,
            "text": "rule 'writes': no route of the application takes DELETE or POST on /orders",
        },
        {"kind": "nobody_may_call", "line": None, "text": "nobody may call GET /secret"},
        {"kind": "nobody_may_call", "line": None, "text": "nobody may call GET /files/{rest:path}"},
        {
            "kind": "nobody_may_call",
            "line": None,
            "text": "nobody may call POST /orders/: a policy can't name a path that holds an empty segment "
            "or ends in '/'",
        },
    ]
    shown = ztmtls("policy", "check", policy, "--app", "small_shop:unfit", cwd=policy.parent)
    assert f"finding: {policy}:8: rule 'reads'" in shown.stdout
    assert "\x1b" not in shown.stdout


def _fit(routes: list[AppRoute], **rule: Any) -> Any:
    content = {"version": 1, "rules": [{"name": "r", "callers": [FRONTEND]} | rule]}
    return compare(Policy.parse(content), PolicyDocument(content, None), routes)


def test_partial_coverage_is_called_partly() -> None:
    fit = _fit([AppRoute("/f/{rest:path}", ("GET",))], methods=["GET"], paths=["/f/{x}", "/f/{x}/{y}"])

    assert [(g.cover, g.paths) for a in fit.accesses for g in a.grants] == [
        ("partly", ("/f/{x}", "/f/{x}/{y}"))
    ]
    assert fit.findings == ()


def test_mounted_application_takes_any_method_and_web_sockets() -> None:
    mounted = AppRoute("/m/{path:path}", (), "mounted Thing")

    fit = _fit([mounted], methods=["PUT", "WEBSOCKET"], paths=["/m/x"])

    assert [(a.method, a.grants[0].methods) for a in fit.accesses] == [("ANY", ("PUT", "WEBSOCKET"))]
    assert fit.findings == ()
    assert [f.kind for f in _fit([AppRoute("/m", ())], methods=["WEBSOCKET"], paths=["/m"]).findings] == [
        "rule_matches_nothing",
        "nobody_may_call",
    ]


def test_method_that_no_policy_can_name_is_told() -> None:
    fit = _fit([AppRoute("/a", ("GET", "TRACE"))], methods=["GET"], paths=["/a"])

    assert [f.text for f in fit.findings] == [
        "nobody may call TRACE /a: a policy can't name the method TRACE"
    ]


@pytest.mark.parametrize("service", ["orders", "payments"])
def test_policy_of_each_service_fits_its_application(service: str, tmp_path: Path) -> None:
    (tmp_path / "as_served.py").write_text(
        "from unittest.mock import Mock\nfrom inspect import signature\n"
        f"from {service}.app import create_app\n"
        "def app():\n    return create_app(*(Mock() for _ in signature(create_app).parameters))\n"
    )
    policy = REPOSITORY / "services" / service / "src" / service / "policy.yaml"

    done = ztmtls("policy", "check", policy, "--app", "as_served:app", "--factory", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    document = answer(done)
    assert document["findings"] == []
    assert len(document["routes"]) == 5
    callers = {caller for route in document["routes"] for a in route["allowed"] for caller in a["callers"]}
    assert callers == {FRONTEND if service == "orders" else ORDERS}
    assert all(a["cover"] == "all" for route in document["routes"] for a in route["allowed"])


# -- What a caller would be told ------------------------------------------------------------------------


def test_allowed_request_names_its_rule(policy: Path) -> None:
    done = ztmtls(
        "policy", "explain", policy, "--peer", FRONTEND, "--method", "GET", "--path", "/orders/1?x=2"
    )

    assert done.returncode == 0
    assert done.stdout == f"allowed by rule reads of {policy}\n"


def test_denied_request_has_the_reason_and_the_nearest_rule_first(policy: Path) -> None:
    arguments = ("--peer", ORDERS, "--method", "POST", "--path", "/order")

    done = ztmtls("policy", "explain", policy, *arguments)
    document = answer(ztmtls("policy", "explain", policy, *arguments, "--json"))

    assert done.returncode == 1
    assert done.stdout.startswith("denied: route_not_allowed: no rule lets")
    assert done.stdout.index("  writes\n") < done.stdout.index("  reads\n")
    assert document["reason"] == "route_not_allowed"
    assert document["not_matched"][0] == {
        "rule": "writes",
        "why": ["path: /orders: segment 1 is 'order', not 'orders'"],
    }
    assert document["not_matched"][1]["why"][:2] == [
        f"caller: it names {FRONTEND}",
        "method: it allows GET, not POST",
    ]


def test_ambiguous_path_is_told_before_any_rule(policy: Path) -> None:
    done = ztmtls(
        "policy", "explain", policy, "--peer", FRONTEND, "--method", "GET", "--path", "/orders%2f1", "--json"
    )

    document = answer(done)
    assert done.returncode == 1
    assert (document["reason"], document["not_matched"]) == ("ambiguous_path", [])


def test_explanation_of_a_broken_policy_is_its_faults(policy: Path) -> None:
    policy.write_text("version: 1\nrules: []\n")

    done = ztmtls("policy", "explain", policy, "--peer", FRONTEND, "--method", "GET", "--path", "/")

    assert done.returncode == 1
    assert done.stdout == f"{policy}:2: 'rules' must be a list with at least one rule\n"


def test_lower_case_method_gets_a_hint(policy: Path) -> None:
    request = Request.sent(SpiffeId.parse(FRONTEND), "get", "/orders")

    assert "GET" in mismatches(load_policy(policy), request)[0].why[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--peer", "frontend", "--method", "GET", "--path", "/"),
        ("--peer", "spiffe://zt.example", "--method", "GET", "--path", "/"),
        ("--peer", FRONTEND, "--method", "GET", "--path", "/#top"),
        ("--peer", FRONTEND, "--method", "GET"),
    ],
)
def test_wrong_use_of_explain_is_status_2(policy: Path, arguments: tuple[str, ...]) -> None:
    done = ztmtls("policy", "explain", policy, *arguments)

    assert done.returncode == 2
    assert "--pe" in done.stderr or "--path" in done.stderr
    assert "Traceback" not in done.stderr


TARGETS = [
    "/orders", "/orders/1", "/orders/", "/orders/a%20b", "/orders/%C3%BC", "/orders%2f1",
    "/orders/%ff", "/orders/1;x", "/orders?x=%2f", "/", "/nothing", "/orders/1/2", "/%6frders",
]  # fmt: skip


@pytest.mark.parametrize("peer", [FRONTEND, ORDERS, f"{NAMESPACE}/stranger"])
async def test_explanation_is_what_the_guard_answers(policy: Path, peer: str) -> None:
    loaded = load_policy(policy)
    app = FastAPI(openapi_url=None)

    async with calling_as(app, peer, loaded) as client:
        for target in TARGETS:
            response = await client.get(target)
            told = Request.sent(SpiffeId.parse(peer), "GET", target).decided_by(loaded)
            guarded = response.status_code != 403
            assert told.allowed == guarded, target
            if not told.allowed:
                assert response.json()["reason"] == told.reason, target


@pytest.mark.parametrize("parser", ["h11", "httptools"])
async def test_path_is_decoded_as_the_server_does_it(parser: HttpParser) -> None:
    seen: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], scope["raw_path"]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    targets = [*TARGETS, "/orders/..", "//orders", "/a/%2e%2e/b", "/a%00", "/%zz", "/a%25b", "/a+b"]
    with bind("127.0.0.1", 0, "PORT") as sock:
        server = uvicorn.Server(uvicorn.Config(app, http=parser, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve([sock]))
        for target in targets:
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 204"), target
            writer.close()
        server.should_exit = True
        await serving

    requests = [Request.sent(SpiffeId.parse(FRONTEND), "GET", target) for target in targets]
    assert [path for path, _ in seen] == [request.path for request in requests]
    ambiguous = [is_ambiguous(*each) for each in seen]
    assert ambiguous == [is_ambiguous(request.path, request.raw_path) for request in requests]


def test_each_rule_says_at_least_one_thing_when_nothing_matches(policy: Path) -> None:
    loaded = load_policy(policy)
    for peer in (FRONTEND, ORDERS):
        for method in sorted(METHODS):
            for target in TARGETS:
                request = Request.sent(SpiffeId.parse(peer), method, target)
                decision = request.decided_by(loaded)
                if decision.reason is Reason.ROUTE_NOT_ALLOWED:
                    assert all(mismatch.why for mismatch in mismatches(loaded, request)), request
                elif decision.allowed:
                    assert any(not mismatch.why for mismatch in mismatches(loaded, request)), request


# -- The schema -----------------------------------------------------------------------------------------


def rule(**changes: Any) -> dict[str, Any]:
    return {"name": "r", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/a"]} | changes


def document(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [rule(**changes)]}


GOOD: list[Any] = [
    document(), document(methods=sorted(METHODS)), document(name="Grüße, 世界 1/2"), document(name=" "),
    document(paths=["/", "/a/{b}/c", "/{_a1}", "/...", "/.a", "/a..", "/~!$&'()*+,;=:@-._"]),
    document(callers=["spiffe://a/b", "spiffe://a_b-c.d/..."]),
    document(callers=["spiffe://" + "a" * 255 + "/b"]),
    document(callers=["spiffe://a/" + "b" * 2037]), {"version": 1.0, "rules": [rule()]},
    {"version": 1, "rules": [rule(), rule(name="s")]}, document(paths=["/a", "/a"]),
]  # fmt: skip

BAD: list[Any] = [
    None, [], "x", 1, {}, {"version": 1}, {"rules": [rule()]}, {"version": 1, "rules": []},
    {"version": 1, "rules": {}}, {"version": 1, "rules": "all"}, {"version": 1, "rules": None},
    *({"version": v, "rules": [rule()]} for v in (2, "1", None, True, [1])),
    {"version": 1, "rules": [rule()], "default": "allow"}, {"version": 1, "rules": [rule(), None]},
    {"version": 1, "rules": [rule(), "all"]}, {"version": 1, "rules": [[]]}, document(allow=True),
    *({"version": 1, "rules": [{k: v for k, v in rule().items() if k != gone}]} for gone in rule()),
    *(document(name=n) for n in ("", None, 7, "a\nb", "a\n", "a\tb", "a\x7f", "a\x85", "a\u2028", ["r"])),
    *(document(callers=c) for c in ([], None, FRONTEND, [7], [[FRONTEND]], [FRONTEND, None])),
    *(
        document(callers=[c])
        for c in (
            "*", "", "spiffe://", "spiffe:///a", "spiffe://zt.example", "spiffe://zt.example/",
            FRONTEND + "/", FRONTEND + "\n", "SPIFFE://zt.example/a", "spiffe://ZT.example/a", "spiffe://zt.example/*",
            "spiffe://zt.example/a//b", "spiffe://zt.example/.", "spiffe://zt.example/../a",
            "spiffe://zt.example/a/..", "spiffe://zt.example/ü", "spiffe://zt.example:443/a",
            "spiffe://u@zt.example/a", "spiffe://zt.example/a?b", "spiffe://zt.example/a#b",
            "spiffe://zt.example/a%20b", "spiffe://zt.example/{a}", "spiffe://" + "a" * 256 + "/b",
            "spiffe://a/" + "b" * 2038, " " + FRONTEND, "https://zt.example/a",
        )
    ),
    *(document(methods=m) for m in ([], "GET", [True], ["get"], ["*"], ["ANY"], ["CONNECT"], ["GET "])),
    document(methods=["GET\n"]),
    *(document(paths=p) for p in ([], "/a", [1], None)),
    *(
        document(paths=[p])
        for p in (
            "", "a", "*", "/a/", "//a", "/a//b", "/.", "/a/../b", "/..", "/a/.", "/{}", "/{a}{b}", "/x{a}",
            "/{a}.json", "/{a:path}", "/{1a}", "/{a b}", "/{a", "/a?x=1", "/a#b", "/a%2fb", "/a b", "/a\n",
            "/\n", "/a\\b", "/ü", "/a\n/b", "\n/a",
        )
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def _parses(content: Any) -> bool:
    try:
        Policy.parse(content)
    except PolicyError:
        return False
    return True


@pytest.mark.parametrize("content", GOOD)
def test_schema_and_parser_both_accept(validator: jsonschema.Draft202012Validator, content: Any) -> None:
    assert _parses(content)
    assert [error.message for error in validator.iter_errors(content)] == []


@pytest.mark.parametrize("content", BAD)
def test_schema_and_parser_both_refuse(validator: jsonschema.Draft202012Validator, content: Any) -> None:
    assert not _parses(content)
    assert not validator.is_valid(content)


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "rules": [rule(), rule()]},  # names that are used twice
        document(name="zero\u200bwidth"),  # unprintable characters beyond the common ones
    ],
)
def test_what_only_the_parser_knows(validator: jsonschema.Draft202012Validator, content: Any) -> None:
    assert not _parses(content)
    assert validator.is_valid(content)


def test_schema_knows_every_method(validator: jsonschema.Draft202012Validator) -> None:
    schema: Any = validator.schema
    assert set(schema["$defs"]["rule"]["properties"]["methods"]["items"]["enum"]) == METHODS


@pytest.mark.parametrize("service", ["orders", "payments"])
def test_policy_of_each_service_fulfils_the_schema(
    validator: jsonschema.Draft202012Validator, service: str
) -> None:
    path = REPOSITORY / "services" / service / "src" / service / "policy.yaml"
    validator.validate(yaml.safe_load(path.read_text()))


def test_schema_is_printed() -> None:
    done = ztmtls("policy", "schema")

    assert done.returncode == 0
    assert answer(done) == json.loads(schema_text())


# -- Help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("show",),
        ("doctor",),
        ("policy",),
        ("policy", "check"),
        ("policy", "explain"),
        ("policy", "schema"),
    ],
)
def test_help_tells_examples_and_exit_statuses(command: tuple[str, ...]) -> None:
    done = ztmtls(*command, "--help")

    assert done.returncode == 0
    assert "0 fine; 1 findings, or refused; 2 wrong use; 130 interrupted" in " ".join(done.stdout.split())
    assert "  ztmtls " in done.stdout or command in ((), ("policy",))


@pytest.mark.parametrize(
    "arguments", [(), ("polic",), ("policy",), ("policy", "check"), ("show", "--timeout", "x")]
)
def test_wrong_use_is_status_2(arguments: tuple[str, ...]) -> None:
    done = ztmtls(*arguments)

    assert done.returncode == 2
    assert "usage: ztmtls" in done.stderr

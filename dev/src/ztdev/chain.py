"""The chain of an order for people: each hop with what both sides verified, and each database with its
secret."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.text import Text
from rich.tree import Tree

JSON = dict[str, Any]


def money(amount: Any, currency: Any) -> str:
    """Minor units as people write them."""
    return f"{int(amount) // 100}.{int(amount) % 100:02d} {currency}"


def chain_tree(document: JSON, at: datetime | None = None) -> Tree:
    """The order and its chain as a tree: calls nest in the call that caused them."""
    moment = at or datetime.now(UTC)
    order = document["order"]
    items = ", ".join(f"{item['quantity']} x {item['name']}" for item in order["items"])
    title = Text.assemble(
        ("order ", "dim"),
        (str(order["id"]), "bold"),
        "  ",
        (str(order["status"]), "bold green" if order["status"] == "paid" else "bold yellow"),
        f"  {money(order['total'], order['currency'])}  ({items})",
    )
    tree = Tree(title)
    links: list[JSON] = list(document.get("links", []))
    databases: list[JSON] = list(document.get("databases", []))
    callees = {link["to"] for link in links}
    for link in links:
        if link["from"] not in callees:
            _add_link(tree, link, links, databases, moment)
    reached = {link["to"] for link in links}
    for use in databases:
        if use["service"] not in reached:
            _add_database(tree, use)
    return tree


def _add_link(tree: Tree, link: JSON, links: list[JSON], databases: list[JSON], at: datetime) -> None:
    caller, callee = link.get("seen_by_caller"), link.get("seen_by_callee")
    view = callee or caller or {}
    duration = link.get("duration_ms")
    branch = tree.add(
        Text.assemble(
            (f"{link['from']} → {link['to']}", "bold cyan"),
            f"  {link['method']} {link['path']}",
            (f"  {duration:.1f} ms" if duration is not None else "", "green"),
            (f"  {view.get('tls_version', '')} {view.get('cipher', '')}", "dim"),
        )
    )
    _add_certificate(branch, link["from"], caller and caller["own"], callee and callee["peer"], at)
    _add_certificate(branch, link["to"], callee and callee["own"], caller and caller["peer"], at)
    rule = (callee or {}).get("rule")
    branch.add(Text.assemble(("allowed by rule ", "dim"), rule or "(none told)"))
    for use in databases:
        if use["service"] == link["to"]:
            _add_database(branch, use)
    for other in links:
        if other["from"] == link["to"] and other is not link:
            _add_link(branch, other, links, databases, at)


def _add_certificate(branch: Tree, name: str, own: JSON | None, seen: JSON | None, at: datetime) -> None:
    """One certificate: as its holder presented it (`own`) and as the other side verified it (`seen`)."""
    certificate = own or seen
    if certificate is None:
        branch.add(Text(f"{name}: nothing told", style="yellow"))
        return
    facts = ("id", "serial", "not_after")
    if own is None or seen is None:
        told = ("told by its holder only" if seen is None else "told by the other side only", "yellow")
    elif all(own[fact] == seen[fact] for fact in facts):
        told = ("both sides agree", "green")
    else:
        told = ("THE SIDES DIFFER", "bold red")
    line = branch.add(Text.assemble((certificate["id"], "bold"), "  ", told))
    shown = [("", certificate)] if told[1] != "bold red" else [("holder: ", own), ("other side: ", seen)]
    for who, each in shown:
        if each is not None:
            line.add(Text(f"{who}serial {each['serial']}, valid until {each['not_after']}{_left(each, at)}"))


def _left(certificate: JSON, at: datetime) -> str:
    try:
        end = datetime.fromisoformat(str(certificate["not_after"]).replace("Z", "+00:00"))
    except ValueError:
        return ""
    seconds = (end - at).total_seconds()
    return f" (in {seconds:.0f} s)" if seconds >= 0 else f" ({-seconds:.0f} s ago)"


def _add_database(branch: Tree, use: JSON) -> None:
    branch.add(
        Text.assemble(
            ("database ", "dim"),
            (str(use["database"]), "bold magenta"),
            f"  user {use['user']}  secret {use['secret_id']} version {use['secret_version']}",
            (f"  {use.get('tls_version') or ''} {use.get('tls_cipher') or ''}", "dim"),
        )
    )

"""The guided tour: six steps, for a presenter or for a reader alone. `docs/tour.md` has the same words."""

from __future__ import annotations

from typing import NamedTuple

#: What the pages of the tour are called.
PAGES = {
    "/": "the order page",
    "/lab": "the attack lab",
    "/live": "the live page",
    "/pillars": "the pillars",
}


class Step(NamedTuple):
    """One step. `address` is where it happens; words in backquotes are code."""

    title: str
    address: str
    do: str
    see: str
    why: str

    @property
    def page(self) -> str:
        """The page that the address is on."""
        return self.address.partition("#")[0]


STEPS = (
    Step(
        "Order something",
        "/",
        "Open the order page, choose a quantity, and place the order.",
        "It is paid. Your order went through three programs, `frontend`, `orders` and `payments`, and into "
        "two databases.",
        "In most systems such programs believe each other because they are in the same network: whoever "
        "gets in is believed, too. Here nobody is believed for where it is.",
    ),
    Step(
        "See who vouched for whom",
        "/",
        "Stay on the page of your order, or open one of the recent orders. Look at the card between "
        "`frontend` and `orders`.",
        "Each program has a name, such as `spiffe://zt.example/ns/zt-demo/sa/orders`: its SPIFFE ID. It "
        "stands in a certificate that lives for a minute, the SVID. Each side showed its own and checked "
        "the other's; the card lays both views side by side, and the serial numbers are the same.",
        "This is mutual TLS: both ends prove who they are before a byte of the order moves. Where both saw "
        "the same two certificates, nobody sat in between.",
    ),
    Step(
        "Attack it",
        "/lab#rogue-workload",
        "Press Attack at “Rogue workload of the same domain”, and watch it travel.",
        "It stops at `payments`. The attacker has a name and a certificate as good as any, and is refused "
        "all the same: `caller_not_allowed`, in its answer and in the log of `payments`. Then the same "
        "attack is made where only that one control is left out, and there it succeeds.",
        "Who you are is one question, what you may do another. A control is worth showing when one can see "
        "what happens without it.",
    ),
    Step(
        "Watch the certificates change",
        "/live",
        "Press Keep ordering, and wait for a minute.",
        "Each certificate runs out and is replaced: a new serial number, a new figure beside it. The "
        "orders go on, and none fails.",
        "A stolen certificate is worth something for seconds, not for a year. That is only possible "
        "because replacing it is nobody's work: the programs fetch a new one by themselves, from the "
        "SPIFFE Workload API.",
    ),
    Step(
        "Watch the passwords change",
        "/live",
        "Keep ordering. In a terminal run `.venv/bin/ztdev rotate`, or wait: it happens every minute by "
        "itself.",
        "The version of the database login changes for `orders` and for `payments`, and still no order "
        "fails.",
        "Databases take passwords. These are made by a machine, kept in a store that each program opens "
        "with its own identity, and thrown away after two rotations: one that was copied is soon worth "
        "nothing.",
    ),
    Step(
        "Read what is proved",
        "/pillars",
        "Choose a pillar, and one of its controls.",
        "What the control promises, the files that it is in, the attacks on it with what came of them, and "
        "what it does not cover.",
        "Nothing on that page is claimed: `make attack` makes every attack, and `make proof` writes down "
        "what it saw. Run them yourself.",
    ),
)


def markdown() -> str:
    """The tour as a document."""
    lines = [
        "# A tour in six steps",
        "",
        "Run `make run`, open the page that it prints, and choose Tour: the same six steps are there, for "
        "the arrow keys of a presenter. It takes about five minutes.",
    ]
    for number, step in enumerate(STEPS, 1):
        lines += ["", f"## {number}. {step.title}", "", f"On the page: `{step.page}`", ""]
        lines += [f"**Do.** {step.do}", "", f"**See.** {step.see}", "", f"**Why.** {step.why}"]
    return "\n".join(lines) + "\n"

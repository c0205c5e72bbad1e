"""Attacks on a policy file while a service uses it: what the two of them share."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from tests.attacks.controls import ROOT
from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Lab, LeftOut, NotProved, Target
from ztdev.files import replace_file

POLICY = ROOT / "services" / "payments" / "src" / "payments" / "policy.yaml"


@contextlib.asynccontextmanager
async def payments_with_a_file(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """A `payments` with a policy file of its own."""
    with tempfile.TemporaryDirectory(prefix="zt-policy-") as folder:
        file = Path(folder) / "policy.yaml"
        file.write_text(POLICY.read_text())
        async with lab.variant(left_out, "payments", {"POLICY_FILE": str(file)}) as target:
            yield replace(target, file=file)


async def replace_policy(lab: Lab, target: Target, text: str) -> Answer:
    """Replace the file, wait until payments has looked at it, and charge as the rogue.

    It is refused when the file was not taken and the rogue got nothing. What was in force before must be so
    still.
    """
    assert target.file is not None
    mark = len(target.lines())
    replace_file(target.file, text.encode(), 0o644)
    line = await target.find(mark, event="policy")
    answer = await lab.attack(target, charge(), svid=lab.svid("rogue"))
    if line["decision"] == "allow" or not answer.refused:
        return answer
    if (still := await rightful_charge(lab, target)).refused:
        raise NotProved(f"the policy that was in force is not any more: {still}")
    return Answer(reason=line["reason"], error=f"the file was not taken, and the rogue got {answer}")

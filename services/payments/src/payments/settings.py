"""What payments reads from its environment, once, at the start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ztmtls.settings import CalleeSettings, DatabaseSettings, ExistingFile

PACKAGED_POLICY = Path(__file__).with_name("policy.yaml")


class Settings(CalleeSettings, DatabaseSettings):
    """Settings of ``python -m payments``."""

    policy_file: ExistingFile = Field(PACKAGED_POLICY, description="who may call what")
    charge_limit: int = Field(500_000, gt=0, description="largest single charge, in cents")

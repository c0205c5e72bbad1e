"""What orders reads from its environment, once, at the start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ztmtls.settings import CalleeSettings, DatabaseSettings, ExistingFile, SpiffeIdSetting

PACKAGED_POLICY = Path(__file__).with_name("policy.yaml")


class Settings(CalleeSettings, DatabaseSettings):
    """Settings of ``python -m orders``."""

    policy_file: ExistingFile = Field(PACKAGED_POLICY, description="who may call what")
    payments_url: str = Field(
        pattern=r"^https://[^/?#@]+$", description="where payments is, https://host:port"
    )
    payments_spiffe_id: SpiffeIdSetting = Field(description="the SPIFFE ID that payments must prove")

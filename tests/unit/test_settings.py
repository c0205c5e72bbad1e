"""Settings: each fault is one line with the variable's name, the start stops, nothing secret is echoed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from ztmtls.settings import EX_CONFIG, ExistingFile, ServiceSettings, SpiffeIdSetting, load
from ztmtls.workload_endpoint import InvalidEndpoint, parse_endpoint

GOOD = {
    "SPIFFE_ENDPOINT_SOCKET": "unix:/run/spire/agent.sock",
    "SPIFFE_ID": "spiffe://zt.example/ns/zt-demo/sa/orders",
    "PORT": "8443",
    "PROBE_PORT": "9443",
}
CANARY = "Zz-CANARY-%40/:#"


class Settings(ServiceSettings):
    ca_file: ExistingFile | None = Field(None, description="PEM file with the CA")
    peer_id: SpiffeIdSetting = Field("spiffe://zt.example/peer", description="the peer")
    session_key: SecretStr = Field(SecretStr("x" * 32), min_length=32, description="at least 32 characters")
    pin: int = Field(0, description="a number")
    hosts: list[str] = Field(["a"], description="JSON list of host names")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def faults(capsys: pytest.CaptureFixture[str], settings: type[BaseSettings] = Settings) -> dict[str, str]:
    """Load, expect the exit, and return the lines by variable."""
    with pytest.raises(SystemExit) as caught:
        load(settings)
    assert caught.value.code == EX_CONFIG == 78
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines), err
    return found


def test_settings_are_read_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOG_LEVEL", "debug")
    environment.setenv("GRACE_SECONDS", "2.5")

    settings = load(Settings)

    assert settings.spiffe_endpoint_socket == GOOD["SPIFFE_ENDPOINT_SOCKET"]
    assert settings.spiffe_id == GOOD["SPIFFE_ID"]
    assert (settings.port, settings.probe_port) == (8443, 9443)
    assert (settings.log_level, settings.grace_seconds) == ("debug", 2.5)
    # Nothing is open to the network unless it is said.
    assert (settings.host, settings.probe_host) == ("127.0.0.1", "127.0.0.1")
    assert (settings.http, settings.loop) == ("auto", "auto")
    assert (settings.startup_timeout_seconds, settings.drain_seconds) == (0, 0)


def test_settings_do_not_change() -> None:
    settings = load(Settings)

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_file_in_the_working_directory_is_not_read(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("PORT=1\n")
    environment.delenv("PORT")

    assert "PORT" in faults(capsys)


def test_every_missing_variable_is_named_with_what_is_expected(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch
) -> None:
    for name in GOOD:
        environment.delenv(name)

    found = faults(capsys)

    assert set(found) == set(GOOD)
    for name, text in found.items():
        description = Settings.model_fields[name.lower()].description
        assert text == f"is not set (expected: {description})"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "", "integer"), ("PORT", "http", "integer"), ("PORT", "0", "greater"),
        ("PORT", "65536", "less"), ("PORT", "-1", "greater"), ("PORT", "1.5", "integer"),
        ("PROBE_PORT", "x", "integer"), ("LOG_LEVEL", "loud", "'debug', 'info'"),
        ("HTTP", "h2", "'auto', 'h11'"), ("LOOP", "trio", "'uvloop'"),
        ("DRAIN_SECONDS", "-1", "greater"), ("GRACE_SECONDS", "1e9", "less"),
        ("GRACE_SECONDS", "nan", ""), ("STARTUP_TIMEOUT_SECONDS", "soon", "number"),
        ("SPIFFE_ID", "", "does not begin with"), ("SPIFFE_ID", "orders", "does not begin with"),
        ("SPIFFE_ID", "spiffe://zt.example", "needs a path"),
        ("SPIFFE_ID", "spiffe://zt.example/a/", "ends in '/'"),
        ("SPIFFE_ID", "spiffe://ZT.example/a", "may hold only"),
        ("SPIFFE_ID", "spiffe://zt.example/a\nPORT: x", "may hold only"),
        ("SPIFFE_ENDPOINT_SOCKET", "", "set SPIFFE_ENDPOINT_SOCKET"),
        ("SPIFFE_ENDPOINT_SOCKET", "/run/agent.sock", "must begin with 'unix:/'"),
        ("SPIFFE_ENDPOINT_SOCKET", "unix://run/agent.sock", "authority"),
        ("SPIFFE_ENDPOINT_SOCKET", "tcp://localhost:1", "IP address"),
        ("SPIFFE_ENDPOINT_SOCKET", "unix:/a\nb", "printable ASCII"),
        ("CA_FILE", "/nowhere/ca.pem", "no file at /nowhere/ca.pem"),
        ("CA_FILE", "/", "no file at /"), ("CA_FILE", "", "no file"),
        ("PEER_ID", "payments", "does not begin with"),
    ],
)  # fmt: skip
def test_fault_is_one_line_with_the_variables_name(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    environment.setenv(name, value)

    found = faults(capsys)

    assert list(found) == [name]
    assert expected in found[name]
    assert found[name].isprintable()
    assert "Value error" not in found[name]
    assert "pydantic" not in found[name]


def test_all_faults_are_named_at_once(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch
) -> None:
    environment.delenv("SPIFFE_ID")
    environment.setenv("PORT", "x")
    environment.setenv("LOG_LEVEL", "x")
    environment.setenv("CA_FILE", "/nowhere")

    assert set(faults(capsys)) == {"SPIFFE_ID", "PORT", "LOG_LEVEL", "CA_FILE"}


def test_list_that_is_no_json_is_a_fault_like_any_other(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("HOSTS", "a,b")

    assert list(faults(capsys)) == ["HOSTS"]


def test_values_are_not_echoed(capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch) -> None:
    # Given a secret that is too short, and one that slipped into the wrong variables.
    for name in ("SESSION_KEY", "PIN", "PORT", "LOG_LEVEL", "GRACE_SECONDS"):
        environment.setenv(name, CANARY)

    with pytest.raises(SystemExit):
        load(Settings)

    out, err = capsys.readouterr()
    assert "SESSION_KEY: " in err
    assert "CANARY" not in out + err


def test_settings_show_no_secret(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SESSION_KEY", CANARY * 2)

    settings = load(Settings)

    assert "CANARY" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.session_key.get_secret_value() == CANARY * 2


def test_settings_class_of_ones_own(
    capsys: pytest.CaptureFixture[str], environment: pytest.MonkeyPatch
) -> None:
    class Own(BaseSettings):
        model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True)
        undocumented: int

    environment.delenv("UNDOCUMENTED", raising=False)

    assert faults(capsys, Own) == {"UNDOCUMENTED": "is not set"}


def test_process_ends_with_78_and_no_traceback(tmp_path: Path) -> None:
    code = "from ztmtls.settings import ServiceSettings, load; load(ServiceSettings); print('started')"

    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], **GOOD, "PORT": "x"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 78
    assert found.stdout == ""
    assert found.stderr.startswith("PORT: ")
    assert found.stderr.count("\n") == 1


# -- The address of the Workload API, beside the forms that the source's tests list ------------------------


@pytest.mark.parametrize(
    "address",
    ["unix", "UNIX", "unix:run/a.sock", "unix://localhost/run/a.sock", "unix://u@h/a", "unix:/a?", "unix:/a#",
     "tcp://1.2.3.4:0", "tcp://1.2.3.4:x", "tcp://1.2.3.4:-1", "tcp://1.2.3:80", "tcp://01.2.3.4:80",
     "tcp://[::1]", "tcp://[::1:80", "tcp://::1:80", "tcp://[::1]x:80", "tcp://john:doe@1.2.3.4:5",
     "tcp:1.2.3.4:5", "tcp://1.2.3.4:5/", "tcp://1.2.3.4:5#x", "dns:///a", "ipv4:1.2.3.4:5",
     "unix-abstract:a", "unix:/é", "unix:/a\tb", "unix:/a\0", " unix:/a", "unix:/a "],
)  # fmt: skip
def test_address_that_is_refused(address: str) -> None:
    with pytest.raises(InvalidEndpoint) as caught:
        parse_endpoint(address)

    assert caught.value.reason == "invalid_endpoint"
    assert str(caught.value).isprintable()

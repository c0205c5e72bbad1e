"""What the library's README shows, runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ztmtls.listen import bind

README = Path(__file__).parents[2] / "libs" / "ztmtls" / "README.md"


def test_the_working_pair_works(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block
    with bind("127.0.0.1", 0, "PORT") as sock:
        port = sock.getsockname()[1]
    program = tmp_path / "pair.py"
    program.write_text(block[1].replace("8443", str(port)))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert "hello, spiffe://zt.example/caller from spiffe://zt.example/greeter" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_table_exists() -> None:
    source = README.parent / "src" / "ztmtls"
    table = README.read_text().split("## Modules")[1].split("##")[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert len(named) > 10
    for name in named:
        assert (source / f"{name}.py").is_file() or (source / name).is_dir(), name

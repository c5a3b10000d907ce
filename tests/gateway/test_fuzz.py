"""schemathesis makes requests of the OpenAPI document: no answer is a 5xx that the document does not name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_page import running

PROGRAM = os.environ.get("SCHEMATHESIS") or shutil.which(
    "schemathesis"
)  # in an environment of its own: its pytest plugin is heavy


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(PROGRAM is None, reason="schemathesis is not installed: name its program by SCHEMATHESIS")
def test_two_thousand_cases(tmp_path: Path) -> None:
    with running(tmp_path, 0.01) as url:
        command = [
            str(PROGRAM), "run", f"{url}/openapi.json", "--max-examples", os.environ.get("CASES", "220"), "--seed", "1",
            "--checks", "not_a_server_error,status_code_conformance", "--exclude-path-regex", "/events$",
            "--request-timeout", "60", "--mode", "all", "--phases", "examples,coverage,fuzzing",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=tmp_path)
    sys.stdout.write(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

"""Long commands say how they go: lines without a terminal, a bar on one, and what was finished after Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from hunyuan3d_export import parity
from hunyuan3d_export.commands import options, watched
from hunyuan3d_export.dit import network

WAIT_S = 120.0


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    """stderr(terminal): what the commands write to stderr, 80 columns wide."""

    def make(terminal: bool) -> io.StringIO:
        file = io.StringIO()
        monkeypatch.setattr(options, "errors", Console(file=file, force_terminal=terminal, width=80))
        return file

    return make


def test_lines_for_parts_and_for_silence(stderr: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = stderr(False), threading.Event()
    monkeypatch.setattr(watched, "SIGN_S", 0.02)
    say = watched._Lines._say
    monkeypatch.setattr(watched._Lines, "_say", lambda self, text: (say(self, text), said.set()))
    with watched.watched("verify", "checks") as watch:
        watch.plan(2, 10.0)
        watch.begin("hunyuan3d_dit: loading")
        assert said.wait(WAIT_S), "something is said although nothing happens"
        watch.advance(5.0)
        watch.finish("evaluation: 1e-06 ok")
    text = file.getvalue()
    assert "verify: hunyuan3d_dit: loading: 0/2 checks, 0:00\n" in text
    assert re.search(r"verify: evaluation: 1e-06 ok \(1/2 checks, 0:0\d, 0:0\d left\)\n", text)


def test_a_bar_on_a_terminal_fits(stderr: Callable[[bool], io.StringIO]) -> None:
    file = stderr(True)
    with watched.watched("verify", "checks") as watch:
        watch.plan(8, 10.0)
        watch.begin("hunyuan3d_dit_guided, ONNX Runtime")
        watch.advance(2.5)
    shown = [re.sub(r"\x1b\[[^m]*[a-zA-Z]", "", line) for line in file.getvalue().splitlines()]
    bars = [line for line in shown if "0/8 checks, 0:00" in line]
    assert bars and "hunyuan3d_dit_guided, ONNX Runtime" in bars[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_an_interrupt_says_what_was_finished(terminal: bool, stderr: Callable[[bool], io.StringIO], tmp_path: Path) -> None:
    file = stderr(terminal)
    with pytest.raises(typer.Exit) as ended, watched.watched("verify", "checks") as watch:
        watch.plan(3, 3.0)
        watch.finish("first: ok")
        watch.wrote(tmp_path / "parity.json")
        raise KeyboardInterrupt
    text = file.getvalue()
    assert ended.value.exit_code == 130 and "first: ok" in text
    assert f"receipt: {tmp_path / 'parity.json'}\ninterrupted: 1 of 3 checks were finished\n" in text


class Counted:
    """A watch that remembers what it was told."""

    def __init__(self) -> None:
        self.parts, self.work, self.done, self.lines, self.files = 0, 0.0, 0.0, [], []

    def plan(self, parts: int, work: float) -> None:
        self.parts, self.work = parts, work

    def begin(self, name: str) -> None: ...

    def advance(self, work: float) -> None:
        self.done += work

    def finish(self, line: str) -> None:
        self.lines.append(line)

    def wrote(self, path: Path) -> None:
        self.files.append(path)


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_planned_is_what_is_done(
    quick: bool, artifacts: Callable[..., Path], micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_MOST_STEPS", 4)
    out, watch = Path(shutil.copytree(artifacts(), tmp_path / "out")), Counted()
    for receipt in out.glob("*/parity.json"):
        receipt.unlink()
    results = parity.verify(out, micro, run=parity.RunOptions(quick=quick, watch=watch))
    made = sum(map(len, results.values()))
    assert (watch.parts, len(watch.lines)) == (made, made) and made == (2 if quick else 8)
    assert watch.done == watch.work > 0
    assert len(watch.files) == (0 if quick else 2) and sorted(out.glob("*/parity.json")) == sorted(watch.files)


def on_a_terminal(command: list[str], until: str, then: signal.Signals) -> tuple[int, str]:
    """The exit code and the output of a command on a terminal of 80 columns that gets a signal after `until` was shown."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment, start_new_session=True)
    os.close(follower)
    shown, sent, deadline = "", False, time.monotonic() + WAIT_S
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 1.0)[0]:
                continue
            try:
                shown += os.read(leader, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
            if until in shown and not sent:
                process.send_signal(then)
                sent = True
        else:
            pytest.fail(f"{command} must end within {WAIT_S} s, got (signal {'sent' if sent else 'not sent'}):\n{shown}")
        code = process.wait(WAIT_S)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return code, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


@pytest.mark.served
def test_serve_on_a_terminal_is_a_summary(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    from hunyuan3d_export.repository_from_artifacts import deploy

    deploy(artifacts(), tmp_path / "repository")
    serve = [sys.executable, "-m", "hunyuan3d_export", "serve", "--repository", str(tmp_path / "repository"), "--grpc-port=0"]
    code, shown = on_a_terminal(serve, "try: hunyuan3d sample --context context.npy", signal.SIGINT)
    assert code == 0 and "tritonserver: " not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("{")]
    address = json.loads(line)["grpc"]
    assert (
        f"ready at {address} (gRPC)" in shown
        and "runtime cpu: denoiser: custom fp32, " in shown
        and f"--url {address}" in shown
    )
    code, shown = on_a_terminal([*serve, "--log"], "try: ", signal.SIGINT)
    assert code == 0 and "tritonserver: I" in shown


@pytest.mark.served
def test_a_failed_start_gives_its_cause_once(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    from hunyuan3d_export.repository_from_artifacts import deploy

    deploy(artifacts(), tmp_path)
    (tmp_path / "hunyuan3d_sampler" / "1" / "model.py").write_text("raise RuntimeError('broken on purpose')\n")
    serve = [sys.executable, "-m", "hunyuan3d_export", "serve", "--repository", str(tmp_path), "--grpc-port=0", "--no-log"]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1 and done.stderr.count("broken on purpose") == 1
    # Triton 24.10 now and then crashes while it stops after a failed start.
    message = (
        r"^error: tritonserver must stay up, got (exit code 1|signal 11): "
        r"hunyuan3d_sampler failed to load: RuntimeError: broken on purpose$"
    )
    assert (
        re.search(message, done.stderr, re.MULTILINE) and "\nhint: its whole log: hunyuan3d-export serve --log" in done.stderr
    )
    assert len(done.stderr.splitlines()) <= 5

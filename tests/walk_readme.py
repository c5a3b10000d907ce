"""Walks README.md from top to bottom in a fresh clone, as a newcomer would, and prints each command's exit code and seconds.

    python3 tests/walk_readme.py                   every block; about 50 minutes on two cores, of which half is make test
    python3 tests/walk_readme.py --skip "make test" --skip "hunyuan3d-export quality"

Only Python's standard library is needed: the first commands of README make the environment that the later ones use. What a newcomer
brings stands ready: a picture, and weights in the layout of the official files, of tiny sizes, which a server on this machine also
offers in the hub's place. A command that serves stays until the next one starts. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(^|\s+)#\s.*$")
READY_S = 1800.0
HUB_ID = "tencent/Hunyuan3D-2"
# What this machine may lack, and the command that tells.
NEEDS = {
    "docker compose": ("a Docker engine", ("docker", "info")),
    "kubectl": ("a Kubernetes cluster", ("kubectl", "cluster-info")),
    "make export-engine": ("an NVIDIA GPU", ("nvidia-smi",)),
}
READER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/hub")
from checkpoints_of_the_hub import write_checkpoint
from PIL import Image
write_checkpoint(Path("model.fp16.safetensors"), parts=("model", "conditioner"))  # a decoder of tiny sizes has other configs than git's
Image.new("RGB", (320, 240), "orange").save("picture.png")
"""
HUB = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/hub")
from hub_server import running
with running(Path(sys.argv[1])) as hub:
    print(hub.url, flush=True)
    time.sleep(1e6)
"""


class Walk:
    """The state that a newcomer's terminal keeps: the folder, the environment, the server in another terminal."""

    def __init__(self, folder: Path, log: IO[str]) -> None:
        self.folder, self.log = folder, log
        self.prefix = f"cd {folder}"
        self.environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.rows: list[tuple[str, str, float]] = []
        self.background: list[subprocess.Popen[str]] = []
        self.hub: subprocess.Popen[str] | None = None

    def command(self, line: str) -> None:
        """Runs one line of a bash block and notes its exit code, or the reason why it cannot run here."""
        missing = next((what for words, (what, probe) in NEEDS.items() if line.startswith(words) and not works(probe)), None)
        if missing:
            self.note(line, f"needs {missing}", 0.0)
        elif line.startswith(("git clone", "source ")):
            line = line.replace("REPOSITORY_URL", str(ROOT))
            self.run(line)
            self.prefix += " && cd hunyuan3d-triton" if line.startswith("git") else f" && {line}"
        elif re.search(r"\bserve\b", line):
            self.serve(line)
        else:
            self.run(line)
            if line == "make demo":
                self.prepare()

    def run(self, line: str, *, shown: str = "") -> None:
        begin = time.monotonic()
        self.log.write(f"\n$ {line}\n")
        self.log.flush()
        call = subprocess.run(
            ["bash", "-c", f"{self.prefix} && {line}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            check=False,
        )
        self.note(shown or line, str(call.returncode), time.monotonic() - begin)

    def serve(self, line: str) -> None:
        """Starts a server and waits until it is ready. The one before it ends first, unless the new one takes free ports."""
        if "--grpc-port 0" not in line:
            self.stop()
        begin = time.monotonic()
        self.log.write(f"\n$ {line}\n")
        self.log.flush()
        server = subprocess.Popen(
            ["bash", "-c", f"{self.prefix} && {line}"],
            stdout=subprocess.PIPE, stderr=self.log, env=self.environment, text=True, start_new_session=True,
        )  # fmt: skip
        assert server.stdout
        limit = threading.Timer(READY_S, os.killpg, (server.pid, signal.SIGKILL))
        limit.start()
        ready = False
        for output in server.stdout:
            self.log.write(output)
            if ready := output.startswith("{"):
                break
        limit.cancel()
        self.note(line, "ready" if ready else f"{server.wait()}", time.monotonic() - begin)
        self.background.append(server)
        if "--grpc-port 0" in line:
            self.stop(server)

    def stop(self, *servers: subprocess.Popen[str]) -> None:
        """Ends servers as Ctrl-C does, all of them if none is named."""
        for server in servers or tuple(self.background):
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
            assert server.stdout
            self.log.write(server.stdout.read())
            if (code := server.wait(timeout=120)) not in (0, -signal.SIGINT, 128 + signal.SIGINT):
                self.note("Ctrl-C", str(code), 0.0)
            self.background.remove(server)

    def prepare(self) -> None:
        """Weights and a picture for the reader, and the hub's stand-in."""
        clone = self.folder / "hunyuan3d-triton"
        python = str(clone / ".venv" / "bin" / "python")
        subprocess.run([python, "-c", READER], cwd=clone, check=True)
        hub = self.folder / "hub" / HUB_ID / "hunyuan3d-dit-v2-0"
        hub.mkdir(parents=True)
        shutil.copy(clone / "model.fp16.safetensors", hub)
        self.hub = subprocess.Popen([python, "-c", HUB, str(self.folder / "hub")], cwd=clone, stdout=subprocess.PIPE, text=True)
        assert self.hub.stdout
        self.environment |= {"HF_ENDPOINT": self.hub.stdout.readline().strip(), "HF_HOME": str(self.folder / "hub-cache")}

    def note(self, line: str, result: str, seconds: float) -> None:
        self.rows.append((line, result, seconds))
        say(f"{result:>28}  {seconds:7.1f} s  {line}")

    def close(self) -> None:
        self.stop()
        if self.hub is not None:
            self.hub.terminate()
            self.hub.wait()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def works(command: tuple[str, ...]) -> bool:
    """Whether a program is there and succeeds."""
    return shutil.which(command[0]) is not None and not subprocess.run(command, capture_output=True, check=False).returncode


def lines_of(block: str) -> list[str]:
    """The commands of a bash block: no comments, continued lines joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    return [command for line in joined if (command := COMMENT.sub("", line).strip())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", action="append", default=[], help="the beginning of a command to leave out; repeatable")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "readme.log", help="where the output goes")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, arguments.log.open("w") as log:
        walk = Walk(Path(folder), log)
        try:
            for language, block in BLOCK.findall((ROOT / "README.md").read_text()):
                if language == "python":
                    (Path(folder) / "block.py").write_text(block)
                    walk.run(f"python {Path(folder) / 'block.py'}", shown="the block of Python")
                    continue
                for line in lines_of(block):
                    if line.startswith(tuple(arguments.skip)):
                        walk.note(line, "left out", 0.0)
                    else:
                        walk.command(line)
        finally:
            walk.close()
    failed = [
        line for line, result, _ in walk.rows if result not in ("0", "ready", "left out") and not result.startswith("needs")
    ]
    say(
        f"{len(walk.rows)} commands, {len(failed)} failed, {(time.monotonic() - begin) / 60:.0f} minutes; output: {arguments.log}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

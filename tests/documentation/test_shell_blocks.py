"""The shell commands of the documents: each is run as it is printed, or listed with the reason why it cannot run here.

A command runs in a copy of the working tree, where `.venv/bin` leads to the Python of these tests and the full-size checkpoint
that the documents speak of is one of the smallest network. Commands that depend on each other form a scene and run in its order.
Whether they run or not, the options of all commands are checked against the parser of the program that they call.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
)
WAIT_S = 900.0

# scene -> its commands, in order. A command that serves stays in the background; the clients after it find its address in
# HUNYUAN3D_URL.
SCENES: dict[str, tuple[str, ...]] = {
    "weights": (
        "make export-onnx CHECKPOINT=model.fp16.safetensors PRECISION=fp16",
        "make verify CHECKPOINT=model.fp16.safetensors PRECISION=fp16",
        "make deploy CHECKPOINT=model.fp16.safetensors PRECISION=fp16",
        "hunyuan3d-export serve --grpc-port 0",
        "hunyuan3d health",
        "hunyuan3d sample --context context.npy --steps 10 --num-latents 128 --out latents.npy",
        "hunyuan3d denoise --latents latents.npy --t 0.5 --context context.npy --out velocity.npy",
        """echo '{"inputs": [{"name": "context_fp32", "datatype": "FP32", "shape": [1, 1, 1536], "data": ['$(seq -s, 1536)']},' """
        """'{"name": "steps", "datatype": "INT32", "shape": [1], "data": [10]},' """
        """'{"name": "num_latents", "datatype": "INT32", "shape": [1], "data": [128]}]}' > request.json""",
        "curl --fail-with-body --silent --data @request.json --output answer.json"
        " localhost:8000/v2/models/hunyuan3d_sampler_unary/infer",
        "mkdir -p secrets && openssl rand -hex 32 > secrets/api_key",
        'export HUNYUAN3D_HEADER="triton-grpc-protocol-hunyuan3d-key: $(cat secrets/api_key)" && hunyuan3d health',
    ),
    "without a GPU": ("make gpu-check",),
    "torch runtime": (
        "hunyuan3d-export deploy --checkpoint model.fp16.safetensors --precision fp16 --repository build/repository"
        " --torch attention_backend=flash",
        "hunyuan3d-export serve --repository build/repository --config torch",
        "hunyuan3d sample --context context.npy --steps 10 --num-latents 128 --out latents.npy",
    ),
    "pictures": (
        "make deploy CHECKPOINT=model.fp16.safetensors PRECISION=fp16",
        "hunyuan3d-export conditioner --checkpoint model.fp16.safetensors --precision fp16 --out build/encoder",
        "hunyuan3d-export verify --artifacts build/encoder --checkpoint model.fp16.safetensors",
        "hunyuan3d-export deploy --artifacts build/encoder",
        "hunyuan3d-export serve --grpc-port 0",
        "hunyuan3d generate picture.png --steps 10 --num-latents 128 --out latents.npy",
        "hunyuan3d-export conditioner --checkpoint model.fp16.safetensors --precision fp16 --views 4 --out build/encoder-views",
        "hunyuan3d-export deploy --artifacts build/encoder-views",
    ),
    "photographs": (
        "make deploy CHECKPOINT=model.fp16.safetensors PRECISION=fp16",
        "hunyuan3d-export conditioner --checkpoint model.fp16.safetensors --precision fp16 --out build/encoder",
        "hunyuan3d-export deploy --artifacts build/encoder",
        "hunyuan3d-export background --out build/background",
        "hunyuan3d-export verify --artifacts build/background",
        "hunyuan3d-export deploy --artifacts build/background",
        "hunyuan3d-export serve --grpc-port 0",
        "hunyuan3d cutout photo.jpg --out cut.png",
    ),
    "prompts": (
        "make deploy serve PRESET=shapes REPOSITORY=build/repository",
        'hunyuan3d sample --prompt "two flat tori" --out tori.glb --resolution 128 --picture tori.png --ply tori.ply',
    ),
    "first server": ("make serve", "hunyuan3d health"),
    "meshes": (
        "hunyuan3d-export onnx --preset tiny --graph all --out build/random",
        "hunyuan3d-export conditioner --out build/random",
        "hunyuan3d-export vae --preset tiny --out build/random",
        "hunyuan3d-export deploy --artifacts build/random --repository build/repository",
        "hunyuan3d-export serve --repository build/repository",
        "hunyuan3d generate picture.png --out chair.glb --save-latents chair.npy --resolution 32 --max-faces 40000",
        "hunyuan3d decode chair.npy --out chair.ply --resolution 48",
    ),
    "demo": ("make demo",),
}
SLOW = {"torch runtime", "pictures", "photographs", "meshes", "prompts", "first server", "demo"}

TESTS = "starts these tests, or is started beside them by CI"
CLONE = "needs the network; the tests run in an environment that is set up and active"
GPU = "needs an NVIDIA GPU"
DECODER = "needs a checkpoint with a shape decoder of full size; tests/export/shapevae does the same with small ones"
DOCKER = "needs Docker"
CLUSTER = "needs a Kubernetes cluster"
LONG = "takes many minutes on a full-size network or on many samples; the tests run the same code on a smaller scale"
HUB = "downloads gigabytes; tests/served/test_one_checkpoint.py runs it against a small hub on this machine"
PROTOCOL = "tests/served/test_protocol.py runs it against a server of its own"
GATEWAY = "runs until it is stopped; tests/gateway starts the same"
PICTURES = "needs a server with an image encoder and a folder of pictures; tests/client/test_batch_killed.py runs it"
CANNOT_RUN: dict[str, str] = {
    **dict.fromkeys(
        (
            command
            for block in re.findall(
                r"^```bash\n(.*?)^```", (ROOT / "docs" / "protocol.md").read_text(), re.DOTALL | re.MULTILINE
            )
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()
            if (command := re.sub(r"(^|\s+)#\s.*$", "", line).strip())
        ),
        PROTOCOL,
    ),
    "hunyuan3d batch pictures/ --out meshes/": PICTURES,
    "hunyuan3d batch list.jsonl --out meshes/ --shard 0/4": PICTURES,
    "kubectl apply -f docker/kubernetes/batch-job.yaml": CLUSTER,
    "git clone REPOSITORY_URL hunyuan3d-triton && cd hunyuan3d-triton": CLONE,
    "source .venv/bin/activate": CLONE,
    'pip install ".[export,shapes]"': CLONE,
    'pip install ".[export,rtx,embedded]"': CLONE,
    "hunyuan3d-export engine --preset v2-mini --precision fp16 --onnx build/mini-fp16 --out build/mini-rtx --target tensorrt-rtx"
    " --compute-capability SM86 --compute-capability SM89 --compute-capability SM120": LONG,
    "hunyuan3d-export deploy --artifacts build/mini-rtx --repository build/repository": LONG,
    "hunyuan3d-export serve --repository build/repository --config rtx": GPU,
    "hunyuan3d-export serve tencent/Hunyuan3D-2 --subfolder hunyuan3d-dit-v2-0": HUB,
    "make setup": CLONE,
    "PYTHONPATH=export:client python -m hunyuan3d_export.gpu_check": GPU,
    "docker compose --profile export run --rm export engine --checkpoint w.safetensors --onnx build/onnx --out build/plans": DOCKER,
    "docker compose --profile export run --rm export deploy --artifacts build/plans": DOCKER,
    "hunyuan3d-export vae --checkpoint model.fp16.safetensors --preset v2-0 --precision fp16 --out build/vae": DECODER,
    "hunyuan3d-export verify --artifacts build/vae --checkpoint model.fp16.safetensors": DECODER,
    "hunyuan3d-export engine --onnx build/vae --out build/vae-plan --target tensorrt": GPU,
    "hunyuan3d-export deploy --artifacts build/vae-plan": GPU,
    "make web": GATEWAY,
    "pip install '.[gateway]'": CLONE,
    "hunyuan3d-gateway --servers localhost:8001": GATEWAY,
    "docker compose --profile web up gateway server-cpu": DOCKER,
    "kubectl apply -k docker/kubernetes/web": CLUSTER,
    "make test": TESTS,
    "make lint": TESTS,
    "make lint test": TESTS,
    "make test-slow": TESTS,
    "make docker-test": TESTS,
    "make bench": LONG,
    "make export-engine CHECKPOINT=model.fp16.safetensors": GPU,
    "hunyuan3d-export engine --onnx build/encoder --out build/encoder-plan --target tensorrt": GPU,
    "hunyuan3d-export engine --onnx build/v2-0-fp16 --out build/v2-0-fp16-tensorrt --target tensorrt": GPU,
    "hunyuan3d-export engine --onnx build/v2-0-fp16 --out build/v2-0-fp16-rtx --target tensorrt-rtx --compute-capability SM89": LONG,
    "hunyuan3d-export engine --weight-stripped --onnx build/base-fp16 --out build/stripped": GPU,
    "hunyuan3d-export refit --plan build/stripped --onnx build/tuned-fp16 --out build/tuned-tensorrt"
    " --checkpoint tuned.safetensors": GPU,
    "hunyuan3d-export verify --engine build/tuned-tensorrt --checkpoint tuned.safetensors": GPU,
    "hunyuan3d-export quality": LONG,
    "hunyuan3d-export quality --through onnx --artifacts build/shapes-fp32": LONG,
    "hunyuan3d-export quality --through served --url localhost:8001": LONG,
    "hunyuan3d-export quality --through served": LONG,
    "python examples/shapes/train.py --out build/shapes --compile": LONG,
    "python examples/shapes/train_decoder.py --out build/shapes --max-minutes 26": LONG,
    "python examples/shapes/train_encoder.py --out build/shapes --steps 9000": LONG,
    "hunyuan3d-export quality --mesh-seeds 2": LONG,
    "python examples/shapes/evaluate_pictures.py": LONG,
    "python examples/shapes/evaluate.py": LONG,
    "python examples/shapes/evaluate.py --checkpoint build/shapes/shapes.safetensors --prompts held-out": LONG,
    "python examples/shapes/evaluate.py --docs build/docs": LONG,
    "docker compose up server": DOCKER,
    "docker compose --profile cpu up server-cpu": DOCKER,
    "SECRETS=./secrets API_KEY_FILE=/secrets/api_key docker compose up server": DOCKER,
    "kubectl apply -k docker/kubernetes/overlays/gpu": CLUSTER,
}


def commands_of(text: str) -> list[str]:
    """The command lines of a document's bash blocks, without comments, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s+)#\s.*$", "", line).strip())]


def spans_of(text: str) -> list[str]:
    """Commands of this project that stand in a sentence, between backticks."""
    return re.findall(r"`((?:hunyuan3d|hunyuan3d-export|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


PRINTED = {command: document for document in DOCUMENTS for command in commands_of(document.read_text())}
SPANS = sorted({span for document in DOCUMENTS for span in spans_of(document.read_text())})


def test_every_command_is_run_or_says_why_not() -> None:
    run = {command for commands in SCENES.values() for command in commands}
    assert not run & set(CANNOT_RUN), "a command is run or not"
    assert {command: str(path) for command, path in PRINTED.items() if command not in run | set(CANNOT_RUN)} == {}
    assert (run | set(CANNOT_RUN)) - set(PRINTED) == set(), "listed here, printed nowhere"


def test_shell_stands_in_bash_blocks() -> None:
    """Indented blocks would escape the tests above."""
    indented = re.compile(r"^ {4,}((hunyuan3d|make|python|pip|docker|kubectl)[ -].*)$", re.MULTILINE)
    assert {str(path): indented.findall(path.read_text()) for path in DOCUMENTS if indented.search(path.read_text())} == {}


def test_the_collector_collects() -> None:
    text = "`make x`\n```bash\nmake demo    # why\n# a comment\na --b \\\n    --c 'd'\n```\n```python\nmake no\n```\n"
    assert commands_of(text) == ["make demo", "a --b --c 'd'"] and spans_of(text) == ["make x"]


# --- options: every command, run or not


class Unparsed(Exception):
    """The program that a command line calls would refuse it."""


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each program call in a line, variables before it left out."""
    lexer = shlex.shlex(line.replace("...", ""), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in (";", "&&", "||", "|", ">"):
            if words:
                yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


def group(program: str) -> Any:
    import typer

    from hunyuan3d_client import cli
    from hunyuan3d_export.commands import app
    from hunyuan3d_gateway import cli as gateway

    apps = {"hunyuan3d": cli.app, "hunyuan3d-export": app.app, "hunyuan3d-gateway": gateway.app}
    return typer.main.get_command(apps[program])


def parse(program: str, arguments: Sequence[str]) -> None:
    """The command line as the program itself would read it, up to the call of its function."""
    whole = group(program)
    try:
        context = whole.make_context(program, [*arguments])
        if program == "hunyuan3d-gateway" and not [*context._protected_args, *context.args]:
            return  # it serves without a subcommand
        name, command, rest = whole.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except Exception as error:  # typer brings a click of its own or uses the one that is installed
        if not hasattr(error, "format_message"):
            raise
        raise Unparsed(f"{program} {shlex.join(arguments)}: {error.format_message()}") from error


def check_names(program: str, arguments: Sequence[str]) -> None:
    """The subcommand and the names of the options exist: a sentence may leave the rest of a command out."""
    whole = group(program)
    known = {option for parameter in whole.params for option in parameter.opts}
    for word in arguments:
        if word in whole.commands:
            known |= {
                option for parameter in whole.commands[word].params for option in [*parameter.opts, *parameter.secondary_opts]
            }
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}]
    if unknown or not any(word in whole.commands or word == "--help" or word.startswith("--") for word in arguments):
        raise Unparsed(f"{program} {shlex.join(arguments)}: {unknown or 'no subcommand'}")


def make_recipe(arguments: Sequence[str]) -> list[str]:
    """The lines that make would run. Raises Unparsed for an unknown target, or a variable that the Makefile does not have."""
    known = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = {word.partition("=")[0] for word in arguments if "=" in word}
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode or variables - known:
        raise Unparsed(f"make {shlex.join(arguments)}: {variables - known or done.stderr}")
    return done.stdout.splitlines()


def check_script(words: Sequence[str]) -> None:
    """A script or module of this tree: it exists, and its text has the options."""
    script = words[2].replace(".", "/") if words[1] == "-m" else words[1]
    paths = [path for base in ("", "export", "client") for path in (ROOT / base / script, ROOT / base / script / "__main__.py")]
    found = next((path for path in paths if path.is_file()), None)
    text = "" if found is None else found.read_text()
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
    if found is None or unknown:
        raise Unparsed(f"{shlex.join(words)}: {unknown or 'no such script'}")


def check_options(line: str, *, whole: bool) -> int:
    """Checks every call of this project's programs in a line; how many there were. whole: nothing may be left out."""
    checked = 0
    for program, *arguments in simple_commands(line):
        if program == "make":
            checked += 1
            for step in make_recipe(arguments):
                if step.startswith(".venv/bin/hunyuan3d"):
                    parse(Path(step.split()[0]).name, shlex.split(step)[1:])
        elif program in ("hunyuan3d", "hunyuan3d-export", "hunyuan3d-gateway"):
            checked += 1
            (parse if whole else check_names)(program, arguments)
        elif program == "python":
            checked += 1
            check_script([program, *arguments])
    return checked


# The commands of docs/protocol.md call programs of others; the test that runs them checks them.
@pytest.mark.parametrize("command", [command for command in PRINTED if CANNOT_RUN.get(command) != PROTOCOL])
def test_options_of_commands(command: str) -> None:
    programs = {program for program, *_ in simple_commands(command)}
    assert check_options(command, whole=True) or programs & {
        "git",
        "source",
        "pip",
        "docker",
        "kubectl",
        "mkdir",
        "echo",
        "curl",
    }


@pytest.mark.parametrize("span", SPANS)
def test_options_of_commands_in_sentences(span: str) -> None:
    assert check_options(span, whole=False)


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target", "make deploy PREST=tiny", "hunyuan3d nothing", "hunyuan3d sample --out x --step 3",
        "hunyuan3d sample --context x", "hunyuan3d-export serve --grpc-port many", "python examples/shapes/train.py --no-such",
        "python -m hunyuan3d_export.no_such", "hunyuan3d-export info --preset tiny && hunyuan3d-export info --presets tiny",
    ],
)  # fmt: skip
def test_wrong_options_are_found(command: str) -> None:
    with pytest.raises(Unparsed):
        check_options(command, whole=True)


def test_the_programs_are_those_that_are_installed() -> None:
    scripts = {
        script.name for script in importlib.metadata.entry_points(group="console_scripts") if "hunyuan3d" in script.value
    }
    assert scripts == {"hunyuan3d", "hunyuan3d-export", "hunyuan3d-gateway"}


# --- running


class Tree:
    """A copy of the working tree with an active environment, and at most one server that the documents start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (
            "client",
            "export",
            "gateway",
            "model_repository",
            "examples",
            "Makefile",
            "pyproject.toml",
            "constraints.txt",
        ):
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", *ARTIFACTS)
                )
            else:
                shutil.copy(ROOT / name, folder / name)
        python = f"exec {shlex.quote(sys.executable)}"
        self._program("python", f'{python} "$@"')
        self._program("hunyuan3d", f'{python} -m hunyuan3d_client "$@"')
        # The one departure from what is printed: a server takes free ports, so that it meets no other on this machine.
        ports = " ".join(f"--{kind}-port 0" for kind in ("grpc", "http", "metrics"))
        export = f'{python} -m hunyuan3d_export "$@"'
        self._program("hunyuan3d-export", f'if [ "$1" = serve ]; then {export} {ports}; fi\n{export}')
        (folder / ".venv" / ".installed").touch()  # newer than pyproject.toml: make has nothing to install
        self.environment = {
            **os.environ,
            "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / 'client'}{os.pathsep}{folder / 'export'}{os.pathsep}{folder / 'gateway'}",
        }
        self._server: subprocess.Popen[str] | None = None
        self._http = ""

    def _program(self, name: str, script: str) -> None:
        path = self.folder / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, command: str) -> None:
        """The command as printed, at the address of the server for HTTP; a server stays in the background, the one before it ends."""
        if re.search(r"\bserve\b", command):
            self.stop()
            self._serve(command)
            return
        call = subprocess.Popen(
            ["bash", "-c", command.replace("localhost:8000", self._http)], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        limit = threading.Timer(WAIT_S, os.killpg, (call.pid, signal.SIGKILL))  # all of it: a command may start others
        limit.start()
        try:
            output, _ = call.communicate()
        finally:
            limit.cancel()
        assert call.returncode == 0, f"$ {command}\n{output}"

    def _serve(self, command: str) -> None:
        with (self.folder / "server.log").open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command}" if command.startswith("hunyuan3d") else command],
                cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        assert self._server.stdout
        limit = threading.Timer(WAIT_S, os.killpg, (self._server.pid, signal.SIGKILL))
        limit.start()
        ready = next((line for line in self._server.stdout if line.startswith("{")), None)
        limit.cancel()
        if ready is not None:
            endpoints = json.loads(ready)
            self.environment["HUNYUAN3D_URL"], self._http = endpoints["grpc"], endpoints["http"]
            return
        raise AssertionError(f"$ {command}\n{(self.folder / 'server.log').read_text()}")

    def stop(self) -> None:
        """Ends the server as Ctrl-C in a terminal does: every process of its group gets the signal."""
        if self._server is not None:
            if self._server.poll() is None:
                os.killpg(self._server.pid, signal.SIGINT)
            assert self._server.stdout
            self._server.stdout.read()
            self._server.wait(timeout=60)
            self._server.stdout.close()
        self._server = None


ARTIFACTS = ("model.onnx*", "model.plan*", "checkpoint.safetensors*", "manifest.json", "parity.json")
WRITTEN = re.compile(r"(?:--out|--output|--picture|--ply|--repository|>) (\S+)|\b(?:OUT|REPOSITORY)=(\S+)")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path)
    yield tree
    tree.stop()


def prepare(tree: Tree, artifacts: Callable[..., Path]) -> None:
    """The files that a reader has: weights, condition tokens, a picture. Graphs that all tests share are there already."""
    from PIL import Image

    graphs = artifacts(precision="fp16")
    shutil.copy(graphs.parent / "micro-0.safetensors", tree.folder / "model.fp16.safetensors")
    shutil.copytree(graphs, tree.folder / "build" / "model.fp16-fp16")
    np.save(tree.folder / "context.npy", np.random.default_rng(0).standard_normal((1, 16, 1536)).astype(np.float16))
    Image.new("RGB", (64, 48), "orange").save(tree.folder / "picture.png")
    shutil.copy(Path(skimage.__file__).parent / "data" / "rocket.jpg", tree.folder / "photo.jpg")


def add_encoder(checkpoint: Path) -> None:
    """Makes the file one of a whole shape pipeline: the denoiser, and an image encoder of random weights."""
    from safetensors.torch import load_file, save_file

    from hunyuan3d_export.conditioner import random_conditioner

    encoder = random_conditioner("tiny").dinov2.state_dict()
    state = {f"conditioner.main_image_encoder.model.{key}": value.half().contiguous() for key, value in encoder.items()}
    save_file({**load_file(checkpoint), **state}, checkpoint)


@pytest.mark.served
@pytest.mark.timeout(1200)  # the demo takes minutes on cores that others share
@pytest.mark.parametrize("scene", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCENES])
def test_scene(scene: str, tree: Tree, artifacts: Callable[..., Path]) -> None:
    prepare(tree, artifacts)
    if scene in ("pictures", "photographs"):
        add_encoder(tree.folder / "model.fp16.safetensors")
    for command in SCENES[scene]:
        tree.run(command)
        for name in filter(None, (name for pair in WRITTEN.findall(command) for name in pair)):
            assert (tree.folder / name).exists(), f"{command} must write {name}"

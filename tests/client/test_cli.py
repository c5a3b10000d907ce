"""The `hunyuan3d` command against a KServe v2 server in this process (conftest.py)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from hunyuan3d_client import Client, MockTransport, ServedWeights, StatusError, cli, contract, options
from hunyuan3d_client.commands import connecting, console
from hunyuan3d_client.shapes import embed_prompt

Run = Callable[..., Result]


@pytest.fixture
def run(kserve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """hunyuan3d ARGS in a folder with latents.npy, context.npy and pair.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUNYUAN3D_URL", kserve.url)
    np.save("latents.npy", np.ones((1, 3, 64)))
    np.save("context.npy", np.ones((5, 1536), np.float16))
    two = np.ones((2, 5, 1536), np.float16)
    np.savez("pair.npz", context=two, negative_context=-two)

    def call(*args: str) -> Result:
        # A Console keeps the stream that it finds when it is made, but CliRunner replaces the streams for each call.
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(console, stream, Console(stderr=stream == "stderr"))
        return CliRunner().invoke(cli.app, list(args))

    return call


def test_denoise(run: Run, kserve: Any) -> None:
    result = run("denoise", "--latents", "latents.npy", "--t", "0.5", "--context", "context.npy", "--out", "v.npy", "--json")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("v.npy"), np.full((1, 3, 64), 0.5, np.float32))
    facts = json.loads(result.stdout)
    assert facts["out"] == "v.npy" and facts["shape"] == [1, 3, 64] and facts["seconds"] >= 0
    assert sorted(path.name for path in Path().iterdir()) == ["context.npy", "latents.npy", "pair.npz", "v.npy"]
    assert kserve.requests[0].model_name == contract.DIT


def test_denoise_guided(run: Run, kserve: Any) -> None:
    args = "denoise --latents latents.npy --t 0.5 --context context.npy --guidance-scale 3 --out v.npy".split()
    assert run(*args).exit_code == 0 and kserve.requests[0].model_name == contract.DIT_GUIDED
    assert run(*args, "--guidance", "3").exit_code == 2


def test_sample(run: Run, kserve: Any) -> None:
    np.save("noise.npy", np.ones((2, 3, 64), np.float32))
    args = "sample --context pair.npz --negative-context pair.npz --steps 4 --guidance-scale 2 --schedule flow_match --tolerance 0.125"
    result = run(*args.split(), "--seed", "6", "--num-latents", "3", "--out", "x.npy", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).items() >= {"steps": 4, "path": "plain", "shape": [2, 3, 64]}.items()
    assert np.load("x.npy").mean() == 6
    sent = {tensor.name for tensor in kserve.requests[0].inputs}
    assert sent == {spec.name for spec in contract.SAMPLER_INPUTS} - {"latents"}
    result = run(*"sample --context pair.npz --steps 1 --latents noise.npy --out y.npy".split())
    assert result.exit_code == 0, result.output
    assert "latents" in {tensor.name for tensor in kserve.requests[-1].inputs}


# Each option of sampling: its value on the command line, and the value that the request must then hold.
FLAGS: dict[str, tuple[str, Any]] = {
    "steps": ("2", [2]),
    "guidance_scale": ("2.5", [2.5]),
    "seed": ("5", [5]),
    "num_latents": ("9", [9]),
    "latents": ("latents.npy", np.ones((1, 3, 64)).tolist()),
    "negative_context": ("context.npy", np.ones((1, 5, 1536)).tolist()),
    "schedule": ("flow_match", [b"flow_match"]),
    "tolerance": ("0.125", [0.125]),
    "resolution": ("384", [384]),
    "max_faces": ("40000", [40_000]),
    "keep": ("0.25", [0.25]),
    "level": ("0.5", [0.5]),
    "method": ("dense", [b"dense"]),
    "timeout_s": ("7", 7),
    "request_id": ("mine-7", "mine-7"),
}
COMMANDS = {
    "sample": (["sample", "--context", "context.npy", "--out", "x.npy"], options.SampleOptions),
    "decode": (["decode", "latents.npy", "--out", "m.glb"], options.DecodeOptions),
    "generate": (["generate", "picture.png"], options.GenerateOptions),
}


def declared(kind: type) -> list[options.Option]:
    """The options of a command, without those that the ending of --out, --header and --keep-background stand for."""
    elsewhere = ("format", "headers", "remove_background")
    return [option for option in options.options_of(kind) if option.name not in elsewhere]


@pytest.mark.parametrize(
    ("command", "option"), [(name, o.name) for name, (_, kind) in COMMANDS.items() for o in declared(kind)]
)
def test_each_command_passes_each_option_on(command: str, option: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("picture.png").write_bytes(b"picture")
    value, expected = FLAGS[option]
    for flags in ([], [f"--{option.replace('_', '-')}", value]):
        transport = MockTransport()
        monkeypatch.setattr(connecting, "client", lambda _, transport=transport: Client(transport=transport))
        result = run(*COMMANDS[command][0], *flags)
        assert result.exit_code == 0, result.output
        if option == "request_id":
            assert all((each.request_id == expected) is bool(flags) for each in transport.requests)
            continue
        sent = next((each.inputs[option] for each in transport.requests if option in each.inputs), None)
        found = round(transport.timeouts_s[-1]) if option == "timeout_s" else sent if sent is None else sent.tolist()
        assert (found == expected) is bool(flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_option(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    text = run(command, "--help").stdout
    for option in declared(COMMANDS[command][1]):
        assert f"--{option.name.replace('_', '-')}" in text and option.text in text
    assert run(command, "--stepz", "3").exit_code == 2


SHAPES = {contract.DIT: ServedWeights("shapes", "fp32", "ab" * 32)}


@pytest.mark.parametrize(
    ("prompt", "weights", "message"),
    [
        (
            "torus",
            {contract.DIT_GUIDED: ServedWeights("tiny", "fp16", seed=3)},
            "a server of tiny fp16, RANDOM WEIGHTS from seed 3",
        ),
        ("torus", {}, "got a server of unknown weights"),
        ("a red car", SHAPES, "got a, red, car\nhint: "),
    ],
    ids=["other weights", "an older server", "unknown words"],
)
def test_a_prompt_that_means_nothing_to_the_server_is_refused(
    prompt: str, weights: dict[str, ServedWeights], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = MockTransport(weights=weights)
    monkeypatch.setattr(connecting, "client", lambda _: Client(transport=transport))
    result = run("sample", "--prompt", prompt, "--num-latents", "7", "--out", "x.npy")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not transport.requests and not Path("x.npy").exists()


def test_words_become_points(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The condition of a prompt and the points of its latents, without the export package."""
    transport = MockTransport(weights=SHAPES)
    monkeypatch.setattr(connecting, "client", lambda _: Client(transport=transport))
    monkeypatch.setitem(sys.modules, "hunyuan3d_export", None)
    result = run("sample", "--prompt", "two flat tori", "--num-latents", "7", "--out", "x.npy", "--ply", "tori.ply")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(transport.requests[0].inputs["context"][0], embed_prompt("two flat tori"))
    assert b"element vertex 7\n" in Path("tori.ply").read_bytes()
    assert "ply tori.ply" in result.stdout, "the report says what was written"
    assert run("sample", "--prompt", " ", "--out", "y.npy").exit_code == 2
    sent = len(transport.requests)
    gif = run("sample", "--prompt", "cube", "--picture", "cube.gif", "--out", "y.npy")
    assert gif.exit_code == 2 and "--picture must be .png or .jpg or .jpeg, got cube.gif" in gif.stderr
    assert len(transport.requests) == sent, "before the sampling"


def test_safetensors_in_and_out(run: Run, kserve: Any) -> None:
    two = np.ones((2, 5, 1536), np.float16)
    save_file({"context": two, "negative_context": -two}, "pair.safetensors")
    save_file({"anything": np.ones((2, 3, 64), np.float32)}, "latents.safetensors")
    args = "--context pair.safetensors --negative-context pair.safetensors --steps 2 --out x.safetensors".split()
    result = run("sample", *args)
    assert result.exit_code == 0, result.output
    assert load_file("x.safetensors")["latents"].shape == (2, 3, 64)
    assert {"context", "negative_context"} <= {tensor.name for tensor in kserve.requests[0].inputs}
    args = "--latents latents.safetensors --t 0.5 --context pair.safetensors --out v.safetensors".split()
    assert run("denoise", *args).exit_code == 0
    np.testing.assert_array_equal(load_file("v.safetensors")["velocity"], np.full((2, 3, 64), 0.5, np.float32))


def test_an_output_of_no_known_kind_fails_before_the_work(run: Run, kserve: Any) -> None:
    result = run("sample", "--context", "context.npy", "--out", "x.npz")
    kinds = ".glb or .obj or .stl or .ply or .npy or .safetensors"
    assert result.exit_code == 2 and f"--out must be a {kinds} file" in result.stderr and not kserve.requests


def test_several_servers(run: Run, kserve: Any) -> None:
    urls = f"{kserve.url},localhost:1"
    assert run("sample", "--context", "context.npy", "--steps", "2", "--out", "x.npy", "--url", urls).exit_code == 0
    result = run("health", "--json", "--url", f"{kserve.url},{kserve.url}")
    states = [json.loads(line) for line in result.stdout.splitlines()]
    assert [state["url"] for state in states] == [kserve.url] * 2 and states[0]["models"][0]["parameters"] == {
        "precision": "fp32"
    }
    assert run("health", "--url", urls).exit_code == 3


def test_text_reports(run: Run, kserve: Any) -> None:
    assert run("sample", "--context", "context.npy", "--steps", "2", "--out", "x.npy").stdout.startswith(
        "out x.npy, shape [1, 3, 64]"
    )
    short, long = run("health").stdout, run("health", "--verbose").stdout
    assert "Triton 9.9 at " in short and contract.SAMPLER in short and "precision" not in short
    assert "precision: fp32" in long and long.splitlines()[0] == short.splitlines()[0]
    kserve.ready = False
    result = run("health", "--json")
    assert result.exit_code == 3 and "hint:" in result.stderr
    assert {model["ready"] for model in json.loads(result.stdout)["models"]} == {False}


def test_a_header_goes_with_every_call(run: Run, kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kserve.restricted = True
    assert run("health").stdout.count("told to holders") == 1, "said once, not in each row"
    assert "told to holders" not in run("--header", "Key: secret", "health").stdout
    monkeypatch.setenv("HUNYUAN3D_HEADER", "key: secret")
    assert "told to holders" not in run("health").stdout
    refused = run("--header", "secret", "health")
    assert refused.exit_code == 2 and "--header and HUNYUAN3D_HEADER must be 'name: value', got another form" in refused.stderr
    assert "secret" not in refused.stderr


def test_health_has_one_default(run: Run) -> None:
    help_ = " ".join(run("health", "--help").stdout.split())
    assert "[default: 10.0]" in help_ and "300" not in help_


def test_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pictures").mkdir()
    for name in "abc":
        Path("pictures", f"{name}.png").write_bytes(name.encode())
    transport = MockTransport()
    monkeypatch.setattr(connecting, "client", lambda _: Client(transport=transport))
    result = run("batch", "pictures", "--out", "out", "--steps", "2", "--shard", "0/1", "--concurrency", "2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).items() >= {"total": 3, "done": 3, "skipped": 0, "failed": 0}.items()
    (steps,) = {int(request.inputs["steps"][0]) for request in transport.requests if "steps" in request.inputs}
    assert steps == 2 and Path("out", "a.glb").exists()
    assert "skipped 3" in run("batch", "pictures", "--out", "out", "--steps", "2").stdout
    assert json.loads(run("batch", "pictures", "--out", "out", "--no-resume", "--steps", "2", "--json").stdout)["done"] == 3
    assert run("batch", "pictures", "--out", "no/out").exit_code == 2
    assert run("batch", "pictures", "--out", "out", "--format", "npy").exit_code == 0 and Path("out", "a.npy").exists()


def test_a_batch_with_a_failure_ends_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pictures").mkdir()
    Path("pictures", "a.png").write_bytes(b"a")

    def answer(_: object) -> list[Any]:
        raise StatusError(grpc.StatusCode.INTERNAL, "words")

    monkeypatch.setattr(connecting, "client", lambda _: Client(transport=MockTransport(answer)))
    result = run("batch", "pictures", "--out", "out")
    assert result.exit_code == 1 and "a: ModelFailed: " in result.stderr and "failed 1" in result.stdout
    assert run("batch", "pictures", "--out", "out", "--on-error", "raise").exit_code == 6


def test_connection_options_stand_before_or_after_the_command(run: Run, kserve: Any) -> None:
    kserve.restricted = True
    assert "told to holders" not in run("health", "--header", "Key: secret").stdout
    assert "told to holders" not in run("--header", "x-team: a", "health", "--header", "Key: secret", "--json").stdout
    assert kserve.questions[-1].items() >= {"x-team": "a", "key": "secret"}.items()


def test_tls_of_the_command(run: Run) -> None:
    """Every form of TLS fails against a server without it, and a wrong use is told before."""
    assert run("health", "--tls", "--timeout-s", "2").exit_code == 3
    refused = run("health", "--cert", "cert.pem")
    assert refused.exit_code == 2 and "cert and key must be given together" in refused.stderr


def test_version_and_completion(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"{importlib.metadata.version('hunyuan3d-triton')}\n"
    assert "--install-completion" in run("--help").stdout


def test_health_shows_the_servers_that_are_up_beside_one_that_is_down(run: Run, kserve: Any) -> None:
    result = run("health", "--url", f"localhost:1,{kserve.url}")
    assert result.exit_code == 3 and "9.9" in result.stdout and "ServerUnavailable: localhost:1: " in result.stderr
    down, up = (json.loads(line) for line in run("health", "--json", "--url", f"localhost:1,{kserve.url}").stdout.splitlines())
    assert (down["url"], down["ready"], down["error"]) == ("localhost:1", False, "ServerUnavailable") and up["ready"]


def test_no_help_text_names_two_defaults() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():
        for option in command.params:
            twice = re.search("left out|default", option.help or "", re.IGNORECASE) and option.default not in (None, (), [])
            assert not twice, (name, option.name, option.help, option.default)


TERMINATED = """
import sys
from hunyuan3d_client.__main__ import main
sys.argv = ["hunyuan3d", "sample", "--context", "context.npy", "--steps", "2", "--out", "x.npy"]
main()
"""


@pytest.mark.usefixtures("run")
def test_sigterm_removes_partial_files_and_tells_the_server(kserve: Any, tmp_path: Path) -> None:
    kserve.stall.clear()
    with subprocess.Popen([sys.executable, "-c", TERMINATED], cwd=tmp_path) as process:
        deadline = time.monotonic() + 30
        while not kserve.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(tmp_path.glob(".x.npy.*.partial"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*x.npy*")) and kserve.cancelled.wait(10)


def test_an_authority_that_cannot_be_read(run: Run) -> None:
    """tests/docker/test_security.py tests an authority that can be read, with a server whose certificate it signed."""
    refused = run("--ca", "missing.pem", "health")
    assert refused.exit_code == 2 and "missing.pem" in refused.stderr


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(console, "stderr", Console(stderr=True, force_terminal=terminal))
        assert console.progress().disable is not terminal


def test_progress_tells_the_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *args, **fields: told.append(fields) or update(*args, **fields))
    assert run("sample", "--context", "context.npy", "--steps", "2", "--out", "x.npy").exit_code == 0
    assert [fields["description"] for fields in told] == ["sampling (plain, batch 4)"] * 2
    assert [(fields["completed"], fields["total"]) for fields in told] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.PERMISSION_DENIED, 3),
        (grpc.StatusCode.UNAVAILABLE, 4),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 5),
        (grpc.StatusCode.INTERNAL, 6),
        (grpc.StatusCode.CANCELLED, 5),
    ],
)
def test_exit_codes_and_no_half_written_file(status: grpc.StatusCode, code: int, run: Run, kserve: Any) -> None:
    kserve.fail = status
    Path("x.npy").write_bytes(b"old")
    result = run("sample", "--context", "context.npy", "--steps", "2", "--out", "x.npy")
    assert result.exit_code == code and "\nhint: " in result.stderr and "Traceback" not in result.output
    assert Path("x.npy").read_bytes() == b"old"
    assert sorted(path.name for path in Path().iterdir()) == ["context.npy", "latents.npy", "pair.npz", "x.npy"]


def test_timeout(run: Run, kserve: Any) -> None:
    kserve.stall.clear()
    assert run("sample", "--context", "context.npy", "--steps", "2", "--timeout-s", "0.3", "--out", "x.npy").exit_code == 5


def test_no_server(run: Run) -> None:
    result = run("health", "--url", "localhost:1")
    assert result.exit_code == 3 and result.stderr.startswith("ServerUnavailable: ")


@pytest.mark.parametrize(
    "context",
    [
        "missing.npy",
        "missing.safetensors",
        "broken.npy",
        "broken.npz",
        "broken.safetensors",
        "wrong.npz",
        "wrong.safetensors",
        "pickle.npy",
        "latents.npy",
    ],
)
@pytest.mark.parametrize("out", ["x.npy"])
def test_bad_files(context: str, out: str, run: Run, kserve: Any) -> None:
    for ending in ("npy", "safetensors"):
        Path(f"broken.{ending}").write_bytes(b"not an array")
    Path("broken.npz").write_bytes(Path("pair.npz").read_bytes()[:2000])
    save_file({"a": np.zeros(1), "b": np.zeros(1)}, "wrong.safetensors")
    np.savez("wrong.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("pickle.npy", np.array([{}], np.object_), allow_pickle=True)
    result = run("sample", "--context", context, "--out", out)
    assert result.exit_code == 2 and "hint: " in result.stderr and not Path(out).exists() and not kserve.requests


def test_bad_output_folder_fails_before_the_work(run: Run, kserve: Any) -> None:
    result = run("sample", "--context", "context.npy", "--out", "missing/x.npy")
    assert result.exit_code == 2 and "--out must be in a folder that exists, got missing/x.npy" in result.stderr
    assert "hint: mkdir -p missing" in result.stderr and not kserve.requests


def test_bad_usage(run: Run) -> None:
    assert run("sample").exit_code == 2 and run("nonsense").exit_code == 2
    for command in ("health", "denoise", "sample"):
        assert run(command, "--help").exit_code == 0
    assert "Exit codes" in run("--help").stdout


@pytest.mark.parametrize("missing", ["typer", "rich", "safetensors"])
def test_without_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*sys.modules]:
        own = name in ("hunyuan3d_client.cli", "hunyuan3d_client.array_files") or name.startswith("hunyuan3d_client.commands")
        if own or name == missing or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    main = importlib.import_module("hunyuan3d_client.__main__").main
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2 and "pip install --constraint constraints.txt '.[cli]'" in capsys.readouterr().err


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "hunyuan3d_client", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "sample" in done.stdout

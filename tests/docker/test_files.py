"""Compose, Dockerfiles, scripts and manifests by their own linters and schemas; versions by their one table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

STOPS_S = 30  # for what the entrypoint does beside its two waits: Triton's own shutdown, and the questions whether it is idle
DOCKERFILES = ("server", "cpu", "export", "gateway")
SCRIPTS = ("entrypoint.sh", "export_entrypoint.sh", "envoy/drain.sh")


# (image, package) -> the row of versions.env that holds its version, where the row has another name than the package.
REQUIREMENTS = {
    ("cpu", "nvidia-pytriton"): "PYTRITON_VERSION",
    ("server", "cupy-cuda13x"): "CUPY_VERSION",
    ("server", "numpy"): "GPU_NUMPY_VERSION",
}


def pins_of(root: Path, image: str, ending: str) -> dict[str, str]:
    """Package -> version, of docker/requirements/IMAGE.in or .txt."""
    text = (root / "docker" / "requirements" / f"{image}.{ending}").read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("image", DOCKERFILES)
def test_images_install_what_their_lock_has_with_its_hashes(image: str, root: Path) -> None:
    dockerfile = (root / "docker" / f"{image}.Dockerfile").read_text()
    assert f"docker/requirements/{image}.txt" in dockerfile and "--require-hashes" in dockerfile
    lock = (root / "docker" / "requirements" / f"{image}.txt").read_text()
    blocks = re.split(r"^(?=[a-zA-Z])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 5 and all("==" in block and "--hash=sha256:" in block for block in blocks)
    assert "://" not in lock, "a lock names no registry"
    pins = pins_of(root, image, "txt")
    assert pins_of(root, image, "in").items() <= pins.items(), "run make lock"
    if image == "export":
        constraints = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (root / "constraints.txt").read_text(), re.MULTILINE))
        shared = {name for name in pins if name in constraints} - {"nvidia-cuda-runtime"}
        assert {"torch", "onnx", "onnxruntime"} <= shared and all(pins[name] == constraints[name] for name in shared)


def test_pip_refuses_a_file_whose_hash_is_not_in_the_lock(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(f"einops==0.8.2 --hash=sha256:{'0' * 64}\n")
    (tmp_path / "einops-0.8.2-py3-none-any.whl").write_bytes(b"not what was locked")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-index", "--find-links", tmp_path]
    done = subprocess.run([*command, "--dest", tmp_path / "out", "-r", tmp_path / "lock.txt"], capture_output=True, text=True)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr


@pytest.fixture(scope="module")
def versions(root: Path) -> dict[str, str]:
    lines = (root / "docker" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "compose.yaml").read_text())


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.prefix) / "bin" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_compose_is_of_its_schema(root: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", root / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("services: {server: {imagee: x}}")
    assert tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles(name: str, root: Path) -> None:
    path = root / "docker" / f"{name}.Dockerfile"
    done = tool("hadolint", path)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    copies = re.findall(r"^COPY (.*)", text.replace("\\\n", ""), re.MULTILINE)
    copied = [source for line in copies for source in line.split()[:-1]]
    assert copied and all((root / source).exists() for source in copied)


def test_the_serving_images_have_no_compiler_and_no_export_code(root: Path) -> None:
    server, cpu = ((root / "docker" / f"{name}.Dockerfile").read_text() for name in ("server", "cpu"))
    # These files decide which models and which plans can be loaded, and import the standard library alone.
    rules = ["export/hunyuan3d_export/server/loadable.py", "export/hunyuan3d_export/engines/server_image.py"]
    assert re.findall(r"export\S*", re.sub(r"^#.*", "", server, flags=re.MULTILINE)) == rules
    assert re.findall(r"export\S*", cpu) == ["export/hunyuan3d_export/server/wheel.py", *rules]
    assert "torch" not in cpu and "apt" not in server + cpu


def test_scripts(root: Path) -> None:
    done = tool("shellcheck", *(root / "docker" / name for name in SCRIPTS))
    assert done.returncode == 0, done.stdout


def test_versions_stand_in_one_place(root: Path, versions: dict[str, str]) -> None:
    """Every default and every pin equals its row of versions.env, and every row is used."""
    used = set()
    compose_text = (root / "compose.yaml").read_text()
    for name, default in re.findall(r"\$\{(\w+_(?:TAG|VERSION)):-([^}]*)\}", compose_text):
        assert versions[name] == default, name
        used.add(name)
    for name in DOCKERFILES:
        text = (root / "docker" / f"{name}.Dockerfile").read_text()
        for argument, default in re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE):
            assert versions.get(argument, "") == default, (name, argument)
            used |= {argument} & set(versions)
    for image in ("cpu", "server"):
        for package, version in pins_of(root, image, "in").items():
            name = REQUIREMENTS.get((image, package), f"{package.upper().replace('-', '_')}_VERSION")
            assert versions[name] == version, (image, package)
            used.add(name)
    for name, default in re.findall(r"\$\{(HUNYUAN3D_VERSION):-([^}]*)\}", compose_text):
        assert versions[name] == default
        used.add(name)
    assert used == set(versions)
    own = versions["HUNYUAN3D_VERSION"]
    assert f'\nversion = "{own}"\n' in (root / "pyproject.toml").read_text(), "images carry this project's version"
    gpu, cpu = f"{own}-{versions['TRITON_TAG']}", f"{own}-{versions['PYTRITON_VERSION']}"
    assert compose_text.count("${HUNYUAN3D_VERSION:-") == len(DOCKERFILES)
    for overlay, tag in {"gpu": gpu, "cpu": cpu}.items():
        found = yaml.safe_load((root / "docker" / "kubernetes" / "overlays" / overlay / "kustomization.yaml").read_text())
        assert [image["newTag"] for image in found["images"]] == [tag]
    manifests = "".join(path.read_text() for path in (root / "docker" / "kubernetes").glob("*.yaml"))
    assert set(re.findall(r"hunyuan3d-triton/(?:server|export):(\S+)", manifests)) == {gpu}
    assert f"image: envoyproxy/envoy:{versions['ENVOY_TAG']}\n" in (root / "docker" / "envoy" / "kubernetes.yaml").read_text()
    assert f"ARG SERVER=hunyuan3d-triton/server:{gpu}\n" in (root / "docker" / "repository.Dockerfile").read_text()
    pins = (root / "constraints.txt").read_text()
    assert f"nvidia-pytriton=={versions['PYTRITON_VERSION']}" in pins
    assert f"tensorrt=={versions['TENSORRT_VERSION']}.*\n" in pins, "make setup-gpu installs the image's version"
    assert f"onnxruntime=={versions['ONNXRUNTIME_VERSION']}" in pins and f"numpy=={versions['NUMPY_VERSION']}" in pins


def test_cupys_cache_lies_where_the_server_may_write(root: Path, compose: dict[str, Any], versions: dict[str, str]) -> None:
    """CuPy makes the folder at import. User 1000 cannot make it below HOME on a read-only root."""
    text = (root / "docker" / "server.Dockerfile").read_text()
    (cache,) = re.findall(r"^ENV CUPY_CACHE_DIR=(\S+)$", text, re.MULTILINE)
    assert any(Path(mounted) in Path(cache).parents for mounted in compose["services"]["server"]["tmpfs"])
    deployment = yaml.safe_load((root / "docker" / "kubernetes" / "base" / "deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    writable = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    assert any(Path(mount["mountPath"]) in Path(cache).parents for mount in mounts if mount["name"] in writable)
    wanted = (root / "docker" / "requirements" / "server.in").read_text()
    assert f"cupy-cuda13x[ctk]=={versions['CUPY_VERSION']}" in wanted, "CuPy compiles kernels with the CUDA headers of [ctk]"
    assert versions["GPU_NUMPY_VERSION"].startswith("2."), "CuPy 14 wants NumPy 2"


def test_every_build_argument_is_one_of_the_dockerfiles(root: Path, compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "build" in service:
            text = (root / service["build"]["dockerfile"]).read_text()
            declared = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
            assert set(service["build"]["args"]) == declared, name


def test_every_setting_is_one_the_entrypoint_reads(root: Path, compose: dict[str, Any]) -> None:
    script = (root / "docker" / "entrypoint.sh").read_text()
    for name in ("server", "server-cpu"):
        for setting in compose["services"][name]["environment"]:
            assert f"${{{setting}:-" in script, setting


@pytest.mark.parametrize("name", ["server", "server-cpu"])
def test_servers_are_hardened_and_drain(name: str, compose: dict[str, Any]) -> None:
    service = compose["services"][name]
    assert service["read_only"] and service["tmpfs"] and service["cap_drop"] == ["ALL"]
    assert service["user"] == "1000:1000" and service["security_opt"] == ["no-new-privileges:true"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    grace = re.fullmatch(r"(\d+)m", service["stop_grace_period"])
    longest = [re.search(r":-(\d+)\}", service["environment"][name]) for name in ("NOTICE_S", "EXIT_TIMEOUT_S")]
    assert grace and 60 * int(grace[1]) > sum(int(found[1]) for found in longest if found) + STOPS_S
    assert "ulimits" not in service, "a host that refuses a limit would not start the service"
    assert all(port.startswith(("127.0.0.1:", "${PUBLISH_ADDRESS:-127.0.0.1}:")) for port in service["ports"])


@pytest.mark.parametrize("name", ["server", "server-cpu"])
def test_a_refusal_is_said_once(name: str, compose: dict[str, Any]) -> None:
    """Docker restarts a server that crashed, but not one that exits with 0, as the entrypoint does here when it refuses to start."""
    service = compose["services"][name]
    assert service["restart"] == "on-failure" and service["environment"]["REFUSAL_EXIT_CODE"] == 0


def test_images_know_the_tensorrt_that_their_build_has_checked(root: Path) -> None:
    for name in ("server", "export"):
        text = (root / "docker" / f"{name}.Dockerfile").read_text()
        assert re.search(r"^RUN find / .*libnvinfer\.so\.\$\{TENSORRT_VERSION\}", text, re.MULTILINE), name
        assert re.search(r"^ENV .*TENSORRT_VERSION=\$\{TENSORRT_VERSION\}", text, re.MULTILINE), name


def test_the_export_container_writes_as_its_caller(root: Path, compose: dict[str, Any]) -> None:
    service = compose["services"]["export"]
    text = (root / "docker" / "export.Dockerfile").read_text()
    assert "WORKDIR /work\n" in text and ".:/work" in service["volumes"], "relative paths are those of the project's folder"
    assert service["user"] == "0:0" and service["cap_drop"] == ["ALL"] and set(service["cap_add"]) == {"SETUID", "SETGID"}
    assert "${CACHE:-./.cache}:/cache" in service["volumes"] and "XDG_CACHE_HOME=/cache" in text
    assert (root / ".cache" / ".gitignore").is_file(), "Docker would make a missing folder, and root would own it"


@pytest.fixture
def for_everybody() -> Iterator[Path]:
    """A folder that every user may read, unlike pytest's own ones."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("owner", [0, 1234])
def test_the_export_entrypoint_becomes_the_folders_owner(owner: int, root: Path, for_everybody: Path) -> None:
    command = for_everybody / "bin" / "hunyuan3d-export"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$(id -u):$(id -g) $*"\n')
    command.chmod(0o755)
    (for_everybody / "work").mkdir()
    os.chown(for_everybody / "work", owner, owner + 1 if owner else 0)
    done = subprocess.run(
        [root / "docker" / "export_entrypoint.sh", "engine", "--onnx", "build/a folder"],
        env={"PATH": f"{command.parent}:/usr/bin:/bin", "WORK": str(for_everybody / "work")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    uid = f"{owner}:{owner + 1}" if owner else "0:0"
    assert (done.returncode, done.stdout) == (0, f"{uid} engine --onnx build/a folder\n"), done.stderr


def test_only_what_an_image_needs_reaches_its_build(root: Path) -> None:
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and "model_repository/*/1/model.*" in ignored
    # The code that serves a network has that name too, and without it no model of an image would load.
    assert ignored.index("!model_repository/*/1/model.py") > ignored.index("model_repository/*/1/model.*")


def dashboard_queries(root: Path) -> list[str]:
    panels = json.loads((root / "docker" / "monitoring" / "grafana" / "dashboards" / "hunyuan3d.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_queries(root: Path) -> list[str]:
    groups = yaml.safe_load((root / "docker" / "monitoring" / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def metric_names(query: str) -> set[str]:
    return set(re.findall(r"\b(?:hunyuan3d|nv)_\w+", re.sub(r'"[^"]*"', "", query)))


def test_alerts_are_explained(root: Path) -> None:
    text = (root / "docs" / "operations.md").read_text()
    groups = yaml.safe_load((root / "docker" / "monitoring" / "alerts.yaml").read_text())["groups"]
    assert all(f"`{rule['alert']}`" in text for group in groups for rule in group["rules"])


def promtool(*arguments: object) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool, which checks the rules, is not on this machine: apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_alert_fires_when_it_should_and_not_otherwise(root: Path) -> None:
    promtool("test", "rules", root / "tests" / "docker" / "alerts.test.yaml")
    cases = yaml.safe_load((root / "tests" / "docker" / "alerts.test.yaml").read_text())["tests"]
    checks = [(check["alertname"], bool(check["exp_alerts"])) for case in cases for check in case["alert_rule_test"]]
    groups = yaml.safe_load((root / "docker" / "monitoring" / "alerts.yaml").read_text())["groups"]
    names = {rule["alert"] for group in groups for rule in group["rules"]}
    assert {(name, fires) for name in names for fires in (True, False)} <= set(checks), "each has a case of both kinds"


def test_prometheus_takes_its_settings(root: Path, tmp_path: Path) -> None:
    text = (root / "docker" / "monitoring" / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus/", f"{root}/docker/monitoring/"))
    promtool("check", "config", tmp_path / "prometheus.yaml")
    assert (
        re.search(r"names: \[hunyuan3d-triton\]", text) and "aliases: [hunyuan3d-triton]" in (root / "compose.yaml").read_text()
    )


def test_the_dashboard_serves_any_prometheus_and_any_servers(root: Path) -> None:
    board = json.loads((root / "docker" / "monitoring" / "grafana" / "dashboards" / "hunyuan3d.json").read_text())
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "instance"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${datasource}"}
    for query in dashboard_queries(root):
        assert query.count('instance=~"$instance"') == len(re.findall(r"\b(?:hunyuan3d|nv)_\w+\{", query)) > 0
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.served
def test_every_query_names_a_metric_the_server_has(root: Path, run: Any) -> None:
    import urllib.request

    import numpy as np

    from hunyuan3d_client import Client

    with run() as container:
        container.wait_ready()
        with Client(container.grpc, timeout_s=60) as client:
            client.sample(np.ones((1, 3, 1536), np.float16), num_latents=4, steps=2)
        with urllib.request.urlopen(f"http://{container.metrics}/metrics", timeout=10) as answer:
            exposed = set(re.findall(r"^(\w+)", answer.read().decode(), re.MULTILINE))
    wanted = set().union(*map(metric_names, dashboard_queries(root) + alert_queries(root)))
    # The metrics of GPUs, which the CPU build does not have.
    on_a_gpu = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"}
    # This server has no shape decoder. The names that hunyuan3d_mesh registers stand in its source.
    registered = (root / "model_repository" / "hunyuan3d_mesh" / "1" / "mesh_metrics.py").read_text()
    of_meshes = {name for name in wanted if name.startswith("hunyuan3d_mesh_")}
    assert of_meshes and all(f'"{name.removeprefix("hunyuan3d_mesh_")}"' in registered for name in of_meshes)
    assert len(wanted) > 12
    assert wanted - exposed - of_meshes == on_a_gpu

"""The gateway in containers: its manifest renders and fits the schemas, and compose brings it with a server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.32"


def test_the_overlay_renders(root: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which renders the overlays, is not on this machine")
    folder = root / "docker" / "kubernetes" / "web"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert set(rendered) == {"Deployment", "Service", "PodDisruptionBudget"}
    for document in rendered.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    pod = rendered["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    settings = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(settings["HUNYUAN3D_GATEWAY_DRAIN_S"] or 0)
    assert rendered["Deployment"]["spec"]["template"]["metadata"]["labels"]["hunyuan3d-client"] == "true"


def test_the_variables_are_settings_of_the_gateway(root: Path) -> None:
    import dataclasses
    import re

    from hunyuan3d_gateway.settings import Settings

    known = {f"HUNYUAN3D_GATEWAY_{field.name.upper()}" for field in dataclasses.fields(Settings)}
    places = ("compose.yaml", "docker/gateway.Dockerfile", "docker/kubernetes/web/gateway.yaml", "docs/gateway.md")
    used = {name for place in places for name in re.findall(r"HUNYUAN3D_GATEWAY_\w+", (root / place).read_text())}
    assert used and used <= known


def test_compose_brings_the_gateway_with_either_server(root: Path) -> None:
    services = yaml.safe_load((root / "compose.yaml").read_text())["services"]
    gateway = services["gateway"]
    assert gateway["profiles"] == ["web"] and gateway["read_only"] and gateway["cap_drop"] == ["ALL"]
    assert gateway["ports"] == ["${PUBLISH_ADDRESS:-127.0.0.1}:8081:8081"]
    named = gateway["environment"]["HUNYUAN3D_GATEWAY_SERVERS"].split(":-")[1].partition(":")[0]
    assert named in services and "server" in services

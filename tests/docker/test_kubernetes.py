"""What `kubectl kustomize` renders: schemas, and that each selector and each reference finds what it means."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
VERSION = "1.32"
OVERLAYS = ("cpu", "gpu", "production")
OF_OPERATORS = ("PodMonitor", "PrometheusRule", "ServingRuntime", "InferenceService")
STOPS_S = 30  # for what the entrypoint does beside its two waits: Triton's own shutdown, and the questions whether it is idle
SERVER = {"app.kubernetes.io/name": "hunyuan3d-triton"}
CALLER = {"hunyuan3d-client": "true"}

Document = dict[str, Any]


@functools.cache
def rendered(folder: Path) -> list[Document]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which renders the overlays, is not on this machine")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return rendered(FOLDER / "overlays" / request.param)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def deployment(documents: list[Document], name: str = "hunyuan3d-triton") -> Document:
    (found,) = (document for document in of_kind(documents, "Deployment") if document["metadata"]["name"] == name)
    return found


def pod_labels(documents: list[Document]) -> list[Mapping[str, str]]:
    return [document["spec"]["template"]["metadata"]["labels"] for document in of_kind(documents, "Deployment")]


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the tests know no other selector"
    return selector.get("matchLabels", {}).items() <= labels.items()


def names_in(container: Document) -> set[str]:
    return {port["name"] for port in container["ports"]}


def test_each_document_fits_its_schema(documents: list[Document]) -> None:
    for document in documents:
        if document["kind"] not in OF_OPERATORS:
            kubernetes_validate.validate(document, VERSION, strict=True)
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "hunyuan3d"
    assert [document["metadata"]["name"] for document in of_kind(documents, "Namespace")] == ["hunyuan3d"]


@pytest.mark.parametrize(
    "path", [*sorted(FOLDER.glob("*.yaml")), *sorted((FOLDER / "base").glob("*.yaml"))], ids=lambda path: path.stem
)
def test_each_manifest_fits_its_schema_without_a_renderer(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document.get("kind") not in (*OF_OPERATORS, "Kustomization", None):
            kubernetes_validate.validate(document, VERSION, strict=True)


def test_services_and_budgets_select_pods(documents: list[Document]) -> None:
    labels = pod_labels(documents)
    for document in of_kind(documents, "Service"):
        found = [each for each in labels if document["spec"]["selector"].items() <= each.items()]
        assert len(found) == 1, document["metadata"]["name"]
    for document in of_kind(documents, "PodDisruptionBudget"):
        assert document["spec"].get("selector"), "a budget without a selector selects nothing"
        assert sum(matches(document["spec"]["selector"], each) for each in labels) == 1
    for document in of_kind(documents, "Deployment"):
        assert matches(document["spec"]["selector"], document["spec"]["template"]["metadata"]["labels"])
        for constraint in document["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"] == document["spec"]["selector"]


def peers(policy: Document) -> Iterator[tuple[Document, set[Any]]]:
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            yield peer, {port["port"] for port in rule["ports"]}


def test_the_network_policy_lets_callers_in_and_isolates_nobody_else(documents: list[Document]) -> None:
    (policy,) = of_kind(documents, "NetworkPolicy")
    assert matches(policy["spec"]["podSelector"], SERVER)
    assert not matches(policy["spec"]["podSelector"], {}), "the empty selector would isolate the whole namespace"
    admitted = {
        port
        for peer, ports in peers(policy)
        if "podSelector" in peer and matches(peer["podSelector"], CALLER)
        for port in ports
    }
    assert admitted == {"grpc", "http", "health"}, "a caller in any namespace needs no label but its own"
    strangers = [
        peer for peer, _ in peers(policy) if matches(peer.get("podSelector", {}), {}) and "namespaceSelector" not in peer
    ]
    assert not strangers
    monitoring = [ports for peer, ports in peers(policy) if "podSelector" not in peer]
    assert monitoring == [{"metrics"}]
    (container,) = deployment(documents)["spec"]["template"]["spec"]["containers"]
    assert {port for _, ports in peers(policy) for port in ports} <= names_in(container)
    out = {(port["port"], port.get("protocol", "TCP")) for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert out == {(53, "UDP"), (53, "TCP"), (4318, "TCP")}, "names, and the collector of traces"


def test_the_callers_have_the_label_that_the_policy_asks_for() -> None:
    job = yaml.safe_load((FOLDER / "batch-job.yaml").read_text())
    assert CALLER.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    gateway = deployment(rendered(FOLDER / "overlays" / "production"), "hunyuan3d-gateway")
    assert CALLER.items() <= gateway["spec"]["template"]["metadata"]["labels"].items()


def test_one_of_replicas_and_an_autoscaler(documents: list[Document]) -> None:
    scaled = [document["spec"]["scaleTargetRef"]["name"] for document in of_kind(documents, "HorizontalPodAutoscaler")]
    for document in of_kind(documents, "Deployment"):
        assert ("replicas" in document["spec"]) != (document["metadata"]["name"] in scaled)
    assert set(scaled) <= {document["metadata"]["name"] for document in of_kind(documents, "Deployment")}


def test_servers_scale_on_what_one_denoiser_call_takes() -> None:
    (scaler,) = of_kind(rendered(FOLDER / "overlays" / "production"), "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    config = (ROOT / "model_repository" / "hunyuan3d_sampler" / "config.pbtxt").read_text()
    max_batch = re.search(r'"max_batch"\s+value \{\s+string_value: "(\d+)"', config)
    assert max_batch and metric["pods"]["target"]["averageValue"] == max_batch[1]
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert {"hunyuan3d_active_samples", "hunyuan3d_queued_samples"} <= set(re.findall(r"hunyuan3d_\w+", rule["metricsQuery"]))


def test_probes_reach_the_guard_where_tls_hides_tritons_http(documents: list[Document]) -> None:
    (container,) = deployment(documents)["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe, path in {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/live"}.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "health"}
    script = (ROOT / "docker" / "entrypoint.sh").read_text()
    assert (
        f"HEALTH_PORT=${{HEALTH_PORT:-{ports['health']}}}" in script
        and "HEALTH_ADDRESS=${HEALTH_ADDRESS:-$BIND_ADDRESS}" in script
    )
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] + liveness["timeoutSeconds"] < 60, (
        "repaired within a minute"
    )


def test_times_fit_into_each_other(documents: list[Document]) -> None:
    found = deployment(documents)
    pod = found["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = {variable["name"]: variable["value"] for variable in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(settings["NOTICE_S"]) + int(settings["EXIT_TIMEOUT_S"]) + STOPS_S
    start = container["startupProbe"]
    assert found["spec"]["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]


def test_pods_are_hardened_and_mount_what_they_name(documents: list[Document]) -> None:
    generated = {document["metadata"]["name"] for document in of_kind(documents, "ConfigMap")}
    for document in of_kind(documents, "Deployment"):
        pod = document["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= generated


def test_a_gpu_overlay_names_its_gpu_and_needs_no_spare_one() -> None:
    for overlay in ("gpu", "production"):
        found = deployment(rendered(FOLDER / "overlays" / overlay))["spec"]
        pod = found["template"]["spec"]
        assert (
            pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
            and "nvidia.com/gpu.product" in pod["nodeSelector"]
        )
        assert found["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    cpu = deployment(rendered(FOLDER / "overlays" / "cpu"))["spec"]["template"]["spec"]
    assert "nodeSelector" not in cpu and "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]


def test_a_repository_can_come_in_an_image(tmp_path: Path) -> None:
    base = FOLDER / "overlays" / "cpu"
    overlay = FOLDER / "overlays" / f".test-{tmp_path.parent.name}"
    overlay.mkdir()
    try:
        resources = {
            "kind": "Kustomization",
            "resources": [f"../{base.name}"],
            "components": ["../../components/repository-image"],
        }
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(resources))
        pod = deployment(rendered(overlay))["spec"]["template"]["spec"]
    finally:
        shutil.rmtree(overlay)
    (copier,), (server,) = pod["initContainers"], pod["containers"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "models")
    assert volume == {"name": "models", "emptyDir": {}}
    assert [mount["mountPath"] for mount in copier["volumeMounts"]] == ["/models"] == [copier["command"][-1]]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in server["volumeMounts"]


def test_what_prometheus_and_grafana_read() -> None:
    documents = rendered(FOLDER / "overlays" / "production")
    (monitor,), (rule,) = of_kind(documents, "PodMonitor"), of_kind(documents, "PrometheusRule")
    assert sum(matches(monitor["spec"]["selector"], labels) for labels in pod_labels(documents)) == 1
    (container,) = deployment(documents)["spec"]["template"]["spec"]["containers"]
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names_in(container)
    job = deployment(documents)["spec"]["template"]["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    alerts = yaml.safe_load((ROOT / "docker" / "monitoring" / "alerts.yaml").read_text())
    assert f'up{{job="{job}"}}' in str(alerts), "the alerts name the job of the monitor"
    assert rule["spec"] == alerts, "docker/monitoring/prometheus-rule.yaml must repeat alerts.yaml"
    (dashboard,) = (
        each for each in of_kind(documents, "ConfigMap") if "grafana_dashboard" in each["metadata"].get("labels", {})
    )
    path = ROOT / "docker" / "monitoring" / "grafana" / "dashboards" / "hunyuan3d.json"
    assert dashboard["data"] == {"hunyuan3d.json": path.read_text()}


def test_the_gateway_has_the_files_that_compose_mounts() -> None:
    documents = rendered(FOLDER / "overlays" / "production")
    (settings,) = (each for each in of_kind(documents, "ConfigMap") if each["metadata"]["name"].startswith("hunyuan3d-envoy"))
    for name, text in settings["data"].items():
        assert text == (ROOT / "docker" / "envoy" / name).read_text()
    assert set(settings["data"]) == {"envoy.yaml", "key.lua", "drain.sh"}
    pod = deployment(documents, "hunyuan3d-gateway")["spec"]["template"]["spec"]
    *_, longest = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(longest) + STOPS_S
    hosts = {match for match in re.findall(r"address: ([\w-]+), port_value: 800", settings["data"]["envoy.yaml"])}
    assert hosts == {document["metadata"]["name"] for document in of_kind(documents, "Service")} - {"hunyuan3d-gateway"}


def test_kserve_mounts_the_repository_where_the_runtime_reads_it() -> None:
    runtime, service = yaml.safe_load_all((FOLDER / "kserve.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container" and {"name": "MODEL_REPOSITORY", "value": "/mnt/models"} in container["env"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"] and model["storageUri"] == "pvc://hunyuan3d-models/"
    assert model["modelFormat"]["name"] in {known["name"] for known in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    volumes = {volume["name"] for volume in runtime["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_job_fills_the_claim_that_the_servers_mount() -> None:
    claim, job = yaml.safe_load_all((FOLDER / "repository-job.yaml").read_text())
    servers = deployment(rendered(FOLDER / "overlays" / "gpu"))["spec"]["template"]["spec"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in servers["volumes"] if "persistentVolumeClaim" in volume
    }
    assert {claim["metadata"]["name"]} == claims
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == servers["nodeSelector"], "a plan runs only on the kind of GPU that built it"
    assert claim["metadata"]["name"] in {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }

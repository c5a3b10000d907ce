"""What `hunyuan3d health` prints: short rows, and what was never deployed apart from what failed."""

from __future__ import annotations

from hunyuan3d_client import Health, ModelInfo, contract
from hunyuan3d_client.health_report import health_lines
from hunyuan3d_client.text_table import aligned


def of_graphs(name: str, **more: str) -> ModelInfo:
    settings = {"runtime": "onnxruntime", "model_file": "../../hunyuan3d_dit/1/checkpoint.safetensors", **more}
    return ModelInfo(name, "1", platform="python", file="model.py", max_batch_size=8, parameters=settings)


STATE = Health(
    True,
    False,
    "2.51.0",
    (
        *(of_graphs(name, limits="t in 0..1; " * 20) for name in (contract.DIT, contract.DIT_GUIDED)),
        ModelInfo(contract.SAMPLER_UNARY, "1", platform="python"),
        ModelInfo(contract.SAMPLER, "1", ready=False, trouble="Internal: no such file"),
        *(ModelInfo(name, ready=False) for name in (contract.VAE, contract.FIELD)),
    ),
)


def test_rows_fit_80_columns_and_say_each_thing_once() -> None:
    lines = health_lines("somewhere.internal:8001", STATE)
    assert lines == [
        "Triton 2.51.0 at somewhere.internal:8001: not ready",
        "  model                    runs         file                    batch",
        "  hunyuan3d_dit            onnxruntime  checkpoint.safetensors  8",
        "  hunyuan3d_dit_guided     onnxruntime  checkpoint.safetensors  8",
        "  hunyuan3d_sampler_unary  python",
        "not ready: hunyuan3d_sampler: Internal: no such file",
        "not deployed: hunyuan3d_vae, hunyuan3d_field",
    ]
    assert max(map(len, lines)) <= 80


def test_settings_are_for_verbose() -> None:
    lines = health_lines("a:1", STATE, verbose=True)
    assert lines.index("      runtime: onnxruntime") == 3 and sum("limits: " in line for line in lines) == 2


def test_a_server_that_tells_only_holders_of_its_key() -> None:
    models = tuple(ModelInfo(name, restricted=True) for name in contract.MODELS)
    lines = health_lines("a:1", Health(True, True, "", models))
    assert lines[0] == "Triton at a:1: ready" and sum("key" in line for line in lines) == 1


def test_columns() -> None:
    assert aligned([("a", "", "bb"), ("ccc", "", "")], indent=" ") == [" a    bb", " ccc"]

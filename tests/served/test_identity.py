"""A real server says which weights it serves, and a prompt reaches only weights that were trained on words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hunyuan3d_client import Client, contract
from hunyuan3d_export.server.embedded import Endpoints


def test_health_says_which_weights_are_served(client: Client, micro: Any) -> None:
    found = client.health(timeout_s=30)
    assert found.weights.keys() == {contract.DIT, contract.DIT_GUIDED} and found.preset == "custom"
    assert {str(weights) for weights in found.weights.values()} == {
        f"custom fp32, weights {micro.identity()['checkpoint_sha256'][:12]}"
    }
    models = {model.name: model.weights for model in found.models}
    assert models[contract.DIT] == found.weights[contract.DIT] and models[contract.SAMPLER] is None


def test_a_prompt_is_refused_where_it_would_draw_noise(served: Endpoints, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    command = [sys.executable, "-m", "hunyuan3d_client", "sample", "--prompt", "torus", "--out", str(out), "--url", served.grpc]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (
        found.returncode == 2
        and "--prompt must be sent to a server of the preset shapes, got a server of custom" in found.stderr
    )
    assert not out.exists()

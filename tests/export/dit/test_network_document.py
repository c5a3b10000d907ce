"""docs/network.md: the shapes in its table are those of the network, and its Python block runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan3d_export.dit import DiTConfig, random_model

TEXT = (Path(__file__).parents[3] / "docs" / "network.md").read_text()
ROW = re.compile(r"^\| [^|]+ \| `([\w.]+)` \| `(\[.+\])` \|$", re.MULTILINE)


@torch.no_grad()
def test_every_shape_of_the_table_is_the_networks(narrow: DiTConfig) -> None:
    rows = ROW.findall(TEXT)
    assert len(rows) == 13
    model, found = random_model(narrow), {}

    def record(module: nn.Module, _inputs: object, out: Tensor) -> None:
        found[names[module]] = list(out.shape)

    names = {model.get_submodule(name): name for name, _ in rows}
    for module in names:
        module.register_forward_hook(record)
    model(torch.randn(2, 9, 6), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 20))
    sizes = {"B": 2, "L": 9, "T": 5, "N": 14, "C": 6, "D": 40, "M": narrow.mlp_hidden_size}
    expected = {name: [eval(size, {}, sizes) for size in shape.strip("[]").split(",")] for name, shape in rows}
    assert found == expected


def test_python_block_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert isinstance(scope["config"], DiTConfig) and scope["config"].depth == 1

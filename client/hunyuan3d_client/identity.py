"""Which weights a server serves. Its sampler reads this beside the deployed files when it is loaded; see contract.SERVED."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

_SHOWN_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class ServedWeights:
    """The weights behind one model.

    preset: whose sampling defaults are served, `custom` for weights of another size, empty where the network has no preset.
    precision: fp32, fp16 or bf16. sha256: of the checkpoint file; empty for random weights. seed: of random weights.
    """

    preset: str
    precision: str
    sha256: str = ""
    seed: int | None = None

    @property
    def random(self) -> bool:
        """Whether these are random weights, whose samples show nothing."""
        return not self.sha256

    def __str__(self) -> str:
        origin = f"RANDOM WEIGHTS from seed {self.seed}" if self.random else f"weights {self.sha256[:_SHOWN_DIGITS]}"
        return " ".join(filter(None, (self.preset, self.precision))) + f", {origin}"


def parse(text: str) -> dict[str, ServedWeights]:
    """Model -> its weights, from the sampler's answer. Raises ValueError for another text, as a later server may send."""
    try:
        found: dict[str, Any] = json.loads(text)
        return {model: ServedWeights(**facts) for model, facts in found.items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"served must be weights by model, got {text[:200]!r}") from error

"""The settings of preprocessing, which config.pbtxt holds."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PreprocessSettings:
    """remove_background: what holds for a request that says nothing. evaluation_timeout_s: of one call of hunyuan3d_background."""

    remove_background: bool
    evaluation_timeout_s: float

"""The parameters of hunyuan3d_mesh in config.pbtxt."""

from __future__ import annotations

import dataclasses

from mesh_request import MeshRequest

_MOST_FIELD_CALLS = 32  # half of hunyuan3d_field's queue: other callers need a place too
_LEAST = {"max_evaluations": 1, "max_decodes": 1, "max_queued": 0, "field_calls": 1, "field_calls_per_decode": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(MeshRequest):
    """The fields of MeshRequest are the values of the options that a request leaves out.

    A decode that would evaluate the field at more than max_evaluations points fails. max_decodes requests are decoded at the same
    time; max_queued more may wait, each at most queue_timeout_s. total_timeout_s: how long a request may take from its arrival to
    its end. evaluation_timeout_s: a call of a network that takes longer has failed. At most field_calls calls of hunyuan3d_field
    are in flight, field_calls_per_decode of them for one request.

    Raises ValueError for a value outside its range.
    """

    max_evaluations: int
    max_decodes: int
    max_queued: int
    field_calls: int
    field_calls_per_decode: int
    queue_timeout_s: float
    total_timeout_s: float
    evaluation_timeout_s: float

    def __post_init__(self) -> None:
        self.check()
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.field_calls > _MOST_FIELD_CALLS:
            raise ValueError(f"field_calls must be at most {_MOST_FIELD_CALLS}, got {self.field_calls}")
        for name in ("queue_timeout_s", "total_timeout_s", "evaluation_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name):g}")

    @property
    def defaults(self) -> MeshRequest:
        """A request that leaves all options out, without latents."""
        return MeshRequest(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MeshRequest)})

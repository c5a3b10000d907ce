"""Fields from which no surface can be made. Bad arguments are plain ValueErrors."""

from __future__ import annotations


class FieldError(ValueError):
    """The field's values do not describe a shape."""


class NotFinite(FieldError):
    """A value is NaN or infinite."""

    def __init__(self, count: int, query: tuple[float, float, float]) -> None:
        where = ", ".join(f"{coordinate:g}" for coordinate in query)
        super().__init__(
            f"The field has {count} values that are NaN or infinite, the first of them at ({where}).\n"
            "hint: check that the latents are finite; half precision can overflow, so try the decoder in bf16 or fp32"
        )


class EmptyField(FieldError):
    """Every value lies outside of the shape."""

    def __init__(self, evaluations: int, level: float) -> None:
        super().__init__(
            f"The field has no surface: all {evaluations} values are at or below the level {level:g}, which is outside.\n"
            "hint: check the latents, or lower level; method=dense finds shapes that lie between the points of the coarse grid"
        )


class FullField(FieldError):
    """Every value lies inside of the shape."""

    def __init__(self, evaluations: int, level: float) -> None:
        super().__init__(
            f"The field has no surface: all {evaluations} values are above the level {level:g}, which is inside.\n"
            "hint: check the latents, or raise level"
        )


class TooManyEvaluations(FieldError):
    """The surface needs more evaluations of the field than the caller allows."""

    def __init__(self, needed: int, allowed: int) -> None:
        super().__init__(
            f"The surface needs more than the allowed {allowed} evaluations of the field: with the next ones it would be {needed}.\n"
            "hint: lower resolution, or raise max_evaluations in hunyuan3d_mesh's config.pbtxt; latents that are noise have a surface everywhere"
        )

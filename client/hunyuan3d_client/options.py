"""The options of sampling and meshing: names, types, defaults and texts stand here once, for the methods and the command line.

A method declares `**options: Unpack[SampleOptions]`, which gives type checkers and editors the keyword arguments, and carries
the decorator @takes(SampleOptions), which gives them to help(), inspect.signature() and Python's own argument checks.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_args, get_type_hints

from . import contract
from .headers import Headers

LATENTS_FORMAT = "npy"  # of a batch that makes no meshes
F = TypeVar("F", bound=Callable[..., Any])


class _Sampling(TypedDict, total=False):
    """What every way to sample takes. An option that is None is left to the deployed preset."""

    steps: Annotated[int | None, "Steps of the schedule."]
    guidance_scale: Annotated[float | None, "Classifier-free guidance scale, or the raw guidance of distilled weights."]
    seed: Annotated[int | Sequence[int], "Seed of the noise: sample i draws its noise from seed + i."]
    tolerance: Annotated[
        float | None, "Forecast velocities between evaluations, up to this relative error. Left out or 0: evaluate every step."
    ]
    num_latents: Annotated[int | None, "Number L of latent tokens in the noise that is drawn."]
    schedule: Annotated[str | None, f"Schedule of the flow times: {' or '.join(contract.SCHEDULES)}."]


class _Surface(TypedDict, total=False):
    """What every way to make a mesh takes. An option that is None is left to the server's config."""

    resolution: Annotated[
        int | None, f"Cells along each side of the grid, {contract.RESOLUTIONS[0]} to {contract.RESOLUTIONS[1]}."
    ]
    max_faces: Annotated[int | None, "Simplify the mesh to this many faces; 0 keeps all."]
    keep: Annotated[float | None, "Leave out parts with fewer faces than this share of the largest part's; 0 keeps all."]
    level: Annotated[float | None, "Value of the field at the surface."]
    method: Annotated[str | None, "follow evaluates the field near the surface, dense at every point of the grid."]


class _Meshing(_Surface, total=False):
    format: Annotated[str | None, f"Format of the file: {' or '.join(contract.MESH_FORMATS)}."]


class _Picturing(TypedDict, total=False):
    """What every way to begin with a picture takes."""

    remove_background: Annotated[
        bool | None, "Cut the subject out of pictures without transparency. Left out: as the server is set, usually True."
    ]


class _Timeout(TypedDict, total=False):
    timeout_s: Annotated[
        float | None, "Seconds to wait for the whole answer. Left out: the client's own limit, 300 unless set."
    ]
    request_id: Annotated[str | None, "Id by which client, server and errors name the request. Left out: a new UUID."]
    headers: Annotated[Headers | None, "Headers of this call, or a function that returns them: a token, a traceparent."]


class DecodeOptions(_Meshing, _Timeout, total=False):
    """The options of decode()."""


class GenerateOptions(_Sampling, _Meshing, _Picturing, _Timeout, total=False):
    """The options of generate(): those of the picture, of sampling and of meshing."""


class SampleOptions(_Sampling, _Timeout, total=False):
    """What sampling from condition tokens takes besides."""

    latents: Annotated[Any, "Initial noise [B, L, 64] instead of a seed."]
    negative_context: Annotated[Any, "Condition tokens [B, T, 1536] in place of the unconditional branch's zeros."]


class _Previews(TypedDict, total=False):
    preview_every: Annotated[int, "Put latents into every k-th step; 0: into the last step only."]


class GenerateStreamOptions(GenerateOptions, _Previews, total=False):
    """The options of generate(), and previews."""


class StreamOptions(SampleOptions, _Previews, total=False):
    """The options of sample(), and previews."""


class BatchOptions(_Sampling, _Picturing, _Surface, _Timeout, total=False):
    """The options of the picture, of sampling and of meshing, which hold for each picture of a batch, and those of the batch."""

    format: Annotated[
        str, f"Format of the results: {' or '.join(contract.MESH_FORMATS)}; {LATENTS_FORMAT}: latents, without a shape decoder."
    ]
    resume: Annotated[bool, "Skip the inputs whose results an earlier run has written, by the ledger in the output folder."]
    concurrency: Annotated[int | None, "Pictures in flight. Left out: two batches of each server's sampler."]
    on_error: Annotated[str, "record: write a failure into the ledger and go on; raise: end the batch."]
    shard: Annotated[str | None, "I/N: only part I of N, by the names; N: the part that JOB_COMPLETION_INDEX names."]
    progress: Annotated[Callable[[Any], object] | None, "Called with the batch's Summary after each picture, on a thread."]


_DEFAULTS: dict[str, Any] = {"seed": 0, "preview_every": 1, "resume": True, "on_error": "record"}  # all others: None


@dataclasses.dataclass(frozen=True)
class Option:
    """One keyword argument."""

    name: str
    type: Any
    default: Any
    text: str


def options_of(kind: type) -> list[Option]:
    """The fields of one of the classes above."""
    fields = {name: get_args(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    defaults = _DEFAULTS | ({"format": contract.MESH_FORMATS[0]} if kind is BatchOptions else {})
    return [Option(name, hint, defaults.get(name), text) for name, (hint, text) in fields.items()]


# The options that change what a result is, and not how it is asked for: of a sample, and of its mesh.
SAMPLING = tuple(o.name for kind in (_Sampling, _Picturing) for o in options_of(kind))
MESHING = tuple(o.name for o in options_of(_Surface))


def takes(kind: type) -> Callable[[F], F]:
    """A decorator for a method of `**options`: the method takes the fields of `kind` and refuses any other keyword.

    The method is called with every option, defaults included. Its signature shows the options, its docstring explains them.
    """
    options = options_of(kind)
    explained = "\n".join(f"    {option.name}: {option.text}" for option in options)

    def decorate(method: F) -> F:
        signature = expanded(method, options)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = _bound(signature, method.__name__, args, kwargs)
            return method(*bound.args, **bound.kwargs)

        @functools.wraps(method)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return await call(*args, **kwargs)

        # The wrapper of an `async def` must be one too, because mocks and frameworks ask inspect.iscoroutinefunction().
        chosen = cast(F, awaited if inspect.iscoroutinefunction(method) else call)
        chosen.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n{explained}"
        return show(chosen, signature)

    return decorate


def expanded(function: Callable[..., Any], options: Sequence[Option]) -> inspect.Signature:
    """The signature of `function` with `options` as keyword arguments in place of its `**options`."""
    signature = inspect.signature(function)
    *others, rest = signature.parameters.values()
    if rest.kind is not inspect.Parameter.VAR_KEYWORD:
        raise TypeError(f"{function.__name__} must end with **options, got {rest}\nhint: add **options")
    keywords = [
        inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.type) for o in options
    ]
    first = next((i for i, other in enumerate(others) if other.kind is inspect.Parameter.KEYWORD_ONLY), len(others))
    return signature.replace(parameters=[*others[:first], *keywords, *others[first:]])


def show(function: F, signature: inspect.Signature) -> F:
    """`function`, which help(), inspect.signature() and typing.get_type_hints() now describe by `signature`."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    annotations["return"] = signature.return_annotation
    function.__annotations__ = {name: hint for name, hint in annotations.items() if hint is not inspect.Signature.empty}
    return function


def _bound(signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None  # worded as for any other function; the cause would say the same
    bound.apply_defaults()
    return bound

"""The one job model behind all interfaces: what is asked for, how far it is, what came out."""

from __future__ import annotations

import dataclasses
import enum
import re
import secrets
from collections.abc import Mapping
from typing import Any

from hunyuan3d_client import contract

from .failures import Failure

ID = re.compile(r"[0-9a-f]{32}")
MEDIA_TYPES: Mapping[str, str] = {
    "glb": "model/gltf-binary",
    "obj": "model/obj",
    "stl": "model/stl",
    "ply": "application/octet-stream",
}
assert tuple(MEDIA_TYPES) == contract.MESH_FORMATS


class State(str, enum.Enum):
    """The states of a job. The last four are final; deleted is the state of a job that its caller removed."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"

    @property
    def final(self) -> bool:
        """Whether the job stays in this state."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a caller asks for. pictures: PNG files that the gateway made. options: those of AsyncClient.generate_stream by name."""

    interface: str
    prompt: str = ""
    pictures: tuple[bytes, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: str = "glb"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a job is: its stage, step of total in that stage, and the whole as a share of 1. revision grows with each change.

    left_s: an estimate of the time until the end, None where nothing is known. preview: points as browsers draw them.
    """

    stage: str = "queued"
    step: int = 0
    total: int = 0
    share: float = 0.0
    left_s: float | None = None
    revision: int = 0
    preview: str = ""


@dataclasses.dataclass(frozen=True)
class Made:
    """Facts of a finished mesh file."""

    format: str
    size_bytes: int
    sha256: str
    vertices: int
    faces: int
    watertight: bool
    seconds: float
    model: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A row of the table of jobs. Times are seconds since 1970."""

    id: str
    caller: str
    interface: str
    state: State
    prompt: str
    pictures: int
    options: Mapping[str, Any]
    format: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    attempts: int
    owner: str | None
    progress: Progress
    made: Made | None
    failure: Failure | None

    @property
    def files(self) -> list[str]:
        """The names of the files that a job may have in the store."""
        pictures = [picture_name(self.id, view) for view in range(self.pictures)]
        return pictures + [result_name(self.id, format) for format in MEDIA_TYPES]


def new_id() -> str:
    """An id that nobody can guess, so that knowing it is the right to see the job where no keys are used."""
    return secrets.token_hex(16)


def picture_name(job: str, view: int) -> str:
    """The name in the store of one of a job's pictures."""
    return f"{job}-{view}.png"


def result_name(job: str, format: str) -> str:
    """The name in the store of a job's mesh in a format."""
    return f"{job}.{format}"

"""Client of the Hunyuan3D-2 shape denoiser and sampler on Triton Inference Server."""

from .blocking import Client, Job
from .client import AsyncClient
from .errors import (
    Cancelled,
    DeadlineExceeded,
    Hunyuan3DError,
    InvalidInput,
    ModelFailed,
    ModelNotReady,
    Overloaded,
    ServerUnavailable,
)
from .requests import Step
from .transport import GrpcTransport, Health, InputInfo, MockTransport, ModelInfo, Request, StatusError, Transport

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "GrpcTransport",
    "Health",
    "Hunyuan3DError",
    "InputInfo",
    "InvalidInput",
    "Job",
    "MockTransport",
    "ModelFailed",
    "ModelInfo",
    "ModelNotReady",
    "Overloaded",
    "Request",
    "ServerUnavailable",
    "StatusError",
    "Step",
    "Transport",
]

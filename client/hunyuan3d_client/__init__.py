"""Client of the Hunyuan3D-2 shape denoiser and sampler on Triton Inference Server."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batch import Summary
    from .blocking import Client
    from .client import AsyncClient
    from .cutouts import Cutout
    from .dns_transport import DnsTransport
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
    from .grpc_transport import GrpcTransport
    from .identity import ServedWeights
    from .mesh import Mesh, MeshProgress
    from .requests import Step, noise
    from .round_robin import RoundRobin
    from .streams import AsyncStream, Stream
    from .transport import Health, InputInfo, MockTransport, ModelInfo, Request, StatusError, Transport

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "Cutout",
    "DeadlineExceeded",
    "DnsTransport",
    "GrpcTransport",
    "Health",
    "Hunyuan3DError",
    "InputInfo",
    "InvalidInput",
    "Mesh",
    "MeshProgress",
    "MockTransport",
    "ModelFailed",
    "ModelInfo",
    "ModelNotReady",
    "Overloaded",
    "Request",
    "RoundRobin",
    "ServedWeights",
    "ServerUnavailable",
    "StatusError",
    "Step",
    "Stream",
    "Summary",
    "Transport",
    "noise",
]

if not TYPE_CHECKING:
    # Modules are imported when a name is first used, so that the export, which needs the contract alone, needs no gRPC.
    def __getattr__(name: str) -> object:
        if name in __all__:
            for module in (
                "batch",
                "blocking",
                "client",
                "cutouts",
                "dns_transport",
                "errors",
                "grpc_transport",
                "identity",
                "mesh",
                "requests",
                "round_robin",
                "streams",
                "transport",
            ):
                found = getattr(importlib.import_module(f".{module}", __name__), name, None)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

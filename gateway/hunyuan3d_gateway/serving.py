"""The gateway's process: it listens, says where, and ends in order."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Any

import uvicorn

from .app import create_app
from .gateway import Gateway

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


def serve(gateway: Gateway) -> None:
    """Serve until SIGINT or SIGTERM. The address goes to stdout once the gateway answers there."""
    settings = gateway.settings
    proxies = list(settings.trusted_proxy)
    config = uvicorn.Config(
        create_app(gateway), host=settings.host, port=settings.port, log_config=None, access_log=False,
        proxy_headers=bool(proxies), forwarded_allow_ips=proxies or None, server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)), lifespan="on",
    )  # fmt: skip
    if settings.host not in _LOOPBACK and not settings.require_key:
        hint = "hunyuan3d-gateway keys add NAME"
        logger.warning("whoever reaches %s may use this gateway, unless a key exists: %s", settings.host, hint)
    _Server(config, gateway).run()


def log() -> None:
    """Write the log of the gateway to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.INFO)
    for name in ("hunyuan3d_client", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Server(uvicorn.Server):
    """Says where it listens, and takes no more jobs from the first signal on."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            sys.stdout.write(f"http://{f'[{host}]' if ':' in host else host}:{port}\n")
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Not uvicorn's own, which raises the signal again after an orderly end: the exit code would speak of a failure.
        self._gateway.stop_taking()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

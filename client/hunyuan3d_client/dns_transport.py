"""All addresses of a name as one transport: the name is looked up again and again, and calls take turns among its addresses.

gRPC can do this too, but it keeps sending to a server that is stopping, and does not see a new address while the old ones answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import grpc

from .addresses import checked, name_and_port
from .deadlines import until
from .errors import invalid
from .grpc_transport import GrpcTransport, SharedMemory
from .headers import Headers
from .round_robin import RoundRobin
from .transport import Health, ModelInfo, Request, StatusError, Tensors, Transport

RESOLVE_S = 5.0
logger = logging.getLogger("hunyuan3d_client")


class DnsTransport:
    """The servers behind dns:///name:port, as one transport; see RoundRobin for how calls take turns among them.

    The name is looked up before the first call, and with a call after `resolve_s`, or after a server could not be reached. A new address
    joins the turn when its server is ready; an address that is gone gets no new call, and its running calls end in peace. While
    the name has no address, the last known addresses are used. The other arguments are GrpcTransport's, with which TLS checks the
    certificates for the name. Raises InvalidInput for another form of address.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        headers: Headers | None = None,
        options: Mapping[str, str | int] | None = None,
        resolve_s: float = RESOLVE_S,
    ) -> None:
        found = name_and_port(checked(url))
        if found is None:
            raise invalid("url", "dns:///NAME:PORT", repr(url), "GrpcTransport takes the other forms")
        self._name, self._port = found
        name = "grpc.default_authority" if credentials is None else "grpc.ssl_target_name_override"
        self._options = {name: self._name, **(options or {})}
        self._credentials, self._headers, self._resolve_s = credentials, headers, resolve_s
        self._transports: dict[str, Transport] = {}
        self._turns: RoundRobin | None = None
        self._looked_up = -float("inf")
        self._lookup: asyncio.Task[None] | None = None

    @property
    def servers(self) -> tuple[Transport, ...]:
        """The transports to the addresses that are known; none before the first call."""
        return self._turns.servers if self._turns else ()

    async def infer(self, request: Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        left = until(timeout_s)
        turns = await self._followed(timeout_s)
        try:
            async with aclosing(turns.infer(request, timeout_s=left())) as answers:
                async for answer in answers:
                    yield answer
        except StatusError as failure:
            self._note(failure)
            raise

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        left = until(timeout_s)
        return await (await self._followed(timeout_s)).model_ready(name, timeout_s=left())

    async def model_info(self, name: str, *, timeout_s: float) -> ModelInfo:
        left = until(timeout_s)
        return await (await self._followed(timeout_s)).model_info(name, timeout_s=left())

    async def health(self, *, timeout_s: float) -> Health:
        left = until(timeout_s)
        return await (await self._followed(timeout_s)).health(timeout_s=left())

    async def close(self) -> None:
        if self._lookup is not None:
            self._lookup.cancel()
        if self._turns is not None:
            await self._turns.close()

    def _note(self, failure: StatusError) -> None:
        """After a server could not be reached, or was refused by, the next call looks the name up again, but at most once a second."""
        if failure.status in (grpc.StatusCode.UNAVAILABLE, None):
            self._looked_up = min(self._looked_up, time.monotonic() - max(0.0, self._resolve_s - 1.0))

    async def _followed(self, timeout_s: float) -> RoundRobin:
        """The servers. A lookup that is due runs beside the call, except before the first."""
        is_due = self._turns is None or time.monotonic() - self._looked_up >= self._resolve_s
        if self._lookup is None and is_due:
            self._lookup = asyncio.create_task(self._look_up())
            self._lookup.add_done_callback(self._ended)
        if self._turns is None and self._lookup is not None:
            await asyncio.wait([self._lookup], timeout=timeout_s)
        if self._turns is None:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE,
                f"{self._name} must have an address, got none\nhint: look it up on this machine: getent ahosts {self._name}",
            )
        return self._turns

    def _ended(self, lookup: asyncio.Task[None]) -> None:
        self._lookup = None
        if not lookup.cancelled() and (error := lookup.exception()) is not None:
            logger.warning("%s cannot be looked up, so its last known addresses stay: %s", self._name, error)

    async def _look_up(self) -> None:
        self._looked_up = time.monotonic()
        found = await asyncio.get_running_loop().getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(_written(str(address[0]), self._port) for *_, address in found)
        new = {each: self._connect(each) for each in addresses if each not in self._transports}
        gone = [each for each in self._transports if each not in addresses]
        if self._turns is None:
            self._turns = RoundRobin([*new.values()])
        else:
            for transport in new.values():
                self._turns.join(transport)
        self._transports |= new
        for each in gone:
            self._turns.part(self._transports.pop(each))
        if new or gone:
            logger.info("%s has the addresses %s", self._name, ", ".join(addresses))

    def _connect(self, address: str) -> Transport:
        return GrpcTransport(address, credentials=self._credentials, headers=self._headers, options=self._options)


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def transport_to(
    url: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    headers: Headers | None = None,
    shared_memory: SharedMemory = False,
) -> Transport:
    """The transport to an address: a DnsTransport for dns:///name:port, else a GrpcTransport. Raises InvalidInput."""
    if name_and_port(checked(url)) is None or shared_memory is True:  # which GrpcTransport refuses for a name
        return GrpcTransport(url, credentials=credentials, headers=headers, shared_memory=shared_memory)
    return DnsTransport(url, credentials=credentials, headers=headers)

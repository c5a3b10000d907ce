"""What the servers can make now: asked of them from time to time, and remembered while they are away."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping

from hunyuan3d_client import AsyncClient, Health, Hunyuan3DError, RoundRobin, contract

from .failures import refused

PROMPTED = "shapes"  # the only preset that was trained on words
_SEVERAL_VIEWS = "-mv"  # part of the names of the multi-view presets
_FRESH_S = 5.0
_ASK_S = 15.0
_USUAL = {"max_batch": 8, "max_trajectories": 64, "steps": 50}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Abilities:
    """pictures: the number of views of one object that the encoder takes, 0 without an encoder. model: the preset's name.

    cutting: whether they can cut the subject out of a picture. solid: whether they have a shape decoder. Without one, the points of the preset `shapes` still become a mesh.
    """

    ready: bool
    model: str
    random: bool
    meshes: bool
    solid: bool
    pictures: int
    cutting: bool
    prompts: bool
    steps: int
    capacity: int


class Servers:
    """The servers behind a client, as callers of the gateway need to know them."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._known: Abilities | None = None
        self._asked_at = float("-inf")

    async def abilities(self) -> Abilities:
        """What the servers can do. Raises Refused while no server has ever answered."""
        if time.monotonic() - self._asked_at > _FRESH_S:
            self._asked_at = time.monotonic()  # callers that come meanwhile take what is known
            try:
                self._known = _kept(self._known, await self._ask())
            except Hunyuan3DError as error:
                logger.warning("no server tells what it serves: %s", str(error).partition("\n")[0])
                if self._known is not None:
                    self._known = dataclasses.replace(self._known, ready=False)
                else:
                    self._asked_at = float("-inf")
        if self._known is None:
            text = "No server has answered yet."
            raise refused(503, "no_server", text, "Try again in a minute; the operator sees more: hunyuan3d health.")
        return self._known

    async def _ask(self) -> Abilities:
        health = await self._client.health(timeout_s=_ASK_S)
        ready = {model.name: model.parameters for model in health.models if model.ready}
        told = ready.get(contract.SAMPLER, {})
        numbers = {name: _number(told, name, usual) for name, usual in _USUAL.items()}
        solid, prompts = contract.MESH in ready, health.preset == PROMPTED and contract.SAMPLER in ready
        transport = self._client.transport
        servers = len(transport.servers) if isinstance(transport, RoundRobin) else 1
        return Abilities(
            ready=health.ready and contract.SAMPLER in ready,
            model=health.preset,
            random=any(health.weights[name].random for name in contract.DENOISERS if name in health.weights),
            meshes=solid or prompts,
            solid=solid,
            pictures=_views(health) if solid and contract.IMAGE_CONTEXT in ready else 0,
            cutting=contract.BACKGROUND in ready,
            prompts=prompts,
            steps=numbers["steps"],
            capacity=servers * max(1, min(2 * numbers["max_batch"], numbers["max_trajectories"])),
        )


def _kept(before: Abilities | None, found: Abilities) -> Abilities:
    """What is found; or, where a server that loads, drains or is very busy answers in part, what it served before."""
    if before is None or not before.model or found.model:
        return found
    return dataclasses.replace(before, ready=found.ready)


def _number(parameters: Mapping[str, str], name: str, usual: int) -> int:
    text = parameters.get(name, "")
    return int(text) if text.isdigit() else usual


def _views(health: Health) -> int:
    """The number of views of one object that the deployed weights were made for; the encoder does not tell its own."""
    return len(contract.VIEWS) if _SEVERAL_VIEWS in health.preset else 1

"""Triton's side of preprocessing: image files -> the pixels that the image encoder takes, their backgrounds removed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cutting_out
import image_preprocessing
import numpy as np
import outcomes
import parameters
import triton_python_backend_utils as pb_utils
from preprocess_settings import PreprocessSettings
from remover import Remover

CONDITIONER = "hunyuan3d_conditioner"
_MANIFEST = "manifest.json"
_MORE_VIEWS = "an encoder for several views of one object: hunyuan3d-export conditioner --views 4, then deploy it"
# Every request that is worked at may hold several pictures of 268 MB.
_MOST_AT_ONCE = 4
# What became of a picture's background.
REMOVED, TRANSPARENT, KEPT, NO_REMOVER = "removed", "transparent", "kept", "kept: no remover"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = parameters.parse(PreprocessSettings, parameters.of_config(json.loads(args["model_config"])))
        # The manifest of the deployed encoder says how large its pictures are and how many views it takes.
        repository = Path(args["model_repository"]).parent
        serving = json.loads((repository / CONDITIONER / args["model_version"] / _MANIFEST).read_text())["serving"]
        self._size, self._views = serving["image_size"], serving["views"]
        self._remove = settings.remove_background
        self._remover = Remover(pb_utils, repository, args["model_version"], settings.evaluation_timeout_s)
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "pictures")
        self._room = asyncio.Semaphore(_MOST_AT_ONCE)
        self._running: set[asyncio.Task] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            # Not awaited here: the next request must begin before this one ends, or the two could never share a batch.
            task = asyncio.get_running_loop().create_task(self._answer(request, request.get_response_sender()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, request: object, sender: object) -> None:
        try:
            async with self._room:
                response = pb_utils.InferenceResponse(await self._outputs(request))
        except Exception as error:  # only this request fails
            code = getattr(pb_utils.TritonError, outcomes.code(error))
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _outputs(self, request: object) -> list:
        """The outputs that the request asks for; none is computed for nobody."""
        files, remove = self._decode(request)
        pictures, fates = [], []
        for index, data in enumerate(files):
            with image_preprocessing.naming_view(index, len(files)):
                picture, fate = await self._picture(data, remove=remove, request_id=request.request_id())
                pictures.append(picture)
                fates.append(fate)
        makers: dict[str, Callable[[], np.ndarray]] = {
            "pixels": lambda: _pixels(pictures, self._size),
            "background": lambda: _texts([fate.encode() for fate in fates]),
            "subject_share": lambda: np.array([cutting_out.share(picture) for picture in pictures], np.float32),
            "cutout": lambda: _texts([cutting_out.png(picture) for picture in pictures]),
        }
        wanted = set(request.requested_output_names())
        return [
            pb_utils.Tensor(name, await self._in_thread(make)) for name, make in makers.items() if not wanted or name in wanted
        ]

    def _decode(self, request: object) -> tuple[list[bytes], bool]:
        """The files of the request's views, and whether their backgrounds go. Raises ValueError when the encoder takes fewer views."""
        images = list(pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1))
        if not 1 <= len(images) <= self._views:
            most = "1 picture" if self._views == 1 else f"1 to {self._views} pictures"
            hint = f"\nhint: {_MORE_VIEWS}" if self._views == 1 and images else ""
            raise ValueError(f"image must hold {most}, got {len(images)}{hint}")
        given = pb_utils.get_input_tensor_by_name(request, "remove_background")
        return images, self._remove if given is None else bool(given.as_numpy().reshape(-1)[0])

    async def _picture(self, data: bytes, *, remove: bool, request_id: str) -> tuple[Any, str]:
        """A decoded picture, cut out if that is asked for and possible, and what became of its background."""
        picture = await self._in_thread(lambda: image_preprocessing.decode(data))
        if picture.mode == "RGBA":
            return picture, TRANSPARENT
        if not remove:
            return picture, KEPT
        if not self._remover.is_served():
            return picture, NO_REMOVER
        side = self._remover.side()
        levels = await self._in_thread(lambda: cutting_out.levels_for_network(picture, side))
        saliency = await self._remover.saliency(levels, request_id)
        return await self._in_thread(lambda: cutting_out.cut_out(picture, saliency)), REMOVED

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        # Triton calls go on meanwhile, and PIL releases Python's lock. The loop's own pool is for waits of calls between models.
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def finalize(self) -> None:
        self._threads.shutdown(wait=False)


def _pixels(pictures: list, size: int) -> np.ndarray:
    """[1, V, 3, P, P] float32, P = `size`."""
    views = []
    for index, picture in enumerate(pictures):
        with image_preprocessing.naming_view(index, len(pictures)):
            views.append(image_preprocessing.normalise(image_preprocessing.square(picture, size)))
    return np.stack(views)[None]


def _texts(values: list[bytes]) -> np.ndarray:
    found = np.empty(len(values), np.object_)  # filled element by element, because np.array() cuts trailing zero bytes off
    found[:] = values
    return found

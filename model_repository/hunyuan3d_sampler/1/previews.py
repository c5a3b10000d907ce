"""Bounds the memory of previews. Triton keeps every response of a stream until the stream ends, and longer if nobody reads it."""

from __future__ import annotations


class Previews:
    """The bytes of previews that the requests in progress have been sent, at most `limit_bytes` in all."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: dict[object, int] = {}
        self._all = 0

    def take(self, request: object, size_bytes: int) -> bool:
        """Whether a preview of so many bytes may be sent to `request`."""
        if self._all + size_bytes > self._limit:
            return False
        self._held[request] = self._held.get(request, 0) + size_bytes
        self._all += size_bytes
        return True

    def forget(self, request: object) -> None:
        """Gives back what a request held that has ended."""
        self._all -= self._held.pop(request, 0)

"""Keys of callers. The database holds their SHA-256 alone: a key is 256 random bits, so its digest cannot be guessed back."""

from __future__ import annotations

import hashlib
import re
import secrets
import time

import sqlalchemy as sql

from hunyuan3d_client.errors import invalid

from .database import Database, keys

PREFIX = "h3d_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def add(database: Database, name: str) -> str:
    """A new key for a caller, which is shown this once. Raises InvalidInput for a name that is taken or of another form."""
    if not _NAME.fullmatch(name):
        raise invalid("name", "of at most 64 letters, digits, '.', '_' or '-'", repr(name), "hunyuan3d-gateway keys add alice")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        row = {"name": name, "sha256": digest(key), "created_at": time.time()}
        database.run_here(lambda connection: connection.execute(keys.insert().values(**row)))
    except sql.exc.IntegrityError as error:
        raise invalid("name", "new", name, f"hunyuan3d-gateway keys remove {name}") from error
    return key


def remove(database: Database, name: str) -> None:
    """Make a caller's key worthless. Raises InvalidInput for an unknown name."""
    change = keys.delete().where(keys.c.name == name)
    if database.run_here(lambda connection: connection.execute(change).rowcount) == 0:
        raise invalid("name", "one of those that have keys", name, "hunyuan3d-gateway keys list")


def names(database: Database) -> list[tuple[str, float]]:
    """The callers that have keys, and when each key was made."""
    query = sql.select(keys.c.name, keys.c.created_at).order_by(keys.c.name)
    return database.run_here(lambda connection: [(row.name, row.created_at) for row in connection.execute(query)])


def digest(key: str) -> str:
    """What the database knows of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


class Keys:
    """The keys as a running gateway sees them: read again every few seconds, so that a removed key soon ends."""

    _FRESH_S = 5.0

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, str] = {}
        self._read_at = float("-inf")

    async def known(self) -> dict[str, str]:
        """Digest -> name of all keys."""
        if time.monotonic() - self._read_at > self._FRESH_S:
            query = sql.select(keys.c.sha256, keys.c.name)
            self._known = await self._database.read(
                lambda connection: {row.sha256: row.name for row in connection.execute(query)}
            )
            self._read_at = time.monotonic()
        return self._known

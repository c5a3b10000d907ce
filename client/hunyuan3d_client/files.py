"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_PROBE_BYTES = 1 << 20


class DiskFull(OSError):
    """There is no space for a file or folder. The message names it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} must fit on its disk, found no space left on device\nhint: free space, or name another disk")
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raises DiskFull for `path` in place of any error of the body that comes from a full disk.

    Libraries that write files tell a full disk in ways of their own, so the disk itself is asked.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if _is_full(path.parent, error):
            raise DiskFull(path) from error
        raise


def _is_full(folder: Path, error: Exception) -> bool:
    probe = folder / f".{os.getpid()}.probe"
    try:
        if isinstance(error, OSError) and error.errno is not None:
            return _tells_full(error)
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as found:
        return _tells_full(found)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return False


def _tells_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, for the body to write to.

    If the body succeeds, the file is renamed to `path`; if it raises, the file is removed. Missing folders are created.
    Raises DiskFull where there is no space.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming_a_full_disk(path):  # asks the disk before `finally` removes the file, which would free the space
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Finds the tritonserver inside the wheel nvidia-pytriton, and lays its files out so that it runs by itself.

This file imports only the standard library, so that a small image can run `python wheel.py FOLDER`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


class ServerStartError(RuntimeError):
    """The server cannot run on this machine, or it ended or hung before it was ready."""


def lay_out(home: Path) -> Path:
    """Fills `home` like the official image's Triton folder: bin/tritonserver, a script, and backends/. Returns the script.

    Raises ServerStartError.
    """
    root, stub = _find_server()
    backend = home / "backends" / "python"
    backend.mkdir(parents=True)
    for path in (root / "backends" / "python").iterdir():
        if path.is_file():
            shutil.copy2(path, backend)
    shutil.copy2(stub, backend)
    libraries = [str(root.parent.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    launcher = home / "bin" / "tritonserver"
    launcher.parent.mkdir()
    launcher.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH={shlex.quote(':'.join(filter(None, libraries)))}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\n"
        "# The stub finds this environment's packages through the interpreter that is first on the path.\n"
        f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:$PATH\n"
        f'exec {shlex.quote(str(root / "bin" / "tritonserver"))} "$@"\n'
    )
    launcher.chmod(0o755)
    return launcher


def _find_server() -> tuple[Path, Path]:
    """The wheel's server folder, and its stub for this version of Python."""
    install = f"in the project's folder: {shlex.quote(sys.executable)} -m pip install '.[export,embedded]'"
    hint = f"hint: on Linux x86-64 with glibc >= 2.35, {install}; elsewhere serve the repository with the official Triton image"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServerStartError(f"the embedded server must run on linux x86_64, got {sys.platform} {platform.machine()}\n{hint}")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerStartError(f"package nvidia-pytriton must be installed, found none\n{hint}")
    _check_numpy()
    root = Path(spec.submodule_search_locations[0]) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        found = ", ".join(sorted(path.name for path in stub.parent.parent.glob("*"))) or "none"
        raise ServerStartError(f"the wheel must hold a stub for Python {version}, found {found}\n{hint}")
    return root, stub


def _check_numpy() -> None:
    """The stub reads every array of NumPy 2 as one of zero bytes, so the server would start and refuse each request."""
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return
    if int(version.partition(".")[0]) >= 2:
        install = f"{shlex.quote(sys.executable)} -m pip install 'numpy<2'"
        raise ServerStartError(f"numpy must be below 2 for the embedded server, found {version}\nhint: {install}")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))

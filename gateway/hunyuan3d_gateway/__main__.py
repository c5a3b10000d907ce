"""Entry point of the `hunyuan3d-gateway` command. The command itself, cli.py, needs the extra `gateway`."""

import sys

from hunyuan3d_client.install import install_hint

_PACKAGES = (
    *("fastapi", "starlette", "uvicorn", "sqlalchemy", "psycopg", "python_multipart", "prometheus_client", "PIL", "trimesh"),
    *("typer", "rich", "safetensors"),
)


def main() -> None:
    """Run the command, or say which package it needs and how to install it."""
    try:
        from .cli import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _PACKAGES:
            raise
        sys.stderr.write(f"This command needs {missing}, which is not installed.\nhint: {install_hint('gateway')}\n")
        raise SystemExit(2) from error
    raise SystemExit(run())


if __name__ == "__main__":
    main()

"""Entry point of the `hunyuan3d` command; the command itself needs the extra `cli`."""

import sys


def main() -> None:
    """Run the command line, or say what to install."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich", "safetensors"):
            raise
        sys.stderr.write(f'This command needs {missing}, which is not installed.\nhint: pip install "hunyuan3d-triton[cli]"\n')
        raise SystemExit(2) from error
    app()


if __name__ == "__main__":
    main()

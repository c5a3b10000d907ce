"""Entry of `hunyuan3d-export` and `python -m hunyuan3d_export`."""

import sys

from hunyuan3d_client.install import install_hint

from .introduction import introduction


def main() -> None:
    """Runs the command line. Without the extra `export`, the process ends with a hint on how to install it."""
    try:
        from .commands.app import run
    except ImportError as error:
        if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
            sys.stdout.write(f"{introduction()}\nThese commands need {error.name}: {install_hint('export')}\n")
            return
        sys.exit(f"error: hunyuan3d-export needs {error.name}\nhint: {install_hint('export')}")
    sys.exit(run())


if __name__ == "__main__":
    main()

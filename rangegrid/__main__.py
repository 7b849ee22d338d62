"""Runs the command `rangegrid`, after a check that its packages are not another project's."""

import sys

from rangegrid import names


def main() -> None:
    """Runs the command line."""
    try:
        names.check()
    except ImportError as error:
        sys.exit(str(error))
    from flows.cli import main as run

    run()


if __name__ == "__main__":
    main()

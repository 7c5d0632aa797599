"""The command line. One small file per verb; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the `kdrun` command: run a verb, turn what it refuses into a message and an exit code."""
    if asked := os.environ.get("_KDRUN_COMPLETE"):
        from kdrun.cli.shells import answer

        return answer(asked)
    from kdrun.cli.app import app
    from kdrun.cli.console import complain
    from kdrun.errors import KdrunError

    # A model or objective of one's own may lie in the current folder; at the end of the path it shadows nothing.
    sys.path.append(os.getcwd())
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a file or a pipe wants no bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nor those of transformers, which looks here
    try:
        app(prog_name="kdrun")
    except KdrunError as error:
        complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

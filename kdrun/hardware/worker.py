"""`python -m kdrun.hardware.worker SPEC`: one rank of a run, told what to do by a file."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from kdrun.cli.view import make_reporter
from kdrun.engine.distributed import Ranks
from kdrun.engine.records import from_document, read_json, write_json
from kdrun.engine.report import Reporter
from kdrun.engine.run import execute
from kdrun.errors import KdrunError, Refused
from kdrun.hardware.launch import EXIT_FILE


def main(spec: Path) -> int:
    """Run; leave the reason beside the spec if it did not end well. Returns the exit code."""
    told = read_json(spec)
    ranks = Ranks.join()
    try:
        with make_reporter(json=False, quiet=not ranks.first) as reporter:
            execute(from_document(told["composed"]), reporter if ranks.first else Reporter(), Path(told["folder"]), told["resume"], ranks)
    except KdrunError as error:
        if ranks.first:
            problems = [asdict(p) for p in error.problems] if isinstance(error, Refused) else None
            write_json(spec.parent / EXIT_FILE, {"exit_code": error.exit_code, "message": str(error), "problems": problems})
        return error.exit_code
    finally:
        ranks.leave()
    return 0


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    # torchrun then ends its report with this rank's own traceback
    sys.exit(record(main)(Path(sys.argv[1])))

"""Commands: `python -m tfspark doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = ("doctor",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        print(f"usage: tfspark {{{','.join(COMMANDS)}}} …", file=sys.stderr)
        return 2
    from tfspark import doctor  # imports Spark and NumPy, which a usage message need not

    return doctor.main(given[1:])


if __name__ == "__main__":
    sys.exit(main())

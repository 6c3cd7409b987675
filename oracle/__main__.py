"""`python -m pageproof.oracle`: see `cli`."""

from __future__ import annotations

import sys

try:
    from .cli import main
except ImportError as error:
    if sys.argv[1:2] != ["replay"]:
        raise
    sys.stderr.write(f"replay: {error}\n")
    sys.exit(125)  # what `git bisect run` takes for "cannot be told here" rather than for "bad"

if __name__ == "__main__":  # worker processes import this module as well
    sys.exit(main())

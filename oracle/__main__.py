"""`python -m pageproof.oracle`: see `cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":  # worker processes import this module as well
    sys.exit(main())

"""``python -m krul``: the command line of `krul.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

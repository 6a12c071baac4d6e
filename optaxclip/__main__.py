"""The command ``python -m optaxclip LOG``: see ``python -m optaxclip --help``."""

import sys

from optaxclip._pages.command import main

if __name__ == "__main__":
    sys.exit(main())

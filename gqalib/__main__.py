"""`python -m gqalib`: the command line."""

import sys

from gqalib.run.cli import main

if __name__ == "__main__":
    sys.exit(main())

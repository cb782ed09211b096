"""`python -m gqalib`: the command line."""

import signal
import sys

from gqalib.run.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `with` ends what it began
    sys.exit(main())

"""`python -m diffcr_surgery` is the command line."""

import sys

from diffcr_surgery.cli import main

if __name__ == "__main__":
    sys.exit(main())

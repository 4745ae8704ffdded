"""``python -m isobn_kernels``."""

import sys

from isobn_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sttm_kernels`, the same as `sttm-kernels`."""

import sys

from sttm_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())

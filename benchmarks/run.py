"""`python -m benchmarks.run` is `sttm-kernels bench`, from a checkout."""

import sys

from sttm_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

import sys

from benchmarks.codegen.table import main

if __name__ == "__main__":
    sys.exit(main())

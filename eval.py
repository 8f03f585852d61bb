"""Measure a run or an export: python eval.py RUN_OR_EXPORT [--shards DIR]; the same as `vtok eval`."""

import sys

from vtok.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

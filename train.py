"""Train a compressor: python train.py configs/<family>/<preset>.yaml [key=value ...]; the same as `vtok train`."""

import sys

from vtok.train import main

if __name__ == "__main__":
    main(sys.argv[1:])

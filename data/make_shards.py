"""Videos, images or manifests into shards: `python data/make_shards.py VIDEOS... --out DIR`, the same as `vtok shards`.

The layout of what it writes: data/README.md. All options: `python data/make_shards.py --help`.
"""

import sys

from vtok.data.shards import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

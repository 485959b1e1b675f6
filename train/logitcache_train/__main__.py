"""`python -m logitcache_train ...` is `logitcache train ...`, for torchrun."""

import sys

from logitcache_storage.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

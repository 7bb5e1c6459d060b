#!/usr/bin/env python
"""`megarubric convert` as a program of its own: convert_checkpoint.py SRC DST [--verify] ..."""

import sys

from megarubric.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

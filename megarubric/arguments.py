"""Values on the command line, for argparse: what cannot be one is said in a line."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return int(text)


def seconds(text: str) -> float:
    """More than 0, and not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value

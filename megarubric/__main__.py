"""`python -m megarubric` is the `megarubric` command."""

import sys

from megarubric.cli import main

sys.exit(main())

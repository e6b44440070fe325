"""`python -m minimind_o_hf` is the `minimind-o` command."""

import sys

from .cli import main

sys.exit(main())

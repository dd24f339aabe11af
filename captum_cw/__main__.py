"""``python -m captum_cw``: the command line."""

import sys

from captum_cw.cli import main

sys.exit(main())

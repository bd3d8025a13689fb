"""`python -m fxcompress.cli`."""

import sys

from fxcompress.cli import main

sys.exit(main())

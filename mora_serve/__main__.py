"""``python -m mora_serve`` is ``mora-serve``."""

import sys

from mora_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())

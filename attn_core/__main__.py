"""``python -m attn_core``: the same as ``attn``."""

from __future__ import annotations

import sys

from attn_core.cli import main

if __name__ == "__main__":
    sys.exit(main())

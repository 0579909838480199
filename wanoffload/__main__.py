"""`python -m wanoffload` is the command `wanoffload`."""

from wanoffload.cli import main

raise SystemExit(main())

"""`python -m report FOLDER`: see page.py."""

from __future__ import annotations

import tyro

from report import page
from runtime import cli

if __name__ == "__main__":
    cli.start(lambda: page.report(tyro.cli(page.Config, description=page.__doc__)))

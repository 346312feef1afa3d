"""`python -m report FOLDER`: see page.py."""

from __future__ import annotations

import tyro

from report import page
from runtime import cli
from runtime.ranks import program

if __name__ == "__main__":
    cli.start(lambda: page.report(tyro.cli(page.Config, prog=program(), description=page.__doc__)))

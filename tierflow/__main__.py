"""``python -m tierflow``."""

from tierflow.cli import app

app()

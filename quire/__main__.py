"""``python -m quire``."""

from quire.cli.main import app

app()

"""``python -m halfbyte``."""

from halfbyte.cli.main import run

run()

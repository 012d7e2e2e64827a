"""Run by torchrun: rank 1 fails with an error of its own, rank 0 says what it hears of that."""

from __future__ import annotations

import os
import sys

from halfbyte.cli.ranks import ranks_of
from halfbyte.errors import HalfbyteError, ResourceError
from halfbyte.train.ranks import joined

ranks = ranks_of(os.environ)
try:
    with joined(ranks):
        ranks.total(1.0)
        if ranks.rank == 1:
            raise ResourceError("cannot be written", where="run", why="No space left on device")
        ranks.total(1.0)
except HalfbyteError as error:
    sys.stdout.write(f"{ranks}|{error.exit_code}|{error.said}|{error}\n")

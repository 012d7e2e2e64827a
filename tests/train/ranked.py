"""Run by torchrun: trains once for every line of a file of settings, one JSON object each, on all ranks together."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from halfbyte.cli.ranks import ranks_of
from halfbyte.config import load_config
from halfbyte.train import loop


def main() -> None:
    ranks = ranks_of(os.environ)
    dist.init_process_group("gloo")
    for line in Path(sys.argv[1]).read_text().splitlines():
        config = load_config(**json.loads(line))
        loop.train(config, ranks=ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The stacks halfbyte is measured beside that cannot live in its environment: `peers.py` makes one for them.

usage: peers.py [--work DIR]

bitsandbytes-cpu-fork installs under bitsandbytes' name, and torchao and xllamacpp (llama.cpp) are wanted for nothing
else. The environment in DIR/peers borrows torch, transformers and PEFT from this one, so all run on the same torch.
Benchmarks use it where it exists, and say so where it does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sysconfig
import venv
from pathlib import Path

PACKAGES = ("bitsandbytes-cpu-fork==0.50.2.dev9", "torchao==0.18.0", "xllamacpp==2026.10.11549")


def peer_python(work: Path) -> Path | None:
    """The interpreter of the peers' environment, None where it was not made."""
    python = work.resolve() / "peers" / "bin" / "python"
    return python if python.exists() else None


def main() -> None:
    """Make the environment, or renew it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    folder = parser.parse_args().work.resolve() / "peers"
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(purelib) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    print(python)


if __name__ == "__main__":
    main()

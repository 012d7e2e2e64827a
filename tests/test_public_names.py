"""The public names: few, all there, and none of them costs the command line its quick start."""

from __future__ import annotations

import subprocess
import sys

import halfbyte


def test_every_public_name_resolves() -> None:
    assert len(halfbyte.__all__) <= 20
    assert list(halfbyte.__all__) == sorted(halfbyte.__all__)
    for name in halfbyte.__all__:
        assert callable(getattr(halfbyte, name)), name
    assert set(halfbyte._HOMES) == set(halfbyte.__all__)


def test_the_function_train_survives_the_import_of_its_room() -> None:
    code = "import halfbyte as hb, halfbyte.train.loop; assert callable(hb.train)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, halfbyte, halfbyte.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_quantize_runs_on_the_kernels_not_on_their_specification() -> None:
    code = "import sys, halfbyte; halfbyte.quantize; assert 'halfbyte.kernels.cpu_ops' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

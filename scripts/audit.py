"""Known advisories of what halfbyte brings along: exit 1 where there is one, a line where it cannot tell."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def pins() -> str:
    """Exact versions of everything that is installed with halfbyte, a line each."""
    script = Path(__file__).with_name("sbom.py")
    return subprocess.run([sys.executable, script, "--pins"], check=True, capture_output=True, text=True).stdout


def look_up(requirements: str) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit says of each package, and why it says nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip", "-f", "json",
             "--progress-spinner", "off", "--timeout", "10"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        return [], (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def main() -> None:
    """See the module."""
    if find_spec("pip_audit") is None:
        print("audit: not run, pip-audit is not installed (pip install -e '.[audit]')")
        return
    packages, why = look_up(pins())
    known = [each for each in packages if "skip_reason" not in each]
    bad = [each for each in known if each["vulns"]]
    if not known:
        why = why or packages[0]["skip_reason"]
        print(f"audit: could not run, the advisory service does not answer: {why}")
        return
    for each in bad:
        names = ", ".join(
            f"{v['id']} (fixed in {', '.join(v['fix_versions']) or 'no version'})" for v in each["vulns"]
        )
        print(f"audit: {each['name']} {each['version']}: {names}")
    print(f"audit: {len(known)} of {len(packages)} packages looked up, {len(bad)} with advisories")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

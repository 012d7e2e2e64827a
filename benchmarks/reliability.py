"""What the reliability tests counted, from pytest's JUnit report into results/reliability.json.

usage: reliability.py REPORT.xml...       scripts/reliability does it
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from common import write_result

OUTPUT = Path(__file__).parent / "results" / "reliability.json"


def cases(report: Path) -> dict[str, dict[str, Any]]:
    """Per test that counted something: whether it passed, seconds, counts."""
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        counted = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
        if counted:
            passed = case.find("failure") is None and case.find("error") is None
            found[case.attrib["name"]] = {"passed": passed, "seconds": float(case.attrib["time"]), **counted}
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    write_result(OUTPUT, {"cases": {name: row for path in sys.argv[1:] for name, row in cases(Path(path)).items()}})

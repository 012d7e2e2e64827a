"""What halfbyte brings along, as installed here: a CycloneDX 1.6 document, or pins for an audit.

usage: sbom.py [--pins] [EXTRA...]        default: serve; on standard output, the same bytes for the same versions
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Found = dict[str, tuple[Distribution, list[str]]]
"""By canonical name: the distribution, and the names of what it needs."""


def closure(name: str, extras: Iterable[str], found: Found) -> None:
    """Add `name` and all that it needs on this platform to `found`."""
    here = distribution(name)
    needs = []
    for text in here.requires or ():
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            continue
        try:
            distribution(requirement.name)
        except PackageNotFoundError:
            print(f"sbom: {requirement.name}, which {name} needs, is not installed and left out", file=sys.stderr)
            continue
        needs.append(canonicalize_name(requirement.name))
    key = canonicalize_name(name)
    seen = key in found
    found[key] = here, sorted({*needs, *(found[key][1] if seen else ())} - {key})
    for need in found[key][1]:
        if need not in found:
            closure(need, (), found)


def _license(package: Distribution) -> list[dict[str, object]]:
    meta = package.metadata
    if expression := meta.get("License-Expression"):
        return [{"expression": expression}]
    names = [text.rpartition(" :: ")[2] for text in meta.get_all("Classifier", []) if text.startswith("License ::")]
    text = names[0] if names else (meta.get("License") or "").strip().splitlines()[:1]
    return [{"license": {"name": text if isinstance(text, str) else text[0]}}] if text else []


def _component(name: str, package: Distribution, kind: str) -> dict[str, object]:
    reference = f"pkg:pypi/{name}@{package.version}"
    licenses = _license(package)
    return {
        "type": kind, "bom-ref": reference, "name": name, "version": package.version, "purl": reference,
        **({"licenses": licenses} if licenses else {}),
    }  # fmt: skip


def bom(found: Found, root: str = "halfbyte") -> dict[str, object]:
    """A CycloneDX document of `root` and what it needs; without a time, so that it can be compared."""
    parts = {
        name: _component(name, package, "application" if name == root else "library")
        for name, (package, _) in found.items()
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.6",
        "version": 1, "metadata": {"component": parts[root]},
        "components": [part for name, part in sorted(parts.items()) if name != root],
        "dependencies": [
            {"ref": parts[name]["bom-ref"], "dependsOn": [parts[need]["bom-ref"] for need in needs]}
            for name, (_, needs) in sorted(found.items())
        ],
    }  # fmt: skip


def main() -> None:
    """See the module."""
    arguments = [text for text in sys.argv[1:] if text != "--pins"]
    found: Found = {}
    closure("halfbyte", arguments or ["serve"], found)
    if "--pins" in sys.argv:
        pins = [f"{name}=={package.version.partition('+')[0]}" for name, (package, _) in sorted(found.items())]
        print("\n".join(pin for pin in pins if not pin.startswith("halfbyte==")))
    else:
        print(json.dumps(bom(found), indent=1))


if __name__ == "__main__":
    main()

"""What is installed here -> a CycloneDX 1.5 document on standard output.

    python sbom.py VENV >sbom.cdx.json

Python packages from their metadata, Debian's from dpkg's list. It has no time and no random number
in it: the same packages give the same document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import quote

DPKG_STATUS = Path("/var/lib/dpkg/status")

Component = dict[str, object]


def python_packages(venv: Path) -> Iterator[Component]:
    """Of a virtual environment."""
    for folder in venv.glob("lib/python3.*/site-packages"):
        for package in distributions(path=[str(folder)]):
            metadata = package.metadata
            name = metadata["Name"].lower().replace("_", "-").replace(".", "-")
            licence = metadata["License-Expression"] or metadata["License"] or ""
            yield _component("pypi", name, package.version, licence.partition("\n")[0])


def system_packages(status: Path) -> Iterator[Component]:
    """That dpkg has installed."""
    for paragraph in status.read_text().split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if ": " in line and line[0] != " "
        )
        if fields.get("Status", "").endswith(" installed"):
            yield _component("deb/debian", fields["Package"], fields["Version"], "")


def _component(kind: str, name: str, version: str, licence: str) -> Component:
    url = f"pkg:{kind}/{quote(name)}@{quote(version)}"
    component: Component = {
        "type": "library",
        "bom-ref": url,
        "name": name,
        "version": version,
        "purl": url,
    }
    if licence:
        component["licenses"] = [{"license": {"name": licence[:200]}}]
    return component


def main() -> None:
    """Write the document."""
    found = [*python_packages(Path(sys.argv[1])), *system_packages(DPKG_STATUS)]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": sorted(found, key=lambda component: str(component["purl"])),
    }
    json.dump(document, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

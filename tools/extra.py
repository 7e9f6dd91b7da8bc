"""Print the requirements of one of the package's extras, a line each, as `pip install --requirement` reads them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def read_extra(name: str) -> list[str]:
    """Requirements of an extra, those of extras of this package that it names included."""
    project = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text())["project"]
    own = f"{project['name']}["
    lines: list[str] = []
    for line in project["optional-dependencies"][name]:
        inner = line.removeprefix(own).rstrip("]").split(",") if line.startswith(own) else []
        lines += [found for other in inner for found in read_extra(other.strip())] or [line]
    return lines


if __name__ == "__main__":
    print("\n".join(read_extra(sys.argv[1])))

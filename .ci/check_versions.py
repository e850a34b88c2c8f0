"""Every installed package is in constraints.txt, with that version."""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

UNNAMED = {"mobileone-lightning", "pip"}


def constraints(file: Path) -> dict[str, Requirement]:
    """What the file says for this Python and system, by package."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(one.name): one for one in here}


def main(file: Path) -> None:
    """Name every package that is not as the file says."""
    wanted, wrong = constraints(file), []
    for package in distributions():
        name = canonicalize_name(package.metadata["Name"])
        if name in UNNAMED or (name in wanted and package.version in wanted[name].specifier):
            continue
        wrong.append(f"{name} {package.version}: {wanted.get(name, 'not in the file')}")
    if wrong:
        sys.exit(f"{file} is not what is installed, run .ci/constraints:\n" + "\n".join(wrong))
    print(f"{len(wanted)} versions of {file} apply here, all that is installed among them")


if __name__ == "__main__":
    main(Path("constraints.txt"))

"""Where the tests find the repository and the programs that they start."""

from pathlib import Path

__all__ = ["PROGRAMS", "REPOSITORY"]

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = REPOSITORY / "tests" / "programs"

"""The names that a misspelled one may mean."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message about an unknown name.

    Args:
        name: What was given.
        known: What there is.
        cutoff: How alike a name must be, from 0 to 1.

    Returns:
        "; did you mean a, b or c?" with at most three names; empty where none is alike.
    """
    *firsts, last = get_close_matches(name, sorted(set(known)), 3, cutoff) or [""]
    names = f"{', '.join(firsts)} or {last}" if firsts else last
    return f"; did you mean {names}?" if names else ""

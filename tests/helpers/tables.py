"""Tables as a terminal would show them."""

from rich.console import Console

__all__ = ["text_of"]


def text_of(table, width=200):
    """What a terminal of that width shows of anything that rich prints."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()

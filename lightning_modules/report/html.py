"""Pieces of a page that stands alone: escaped text, inlined images, style inside."""

import base64
import html
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

__all__ = ["Html", "details", "figure_image", "note", "number", "page", "png_image", "section",
           "table", "text"]  # fmt: skip

_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d5d5d5; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.5rem; border-bottom: 2px solid var(--mark);
  padding-bottom: 0.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p { margin: 0.4rem 0; }
a { color: var(--mark); }
nav { margin: 0.6rem 0; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; }
.soft { color: var(--soft); font-size: 0.875rem; }
.missing { border-left: 4px solid #d55e00; background: #fff4ec; padding: 0.4rem 0.7rem;
  margin: 0.6rem 0; font-size: 0.9rem; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
td { white-space: nowrap; }
td.n, th.n { text-align: right; }
tr.own { background: #e8f3fa; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 0.8rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 1rem 0; }
.facts div { border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.5rem 0.9rem; }
.facts b { display: block; font-size: 1.3rem; }
.chart { max-width: 52rem; }
.medium { max-width: 38rem; }
.worst { display: grid; gap: 0.8rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.worst figure { margin: 0; font-size: 0.8rem; line-height: 1.3; }
.worst img { width: 100%; image-rendering: auto; border: 1px solid var(--line); }
details { margin: 0.4rem 0; }
summary { cursor: pointer; color: var(--mark); font-size: 0.875rem; }
pre { white-space: pre-wrap; font-size: 0.75rem; background: #f6f6f6; padding: 0.6rem; }
code { font-size: 0.9em; background: #f2f2f2; padding: 0 0.2em; }
@media print { details, nav { display: none; } h2 { break-after: avoid; }
  img { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML already. Plain strings are escaped wherever they are put into a page."""

    __slots__ = ()


def text(value: object) -> Html:
    """HTML of any value: escaped, unless it is HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def number(value: object) -> str:
    """A cell for people: few digits, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def table(
    columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], own: str | None = None
) -> Html:
    """A table that scrolls within itself where the screen is narrow.

    Args:
        columns: Heading of each column, by its key in the rows.
        rows: The cells, by key.
        own: Value of the first column whose row stands out.
    """
    numeric = {key for key in columns if all(_is_number(row.get(key)) for row in rows)}
    first = next(iter(columns))

    def cell(tag: str, key: str, value: object) -> str:
        kind = ' class="n"' if key in numeric else ""
        return f"<{tag}{kind}>{text(value)}</{tag}>"

    head = "".join(cell("th", key, heading) for key, heading in columns.items())
    body = []
    for row in rows:
        mark = ' class="own"' if own is not None and row.get(first) == own else ""
        cells = (
            cell("td", key, row[key] if isinstance(row.get(key), Html) else number(row.get(key)))
            for key in columns
        )
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return Html(
        '<div class="wide" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def png_image(png: bytes, alt: str) -> Html:
    """An image, inside the page."""
    return _image(base64.b64encode(png).decode("ascii"), alt)


def figure_image(figure: Figure, alt: str) -> Html:
    """A chart, drawn and inside the page."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # class names in a script that the font lacks
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(buffer, format="png", dpi=160)
    return png_image(buffer.getvalue(), alt)


def note(message: object) -> Html:
    """What is missing, and how to get it; commands stand between backticks."""
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", text(message))
    return Html(f'<p class="missing">{shown}</p>')


def details(summary: object, content: object) -> Html:
    """Text that is unfolded on demand."""
    return Html(f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>")


def section(title: str, parts: Iterable[object]) -> tuple[str, Html]:
    """Title and content."""
    return title, Html("\n".join(text(part) for part in parts))


def page(title: str, head: Iterable[object], sections: Sequence[tuple[str, Html]]) -> str:
    """The whole document. Its policy lets a browser load nothing from elsewhere, run nothing."""
    links = "".join(f'<a href="#s{i}">{text(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "\n".join(
        f'<section id="s{i}"><h2>{text(name)}</h2>\n{content}</section>'
        for i, (name, content) in enumerate(sections)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
{"".join(text(part) for part in head)}
<nav>{links}</nav>
{body}
</body>
</html>
"""


def _is_number(value: object) -> bool:
    if value is None or isinstance(value, int | float):
        return True
    return isinstance(value, str) and re.fullmatch(r"[-–+.,\d]+( %|\u00a0MB)?", value) is not None


def _image(encoded: str, alt: str) -> Html:
    return Html(f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alt)}">')

"""Labels beside the points of a chart, where they cover neither each other nor a point."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["place_labels"]

# right below, above, beside; left above, below, beside; then farther away; in points
_PLACES = (
    *((4, -9), (4, 4), (6, -2), (-4, 4), (-4, -9), (-6, -2)),
    *((12, -17), (12, 12), (-12, 12), (-12, -17), (22, -2), (-22, -2)),
)
# where it is farther away, a line tells whose it is
_LINE = {"arrowstyle": "-", "linewidth": 0.4, "color": "#555555", "shrinkA": 0, "shrinkB": 2}


def place_labels(
    axes: "Axes",
    labels: Sequence[tuple[str, float, float, dict[str, Any]]],
    points: Sequence[tuple[float, float]],
) -> None:
    """Write each label at the first place around its point that is free.

    A label for which none is free stays at the place that it covers least at; call it when the
    chart is otherwise complete.

    Args:
        axes: Where.
        labels: Text, x and y of the point, and style of each, the most important ones first.
        points: All points that are drawn, x and y.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where points are
    marks = axes.transData.transform(list(points))
    reach = 3 * figure.dpi / 72
    taken = [Bbox([(x - reach, y - reach), (x + reach, y + reach)]) for x, y in marks]
    for text, x, y, style in labels:
        label = axes.annotate(text, (x, y), xytext=_PLACES[0], textcoords="offset points", **style)
        tried = []
        for place in _PLACES:
            label.set_position(place)
            label.set_horizontalalignment("left" if place[0] > 0 else "right")
            box = label.get_window_extent()
            tried.append((_covered(box, taken, axes.bbox), place, box))
            if tried[-1][0] == 0:
                break
        _, place, box = min(tried, key=lambda trial: trial[0])
        label.set_position(place)
        label.set_horizontalalignment("left" if place[0] > 0 else "right")
        taken.append(box)
        if abs(place[0]) > 6:
            axes.annotate("", (x, y), place, textcoords="offset points", arrowprops=_LINE)


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Area of what the box covers, and of what of it is outside the frame."""
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0)
    overlaps = (Bbox.intersection(box, other) for other in taken)
    return outside + sum(o.width * o.height for o in overlaps if o is not None)

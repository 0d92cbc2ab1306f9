"""What figures are drawn on: matplotlib without pyplot, colors that all readers tell apart."""

from __future__ import annotations

try:
    from matplotlib.axes import Axes as Axes
    from matplotlib.cm import ScalarMappable as ScalarMappable
    from matplotlib.collections import PolyCollection as PolyCollection
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.font_manager import findfont as findfont
    from matplotlib.font_manager import get_font as get_font
except ImportError as error:
    raise ImportError(
        'jaxpattern.plot needs matplotlib, which is optional: pip install "jaxpattern[plot]"'
    ) from error

BLUE, ORANGE, VERMILLION, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#7A7A7A"


def figure_of(width: float, height: float) -> Figure:
    """A figure of its own."""
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def root_of(ax: Axes) -> Figure:
    """The whole figure, also where the axes lie in a part of one."""
    return ax.figure if isinstance(ax.figure, Figure) else ax.figure.figure


def open_frame(ax: Axes) -> None:
    """No frame on the right and at the top."""
    ax.spines[["right", "top"]].set_visible(False)

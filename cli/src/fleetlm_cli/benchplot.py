"""Pictures of a bench (PNG), drawn with Pillow, which is an extra: `fleetlm[plot]`.

    load       latency by percentile, acknowledged appends over time
    samples    one figure a try, in the order of the tries

Promise: axes are labelled with units and begin where the data does; nothing is smoothed. A picture that cannot be drawn
is refused before anything is measured (`check`). Must not be done here: measuring.
"""

from __future__ import annotations

import math
from array import array
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetlm_cli.benchload import TICKS_PER_S, Outcome
from fleetlm_cli.exits import Exit, Failure

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

SCALE: Final = 2
"""Pixels a unit, so that lines and letters are smooth on today's screens."""
WIDTH, HEIGHT = 1200, 620
INK, SOFT, GRID, PAPER = "#1f2933", "#66727f", "#e3e8ee", "#ffffff"
BLUE, ORANGE = "#1f6fb4", "#d9701b"
PERCENTILES: Final = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
_STEPS: Final = (1, 2, 5)


def check(path: Path | None) -> None:
    """Whether a picture can be drawn there.

    Raises:
        Failure: Pillow is not installed, or the name is no PNG's.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise Failure(f"--plot draws PNG: name a file that ends with .png, not {path.name}", status=Exit.USAGE)
    if not path.absolute().parent.is_dir():
        raise Failure(f"--plot: there is no folder {path.absolute().parent}", status=Exit.USAGE)
    if find_spec("PIL") is None:
        raise Failure("--plot needs Pillow: install fleetlm[plot]", status=Exit.USAGE)


class _Canvas:
    """Drawing in units, not pixels."""

    def __init__(self) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._font = ImageFont
        self.image: Image.Image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self._draw: ImageDraw.ImageDraw = ImageDraw.Draw(self.image)

    def text(self, at: tuple[float, float], words: str, *, size: int = 14, fill: str = INK, anchor: str = "la") -> None:
        """Words; the anchor is Pillow's (left/middle/right, ascender/middle/baseline)."""
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont = self._font.load_default(size * SCALE)
        self._draw.text((at[0] * SCALE, at[1] * SCALE), words, font=font, fill=fill, anchor=anchor)

    def line(self, points: list[tuple[float, float]], *, fill: str = INK, width: float = 1.0) -> None:
        """A line through points."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(flat, fill=fill, width=max(1, round(width * SCALE)), joint="curve")

    def dot(self, at: tuple[float, float], *, fill: str, radius: float = 3.0) -> None:
        """A dot."""
        x, y = at[0] * SCALE, at[1] * SCALE
        r = radius * SCALE
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def save(self, path: Path) -> None:
        """Write the file."""
        self.image.save(path, format="PNG", optimize=True)


class _Axes:
    """A panel: a rectangle with a linear or logarithmic height and places across."""

    def __init__(
        self, canvas: _Canvas, box: tuple[float, float, float, float], *, title: str, low: float, high: float, log: bool
    ) -> None:
        self._canvas = canvas
        self.left, self.top, self.right, self.bottom = box
        self._low, self._high, self._log = low, high, log
        canvas.text((self.left, self.top - 34), title, size=16)
        for value in _log_ticks(low, high) if log else _linear_ticks(high):
            y = self.y(value)
            canvas.line([(self.left, y), (self.right, y)], fill=GRID)
            canvas.text((self.left - 8, y), f"{value:,g}", size=12, fill=SOFT, anchor="rm")

    def y(self, value: float) -> float:
        """Where a value stands."""
        if self._log:
            share = (math.log(max(value, self._low)) - math.log(self._low)) / (
                math.log(self._high) - math.log(self._low)
            )
        else:
            share = (value - self._low) / (self._high - self._low)
        return self.bottom - share * (self.bottom - self.top)

    def x(self, share: float) -> float:
        """Where a share of the width stands."""
        return self.left + share * (self.right - self.left)

    def below(self, share: float, words: str) -> None:
        """A label under the panel."""
        self._canvas.line([(self.x(share), self.bottom), (self.x(share), self.bottom + 4)], fill=SOFT)
        self._canvas.text((self.x(share), self.bottom + 8), words, size=12, fill=SOFT, anchor="ma")

    def across(self, words: str) -> None:
        """What the width is."""
        self._canvas.text(((self.left + self.right) / 2, self.bottom + 28), words, size=12, fill=SOFT, anchor="ma")


def draw_load(path: Path, told: dict[str, Any], outcome: Outcome) -> None:
    """Latency by percentile beside the rate over time."""
    canvas = _Canvas()
    load = told["load"]
    how = f"{load['rate']:,g}/s offered" if load["rate"] else f"{load['in_flight']} in flight each"
    _head(
        canvas,
        f"fleetlm bench {told['bench']}: {told['rate_per_s']:,.0f} appends/s on disk",
        f"{told['loop']} loop, {load['connections']} connections, {how}, {load['sessions']} sessions,"
        f" {load['size_bytes']} bytes, {told['measured_s']:g} s",
        told,
    )
    _latencies(canvas, [("delivered", ORANGE, outcome.deliveries), ("acknowledged", BLUE, outcome.acks)])
    _over_time(canvas, told, outcome)
    canvas.save(path)


def _head(canvas: _Canvas, title: str, subtitle: str, told: dict[str, Any]) -> None:
    canvas.text((40, 24), title, size=24)
    canvas.text((40, 58), subtitle, size=14, fill=SOFT)
    origin = told["provenance"]
    synced = origin["fdatasync"]
    words = (
        f"{origin['at']}   commit {origin['commit']}   {origin['cpu']}, {origin['cores']} cores   Python"
        f" {origin['python']}   fdatasync p50 {synced['p50_ms'] if synced else '?'} ms"
    )
    canvas.text((40, HEIGHT - 30), words, size=12, fill=SOFT)


def _latencies(canvas: _Canvas, curves: list[tuple[str, str, array[float]]]) -> None:
    drawn = [(name, colour, sorted(values)) for name, colour, values in curves if values]
    if not drawn:
        return
    low = min(values[0] for _, _, values in drawn) * 1000
    high = max(values[-1] for _, _, values in drawn) * 1000
    axes = _Axes(
        canvas,
        (90, 140, 590, HEIGHT - 100),
        title="Latency, ms",
        low=low * 0.9,
        high=max(high * 1.1, low * 2),
        log=True,
    )
    span = -math.log10(1 - PERCENTILES[-1] / 100)
    for percent in PERCENTILES:
        axes.below(-math.log10(1 - percent / 100) / span, f"{percent:g}")
    axes.across("percentile: that many percent were no slower")
    for at, (name, colour, values) in enumerate(drawn):
        points: list[tuple[float, float]] = []
        for step in range(401):
            nines = span * step / 400
            rank = min(len(values) - 1, max(0, math.ceil(len(values) * (1 - 10**-nines)) - 1))
            points.append((axes.x(step / 400), axes.y(values[rank] * 1000)))
        # The first curve lies under the second one where they are the same.
        canvas.line(points, fill=colour, width=5.0 if at == 0 else 1.8)
        p50, p99 = (values[math.ceil(len(values) * share) - 1] * 1000 for share in (0.5, 0.99))
        words = f"{name}: p50 {p50:.2f}, p99 {p99:.2f}, max {values[-1] * 1000:.2f}"
        # Curves rise from left to right: the corner at the lower right is free.
        canvas.text((axes.right - 18, axes.bottom - 16 - at * 20), words, size=13, anchor="rm")
        canvas.dot((axes.right - 8, axes.bottom - 16 - at * 20), fill=colour, radius=4)


def _over_time(canvas: _Canvas, told: dict[str, Any], outcome: Outcome) -> None:
    ticks = max(1, int(told["measured_s"] * TICKS_PER_S))
    rates = [outcome.ticks.get(tick, 0) * TICKS_PER_S for tick in range(ticks)]
    offered = told["load"]["rate"]
    axes = _Axes(
        canvas,
        (700, 140, WIDTH - 40, HEIGHT - 100),
        title="Acknowledged appends a second",
        low=0.0,
        high=max(*rates, offered, 1.0) * 1.15,
        log=False,
    )
    seconds = told["measured_s"]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        axes.below(share, f"{seconds * share:.3g}")
    axes.across("seconds; one point a tenth of a second")
    if offered:
        canvas.line([(axes.left, axes.y(offered)), (axes.right, axes.y(offered))], fill=ORANGE, width=1.4)
        canvas.text((axes.right, axes.y(offered) - 6), "offered", size=12, fill=ORANGE, anchor="rb")
    points = [(axes.x((tick + 0.5) / ticks), axes.y(rate)) for tick, rate in enumerate(rates)]
    if len(points) > 1:
        canvas.line(points, fill=BLUE, width=2.0)


def draw_samples(path: Path, told: dict[str, Any]) -> None:
    """One dot a try, with the median as a line."""
    values: list[float] = told["samples"]
    canvas = _Canvas()
    _head(
        canvas,
        f"fleetlm bench {told['bench']}: the last of {told['sockets']:,} sockets",
        f"{told['appends']} appends of {told['size_bytes']} bytes, one after the other; until the last socket has it",
        told,
    )
    axes = _Axes(
        canvas, (90, 140, WIDTH - 40, HEIGHT - 100), title="Milliseconds", low=0.0, high=max(values) * 1.15, log=False
    )
    axes.across("appends in their order; the line is the median")
    middle = sorted(values)[math.ceil(len(values) / 2) - 1]
    canvas.line([(axes.left, axes.y(middle)), (axes.right, axes.y(middle))], fill=ORANGE, width=1.4)
    canvas.text((axes.right, axes.y(middle) - 6), f"p50 {middle:.2f}", size=12, fill=ORANGE, anchor="rb")
    for number, value in enumerate(values):
        canvas.dot((axes.x((number + 0.5) / len(values)), axes.y(value)), fill=BLUE)
    canvas.save(path)


def _log_ticks(low: float, high: float) -> list[float]:
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(begin, end + 1) for step in _STEPS]
    return [tick for tick in ticks if low <= tick <= high]


def _linear_ticks(high: float) -> list[float]:
    rough = high / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (*_STEPS, 10) if each * power >= rough)
    return [number * step for number in range(int(high / step) + 1)]

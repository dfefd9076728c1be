"""Draws jobs and pods over time as an SVG that can be read on a white page and on a black one.

python -m tools.chart FILE    80 minutes of work, as the real script decides (`make picture`
                              draws docs/replicas.svg with it)
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 760, 48, 12
LEGEND, TITLE, GAP, AXIS = 34, 16, 16, 34  # heights, as the two below
QUEUE, PODS_STRIP = 70, 110
# Middle tones, which stand out from a white page and from a black one.
INK, WAITING, WORKING, PODS = "#7d8590", "#d29922", "#8b949e", "#2f81f7"
TITLE_LENGTH = 80  # characters per line: capitals are wide

MINUTE, HOUR, DAY = 60, 3600, 86_400
TICKS = (10 * MINUTE, 30 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR, DAY, 2 * DAY, 7 * DAY, 28 * DAY)


class Point(NamedTuple):
    """What there is from `at` on, in Unix seconds. `pods` is None where nobody knows them."""

    at: float
    waiting: int
    busy: int
    pods: int | None


@dataclass(frozen=True)
class Panel:
    """One course of events. The last point holds until `end`; `limit` is MAX_REPLICAS."""

    points: Sequence[Point]
    end: float
    title: str = ""
    limit: int | None = None


@dataclass(frozen=True)
class Strip:
    """A vertical scale: `most` at the top of `height`, 0 at `bottom`."""

    bottom: float
    height: float
    most: int

    def y(self, number: float) -> str:
        return f"{self.bottom - number * self.height / self.most:.1f}"

    def grid(self, unit: str) -> Iterator[str]:
        step = round_step(self.most)
        for number in range(0, self.most + 1, step):
            y = float(self.y(number))
            yield (
                f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{INK}" stroke-opacity=".25"/>'
                + label(LEFT - 6, y + 4, str(number), "end")
            )
        middle = self.bottom - self.height / 2
        turned = f'transform="rotate(-90 12 {middle:.1f})"'
        yield label(12, middle, unit, "middle", more=turned)


@dataclass(frozen=True)
class Time:
    """The horizontal scale: minutes from the start or, beyond three hours, times in UTC."""

    start: float
    end: float

    def x(self, at: float) -> float:
        return LEFT + (at - self.start) * (WIDTH - LEFT - RIGHT) / (self.end - self.start)

    @property
    def tick(self) -> int:
        return next((one for one in TICKS if (self.end - self.start) / one <= 10), 365 * DAY)

    @property
    def by_the_clock(self) -> bool:
        return self.end - self.start > 3 * HOUR

    def ticks(self) -> Iterator[tuple[float, str]]:
        first = math.ceil(self.start / self.tick) * self.tick if self.by_the_clock else self.start
        for number in range(int((self.end - first) // self.tick) + 1):
            yield first + number * self.tick, self.text(first + number * self.tick)

    def text(self, at: float) -> str:
        if not self.by_the_clock:
            minutes = (at - self.start) / MINUTE
            return f"{minutes:.0f} min" if minutes else "0"
        when = datetime.fromtimestamp(at, UTC)
        return when.strftime("%H:%M") if at % DAY else f"{when:%a} {when.day} {when:%b}"

    def axis(self, top: float, bottom: float) -> Iterator[str]:
        for at, text in self.ticks():
            x = self.x(at)
            room = x + 4 * len(text) < WIDTH and x - 4 * len(text) > 0
            yield (
                f'<path d="M{x:.1f} {top}V{bottom + 4}" stroke="{INK}" stroke-opacity=".25"/>'
                + (label(x, bottom + 18, text, "middle") if room else "")
            )


def round_step(most: int) -> int:
    """The least of 1, 2, 5, 10, 20, ... that makes four steps or fewer."""
    power: int = 10 ** len(str(most))
    steps = [power // divisor for divisor in (1000, 500, 200, 100, 50, 20, 10, 5, 2)]
    return next(step for step in steps if step and most / step <= 4)


def label(
    x: float, y: float, text: str, anchor: str = "start", colour: str = INK, more: str = ""
) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}'.strip()
    return f'<text {where} fill="{colour}">{escape(text)}</text>'


def columns(points: Sequence[Point], time: Time) -> list[Point]:
    """One point a pixel, with the most that there was in its time."""
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(int(time.x(point.at)), []).append(point)
    return [
        Point(
            group[0].at,
            max(point.waiting for point in group),
            max(point.busy for point in group),
            max((point.pods for point in group if point.pods is not None), default=None),
        )
        for group in found.values()
    ]


def steps(values: Sequence[tuple[float, int]], end: float, time: Time, strip: Strip) -> str:
    """The path of a number that holds until the next one."""
    path, last = f"M{time.x(values[0][0]):.1f} {strip.y(values[0][1])}", values[0][1]
    for at, value in values:
        if value != last:
            path += f"H{time.x(at):.1f}V{strip.y(value)}"
            last = value
    return path + f"H{time.x(end):.1f}"


def area(values: Sequence[tuple[float, int]], end: float, time: Time, strip: Strip) -> str:
    base = f"V{strip.y(0)}H{time.x(values[0][0]):.1f}Z"
    return steps(values, end, time, strip) + base


def draw_panel(panel: Panel, top: float, time: Time, most: Point) -> Iterator[str]:
    queue = Strip(top + QUEUE, QUEUE, most.waiting)
    pods = Strip(queue.bottom + GAP + PODS_STRIP, PODS_STRIP, most.pods or most.busy)
    points = columns(panel.points, time)
    yield from queue.grid("jobs")
    yield from pods.grid("pods")
    yield from time.axis(top, pods.bottom)
    waiting = area([(p.at, p.waiting) for p in points], panel.end, time, queue)
    working = area([(p.at, p.busy) for p in points], panel.end, time, pods)
    yield f'<path d="{waiting}" fill="{WAITING}" fill-opacity=".8"/>'
    yield f'<path d="{working}" fill="{WORKING}" fill-opacity=".6"/>'
    known = [(p.at, p.pods) for p in points if p.pods is not None]
    if panel.limit is not None:
        line = f'd="M{LEFT} {pods.y(panel.limit)}H{WIDTH - RIGHT}" stroke="{PODS}"'
        yield f'<path {line} stroke-dasharray="2 4" stroke-opacity=".8"/>'
        text, y = f"MAX_REPLICAS={panel.limit}", float(pods.y(panel.limit)) - 5
        yield label(WIDTH - RIGHT, y, text, "end", PODS)
    if known:
        yield f'<path d="{steps(known, panel.end, time, pods)}" stroke="{PODS}" stroke-width="2"/>'


def draw(panels: Sequence[Panel], caption: str) -> str:
    """The panels one below the other, on the same scales: above the jobs that wait, below the
    pods, and those of them that work on a job."""
    every = [point for panel in panels for point in panel.points]
    limits = [panel.limit for panel in panels if panel.limit is not None]
    highest = max(max(point.pods or point.busy for point in every), *limits, 1)
    # A little more than the most, for the limit's label.
    most = Point(0, max(1, *(point.waiting for point in every)), 0, highest + 1 + highest // 5)
    start = min(point.at for point in every)
    time = Time(start, max(start + MINUTE, *(panel.end for panel in panels)))
    parts, top = [], float(LEGEND)
    for panel in panels:
        for line in textwrap.wrap(panel.title, TITLE_LENGTH):
            parts.append(label(LEFT, top + 8, line, more='font-weight="600"'))
            top += TITLE
        parts += draw_panel(panel, top, time, most)
        top += QUEUE + GAP + PODS_STRIP + AXIS
    keys = (("jobs waiting", WAITING), ("pods that work on a job", WORKING), ("all pods", PODS))
    for left, (text, colour) in zip((LEFT, LEFT + 120, LEFT + 310), keys, strict=True):
        mark = f'<rect x="{left}" y="8" width="12" height="12" rx="2" fill="{colour}"/>'
        parts.append(mark + label(left + 18, 18, text))
    if time.by_the_clock:
        parts.append(label(WIDTH - RIGHT, 18, "times in UTC", "end"))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" '
        f'width="{WIDTH}" height="{top:.0f}" role="img" aria-label="Pods following the queue" '
        'font-family="system-ui, sans-serif" font-size="12" fill="none">'
    )
    return "\n".join([head, f"<title>{escape(caption)}</title>", *parts, "</svg>"]) + "\n"


# ------------------------------------------------------------------------- the README's chart

MOST_PODS = 10
# Jobs that arrive, by minute, and how many minutes each takes: a trickle, a burst that fills the
# range, a pause shorter than the scale-down window, a second wave, silence.
ARRIVALS = {3: (2, 4), 10: (1, 3), 14: (16, 7), 18: (8, 6), 44: (6, 6), 48: (4, 8), 52: (2, 5)}
MINUTES = 80


def follow_the_queue() -> list[Point]:
    """What scaler.py, a process a minute, sees and decides in the demo's environment."""
    from tests.support.world import BUSY
    from tools.demo import working_world

    points: list[Point] = []
    with working_world(BUSY_FILTER=BUSY, MAX_REPLICAS=str(MOST_PODS)) as world:
        for minute in range(MINUTES):
            world.add_jobs(*ARRIVALS.get(minute, (0, 1)))
            run, _ = world.scale()
            world.work()
            if run.exit_code:
                raise SystemExit(f"a run failed: {run}")
            record = run.record
            seen = record["waiting"], record["busy"], record["replicas"]
            points.append(Point(minute * MINUTE, *seen))
        if world.killed:
            raise SystemExit(f"busy pods removed: {world.killed}")
    return points


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.chart", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    file: Path = parser.parse_args(argv).file
    caption = "Pods following the queue, as scaler.py decided minute by minute"
    panel = Panel(follow_the_queue(), MINUTES * MINUTE, limit=MOST_PODS)
    file.write_text(draw([panel], caption))
    print(f"{file}: {MINUTES} runs of scaler.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

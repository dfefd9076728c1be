"""`make simulate`: what other settings would have done with the jobs of some days.

    python -m tools.simulate examples/week.csv --try "MAX_REPLICAS=8"
    python -m tools.simulate --collection jobs --created createdAt --started startedAt \\
        --finished finishedAt --since 2026-01-05 --csv jobs.csv

The jobs arrive when they were created and take as long as they took. A pod is ready --pod-start
seconds after it was asked for, and works on one job at a time, the oldest first. The scaler looks
once a minute, or as POLLING_INTERVAL_SECONDS says, and every look decides by scaler.py's own
functions, from its own annotations. Looks, and jobs that change hands, take no time, and nothing
fails.

A scale-down removes the pods that scaler.py would choose. Without BUSY_FILTER it removes those that
Kubernetes would: pods that are not ready, then the newest. The job of a killed pod waits again at
once, starts over, and counts as waiting until it starts for the last time.

A simulation ends with the last job, but not before the jobs really ended, and at the latest a day
after that.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import scaler
from tools.chart import Panel, Point, draw

MINUTE, DAY = 60, 86_400
MOST_DAYS = 366


class Problem(Exception):
    """What the user has to correct first, a line for each mistake."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """When a job was created, started and finished, in Unix seconds, and where that was read."""

    created: float
    started: float
    finished: float
    where: str = ""

    @property
    def seconds(self) -> float:
        return self.finished - self.started


Names = tuple[str, str, str]  # of a job's three times: columns, or fields of a document


def parse_job(where: str, names: Names, values: Sequence[object]) -> Job:
    """Raises Problem with every mistake of this job."""
    times: list[float] = []
    problems: list[str] = []
    for name, value in zip(names, values, strict=True):
        try:
            times.append(parse_time(value))
        except ValueError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise Problem(f"{where}: {'; '.join(problems)}")
    created, started, finished = times
    job = Job(created, started, finished, where)
    if job.started < job.created:
        raise Problem(f"{where}: starts ({values[1]}) before it is created ({values[0]})")
    if job.finished < job.started:
        raise Problem(f"{where}: ends ({values[2]}) before it starts ({values[1]})")
    return job


def parse_time(value: object) -> float:
    """Unix seconds of a time as scaler.py reads times, or as Firestore stores them."""
    if isinstance(value, datetime):
        return value.timestamp()
    if value is None or value == "":
        raise ValueError("is missing")
    try:
        return scaler.read_time(str(value)).timestamp()
    except ValueError as error:
        raise ValueError(f"is {value!r}, {error}") from None


def read_csv(path: Path, names: Names) -> list[Job]:
    """Raises Problem with every mistake in the file, each with its line."""
    jobs: list[Job] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            places = find_columns(next(reader, []), names, f"{path}:1")
            for row in reader:
                if not row:
                    continue
                where, width = f"{path}:{reader.line_num}", len(places.all)
                if len(row) != width:
                    problems.append(f"{where}: {len(row)} cells, where line 1 has {width}")
                    continue
                cells = [row[place].strip() for place in places.wanted]
                try:
                    jobs.append(parse_job(where, names, cells))
                except Problem as problem:
                    problems.append(str(problem))
            end = reader.line_num + 1
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Problem(f"{path}: not text in UTF-8") from None
    except csv.Error as error:
        raise Problem(*problems, f"{path}:{reader.line_num}: not CSV: {error}") from None
    if problems:
        raise Problem(*problems)
    if not jobs:
        raise Problem(f"{path}:{end}: no jobs")
    return jobs


@dataclass(frozen=True)
class Columns:
    all: Sequence[str]
    wanted: Sequence[int]


def find_columns(header: Sequence[str], names: Names, where: str) -> Columns:
    found = [name.strip() for name in header]
    if not any(found):
        raise Problem(f"{where}: no column names, such as {','.join(names)}")
    problems = []
    for option, name in zip(("created", "started", "finished"), names, strict=True):
        if found.count(name) != 1:
            how = "no column" if name not in found else f"{found.count(name)} columns"
            there = ", ".join(found)
            problems.append(f"{where}: {how} {name} (--{option}); the columns are {there}")
    if problems:
        raise Problem(*problems)
    if others := [name for name in found if name not in names]:
        note(f"{where}: columns not used: {', '.join(others)}")
    return Columns(found, [found.index(name) for name in names])


def write_csv(path: Path, jobs: Iterable[Job]) -> None:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("created", "started", "finished"))
            for job in jobs:
                times = (job.created, job.started, job.finished)
                writer.writerow(datetime.fromtimestamp(at, UTC).isoformat() for at in times)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None


def check_span(jobs: Sequence[Job]) -> None:
    """One wrong date would have the scaler look for decades."""
    first = min(jobs, key=lambda job: job.created)
    last = max(jobs, key=lambda job: job.finished)
    days = (last.finished - first.created) / DAY
    if days > MOST_DAYS:
        there = f"{first.where}: created {days:.0f} days before the end of {last.where}"
        raise Problem(f"{there}: expected at most {MOST_DAYS} days")


# ---------------------------------------------------------------------------------- Firestore

PAGE = 1000


def read_firestore(
    settings: scaler.Settings, environ: Mapping[str, str], names: Names, since: datetime | None
) -> tuple[list[Job], list[str]]:
    """The finished jobs of QUEUE_COLLECTION, and a line for each that is not. Only reads."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.firestore import FieldFilter

    fields = [scaler.field_path(name) for name in names]
    client = scaler.open_firestore(settings, environ)
    jobs: list[Job] = []
    unfinished: list[str] = []
    problems: list[str] = []
    for path in settings.queue_collection:
        by_group = settings.queue_collection_group
        query: Any = client.collection_group(path) if by_group else client.collection(path)
        query = query.select(fields)
        if since:
            query = query.where(filter=FieldFilter(fields[0], ">=", since)).order_by(fields[0])
        try:
            for document in in_pages(query.order_by("__name__"), path):
                values = [value_at(document, name) for name in fields]
                try:
                    jobs.append(parse_job(document.reference.path, names, values))
                except Problem as problem:
                    (unfinished if None in values else problems).append(str(problem))
        except (GoogleAPIError, GoogleAuthError) as error:
            raise scaler.queue_failure(f"reading {path}", error) from error
    if problems:
        raise Problem(*problems)
    if not jobs:
        paths = ", ".join(settings.queue_collection)
        raise Problem(*unfinished, f"{paths}: no job with {', '.join(names)}")
    return jobs, unfinished


def in_pages(query: Any, path: str) -> Iterator[Any]:
    """The documents of a query, with a line about the progress after each page."""
    page, read = query.limit(PAGE), 0
    while True:
        documents = list(page.stream())
        read += len(documents)
        note(f"{path}: {read} documents read")
        yield from documents
        if len(documents) < PAGE:
            return
        page = query.start_after(documents[-1]).limit(PAGE)


def value_at(document: Any, path: str) -> object:
    try:
        return document.get(path)
    except KeyError:
        return None


# ----------------------------------------------------------------------------------- settings


def environment_of(cronjob: Path) -> dict[str, str]:
    """The variables of the container in a CronJob's manifest. Raises Problem."""
    try:
        documents = list(yaml.safe_load_all(cronjob.read_text(encoding="utf-8")))
        found = [one for one in documents if one and one.get("kind") == "CronJob"]
        if len(found) != 1:
            raise Problem(f"{cronjob}: {len(found)} CronJobs: expected 1")
        pod = found[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        entries = [(one["name"], one) for one in pod["containers"][0].get("env") or ()]
    except OSError as error:
        raise Problem(f"{cronjob}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Problem(f"{cronjob}: not YAML: {' '.join(str(error).split())}") from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise Problem(f"{cronjob}: not the manifest of a CronJob with a container") from None
    problems = []
    for name, entry in entries:
        if name in scaler.VARIABLES and not isinstance(entry.get("value"), str):
            problems.append(f"{cronjob}: {name}: expected a value in quotes")
    if problems:
        raise Problem(*problems)
    return {name: one["value"] for name, one in entries if isinstance(one.get("value"), str)}


CURRENT = "current settings"


def read_variants(base: Mapping[str, str], tries: Sequence[str]) -> dict[str, scaler.Settings]:
    """The settings as they are, and each variant by its name. Raises Problem."""
    base = {"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs", **base}
    for warning in scaler.misspelled(base):
        note(warning)
    environments, problems = {CURRENT: base}, []
    for text in tries:
        name = " ".join(text.split())
        try:
            if name in environments:
                raise Problem("given twice")
            environments[name] = {**base, **parse_try(text)}
        except Problem as problem:
            problems.append(f"--try {text!r}: {problem}")
    found = {}
    for name, environ in environments.items():
        try:
            found[name] = scaler.read_settings(environ)
        except scaler.Failure as failure:
            problems.append(f"{name}: {failure}")
    if problems:
        raise Problem(*problems)
    return found


def parse_try(text: str) -> dict[str, str]:
    """`A=1 B="2 3"` as a shell would read it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Problem(str(error)) from None
    if not words:
        raise Problem("expected settings, such as MAX_REPLICAS=8")
    found: dict[str, str] = {}
    problems = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in scaler.VARIABLES:
            guess = [*scaler.misspelled({name: value})] if equals else []
            problems += guess or [f"{word!r} is not a setting such as MAX_REPLICAS=8"]
        elif name in found:
            problems.append(f"{name} given twice")
        found[name] = value
    if problems:
        raise Problem("; ".join(problems))
    return found


# -------------------------------------------------------------------------- jobs on their pods


@dataclass
class Pod:
    number: int
    created: float
    ready: bool = False
    job: int | None = None  # the index of the one that it works on
    since: float = 0.0  # when it took it


class Workers:
    """Jobs and pods over time. `moment` is where time has come to.

    Whatever comes next for a pod, ready or the end of its job, is its one entry in `due`; that of a
    pod that was removed is passed over.
    """

    def __init__(self, jobs: Sequence[Job], pod_start: float, moment: float, pods: int) -> None:
        self.jobs, self.pod_start, self.moment = jobs, pod_start, moment
        self.pods: dict[int, Pod] = {}  # in the order of their creation
        self.waiting: list[int] = []  # a heap of indexes: the oldest first
        self.idle: list[int] = []  # a heap of numbers, those of removed pods among them
        self.due: list[tuple[float, int]] = []
        self.arrived = self.made = self.busy = self.done = self.killed = 0
        self.starts = [math.inf] * len(jobs)
        self.pod_seconds = self.busy_seconds = 0.0
        self.last_end = moment
        self.add(pods, 0)

    def add(self, number: int, pod_start: float) -> None:
        for _ in range(number):
            self.made += 1
            self.pods[self.made] = Pod(self.made, self.moment)
            heapq.heappush(self.due, (self.moment + pod_start, self.made))

    def scale(self, change: int, victims: Sequence[int]) -> None:
        self.add(change, self.pod_start)
        for number in victims:
            pod = self.pods.pop(number)
            self.pod_seconds += self.moment - pod.created
            if pod.job is not None:
                self.leave(pod, self.moment)
                heapq.heappush(self.waiting, pod.job)
                self.killed += 1
        self.advance(self.moment)

    def advance(self, until: float) -> None:
        """Let everything happen that is due by then."""
        while True:
            arrival = self.jobs[self.arrived].created if self.to_come else math.inf
            at = min(arrival, self.due[0][0] if self.due else math.inf)
            if at > until:
                break
            while self.to_come and self.jobs[self.arrived].created <= at:
                heapq.heappush(self.waiting, self.arrived)
                self.arrived += 1
            while self.due and self.due[0][0] <= at:
                pod = self.pods.get(heapq.heappop(self.due)[1])
                if pod:
                    self.free(pod, at)
            self.take_jobs(at)
        self.moment = until
        self.take_jobs(until)

    @property
    def to_come(self) -> bool:
        return self.arrived < len(self.jobs)

    @property
    def left(self) -> int:
        """Jobs that are not done yet."""
        return len(self.jobs) - self.done

    def free(self, pod: Pod, at: float) -> None:
        """The pod becomes ready, or is done with its job."""
        pod.ready = True
        if pod.job is not None:
            self.leave(pod, at)
            pod.job = None
            self.done += 1
            self.last_end = at
        heapq.heappush(self.idle, pod.number)

    def leave(self, pod: Pod, at: float) -> None:
        self.busy -= 1
        self.busy_seconds += at - pod.since

    def take_jobs(self, at: float) -> None:
        while self.waiting and self.idle:
            pod = self.pods.get(heapq.heappop(self.idle))
            if pod:
                pod.job = heapq.heappop(self.waiting)
                pod.since = self.starts[pod.job] = at
                self.busy += 1
                heapq.heappush(self.due, (at + self.jobs[pod.job].seconds, pod.number))

    def close(self) -> None:
        """Count the pods that are left, up to now."""
        for pod in self.pods.values():
            self.pod_seconds += self.moment - pod.created
            self.busy_seconds += self.moment - pod.since if pod.job is not None else 0

    def waits(self) -> list[float]:
        """Seconds until each job was taken; of one that never was, until now."""
        pairs = zip(self.jobs, self.starts, strict=True)
        return [min(start, self.moment) - job.created for job, start in pairs]


# ------------------------------------------------------------------------------- the scaler


@dataclass
class Scaler:
    """What scaler.py has on the Deployment, and its looks."""

    settings: scaler.Settings
    replicas: int
    annotations: dict[str, str] = field(default_factory=dict)

    def look(self, workers: Workers) -> tuple[scaler.Decision, list[int]]:
        """Decide as a look of scaler.py does and apply it: the decision, and the pods to remove."""
        settings, now = self.settings, datetime.fromtimestamp(workers.moment, UTC)
        state = scaler.parse_state(self.annotations, settings, now)
        limit, aware = settings.count_limit, settings.busy_filter is not None
        waiting = min(len(workers.waiting), limit)
        queue = scaler.QueueLength(waiting, waiting >= limit, workers.busy if aware else None)
        inputs = scaler.Inputs(now, self.replicas, state, queue, own_zero=True)
        decision, victims = scaler.decide(settings, inputs), list[int]()
        if decision.change < 0 and aware:
            decision, victims = self.scale_down(inputs, workers.pods.values())
        elif decision.change < 0:
            order = sorted(workers.pods.values(), key=lambda pod: (pod.ready, -pod.number))
            victims = [pod.number for pod in order[: -decision.change]]
        changed = {**decision.annotations, **scaler.rescale_annotations(decision, now)}
        both = {**self.annotations, **changed}
        self.annotations = {name: value for name, value in both.items() if value is not None}
        self.replicas += decision.change
        return decision, victims

    def scale_down(
        self, inputs: scaler.Inputs, pods: Iterable[Pod]
    ) -> tuple[scaler.Decision, list[int]]:
        """The decision that spares the busy pods, and the idle ones to remove."""
        live = tuple(to_scaler(pod) for pod in pods)
        busy = frozenset(str(pod.number) for pod in pods if pod.job is not None)
        cost = scaler.victim_cost(inputs.now, live, None)
        removable = scaler.removable(scaler.Fleet(live), self.replicas, busy, cost)
        decision = scaler.decide(self.settings, replace(inputs, removable=removable))
        victims = scaler.choose_victims(live, busy, -decision.change)
        return decision, [int(pod.name) for pod in victims]


def to_scaler(pod: Pod) -> scaler.Pod:
    rank = (True, 2 if pod.ready else 0, pod.ready)
    return scaler.Pod(str(pod.number), "", "", "", f"node-{pod.number}", rank)


def next_look(
    settings: scaler.Settings, offset: float, first: bool, wait: float | None
) -> float | None:
    """When a run looks again after a look at `offset`, in seconds from its start: at the next
    interval or at the end of a delay. After a minute the next run takes over."""
    interval, total = settings.polling_interval_seconds, settings.timeout_seconds
    dues = [] if interval is None else [interval * (offset // interval + 1)]
    soon = wait is not None and 0 < wait <= scaler.DELAY_SECONDS
    if wait is not None and soon and (first or interval is not None):
        dues.append(offset + wait)
    due = min(dues, default=math.inf)
    return due if due <= total - min(1.0, total / 10) and due < MINUTE else None


# ------------------------------------------------------------------------------- the outcome


@dataclass(frozen=True)
class Row:
    """What came of a variant; None where nobody knows."""

    variant: str
    mean_wait_seconds: float
    p95_wait_seconds: float
    max_wait_seconds: float
    pod_hours: float | None = None
    busy_share: float | None = None
    scale_ups: int | None = None
    scale_downs: int | None = None
    at_maximum_seconds: float | None = None
    killed: int | None = None


@dataclass(frozen=True)
class Outcome:
    row: Row
    panel: Panel
    unfinished: int = 0


def waits_row(variant: str, waits: Sequence[float]) -> Row:
    ordered = sorted(waits)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    mean = math.fsum(ordered) / len(ordered)
    return Row(variant, round(mean, 1), round(p95, 1), round(ordered[-1], 1))


def start_of(jobs: Sequence[Job]) -> int:
    """The full minute before the first job."""
    return int(min(job.created for job in jobs) // MINUTE * MINUTE)


def what_happened(jobs: Sequence[Job]) -> Outcome:
    """The row and the panel of the jobs as they are in the file; nobody noted the pods."""
    changes: dict[float, tuple[int, int]] = {}
    for job in jobs:
        for at, waiting, busy in ((job.created, 1, 0), (job.started, -1, 1), (job.finished, 0, -1)):
            before = changes.get(at, (0, 0))
            changes[at] = before[0] + waiting, before[1] + busy
    points, waiting, busy = [Point(start_of(jobs), 0, 0, None)], 0, 0
    for at, change in sorted(changes.items()):
        waiting, busy = waiting + change[0], busy + change[1]
        points.append(Point(at, waiting, busy, None))
    row = waits_row("what happened", [job.started - job.created for job in jobs])
    return Outcome(row, Panel(points, points[-1].at, row.variant))


def simulate(
    name: str, settings: scaler.Settings, jobs: Sequence[Job], pod_start: float
) -> Outcome:
    """One variant, from the minute of the first job on."""
    jobs = sorted(jobs, key=lambda job: job.created)
    start, end = start_of(jobs), max(job.finished for job in jobs)
    first = settings.minimum(datetime.fromtimestamp(start, UTC))[0]
    workers = Workers(jobs, pod_start, start, first)
    scales = Scaler(settings, first)
    points: list[Point] = []
    changes: list[int] = []
    minute: float = start
    at: float | None = start
    while at is not None:
        workers.advance(at)
        if at > end and not workers.left:
            workers.moment = max(end, workers.last_end)
            break
        decision, victims = scales.look(workers)
        workers.scale(decision.change, victims)
        changes.append(decision.change)
        points.append(Point(at, len(workers.waiting), workers.busy, scales.replicas))
        offset = next_look(settings, at - minute, at == minute, decision.wait)
        if offset is None:
            minute, offset = minute + MINUTE, 0
        at = minute + offset if minute + offset <= end + DAY else None
    workers.close()
    row = replace(
        waits_row(name, workers.waits()),
        pod_hours=round(workers.pod_seconds / 3600, 2),
        busy_share=workers.pod_seconds and round(workers.busy_seconds / workers.pod_seconds, 4),
        scale_ups=sum(change > 0 for change in changes),
        scale_downs=sum(change < 0 for change in changes),
        at_maximum_seconds=round(time_at(points, settings.max_replicas, workers.moment), 1),
        killed=workers.killed,
    )
    return Outcome(row, Panel(points, workers.moment, name, settings.max_replicas), workers.left)


def time_at(points: Sequence[Point], replicas: int, end: float) -> float:
    """Seconds with at least so many pods."""
    ends = [*(point.at for point in points[1:]), end]
    held = zip(points, ends, strict=True)
    return sum(until - point.at for point, until in held if (point.pods or 0) >= replicas)


# -------------------------------------------------------------------------------- the output


def clock_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "mean_wait_seconds": ("mean wait", clock_time),
    "p95_wait_seconds": ("95%", clock_time),
    "max_wait_seconds": ("longest", clock_time),
    "pod_hours": ("pod-hours", "{:.1f}".format),
    "busy_share": ("worked", "{:.0%}".format),
    "scale_ups": ("ups", str),
    "scale_downs": ("downs", str),
    "at_maximum_seconds": ("at maximum", clock_time),
    "killed": ("killed", str),
    "variant": ("variant", str),
}


def table(rows: Sequence[Row]) -> str:
    cells = [[title for title, _ in COLUMNS.values()]]
    for row in rows:
        values = asdict(row)
        shown = [(values[name], show) for name, (_, show) in COLUMNS.items()]
        cells.append(["-" if value is None else show(value) for value, show in shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # The variant comes last, as its name may be long.
    return "\n".join(
        "  ".join([*(map(str.rjust, numbers, widths)), variant]) for *numbers, variant in cells
    )


def as_json(row: Row) -> str:
    def camel(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(map(str.capitalize, others))

    return json.dumps({camel(name): value for name, value in asdict(row).items()})


# -------------------------------------------------------------------------------------- main


def start_seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= DAY:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected seconds from 0 to {DAY}")


def since(text: str) -> datetime:
    try:
        return scaler.read_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("jobs", nargs="?", type=Path, metavar="FILE", help="the jobs, as CSV with a header line")
    add("--collection", metavar="PATH", help="read the jobs from this Firestore collection instead")
    for name in ("created", "started", "finished"):
        add(f"--{name}", metavar="NAME", default=name, help=f"column or field (default {name})")
    add(
        "--since",
        type=since,
        metavar="TIME",
        help="with --collection: jobs created then or later only",
    )
    add("--csv", type=Path, metavar="FILE", help="with --collection: write the jobs to this file")
    add("--cronjob", type=Path, metavar="FILE", help="settings of this manifest; else those of "
        "the environment")  # fmt: skip
    add("--try", dest="tries", action="append", default=[], metavar="SETTINGS",
        help='other settings, as "MAX_REPLICAS=8 JOBS_PER_POD=2"; any number of times')  # fmt: skip
    add(
        "--pod-start",
        type=start_seconds,
        default=30,
        metavar="SECONDS",
        help="until a new pod is ready (default 30)",
    )
    add("--json", action="store_true", help="print a JSON object per row")
    add("--svg", type=Path, metavar="FILE", help="draw the jobs and pods over time")
    options = parser.parse_args(argv)
    if (options.jobs is None) is (options.collection is None):
        parser.error("expected a file of jobs or --collection")
    if options.collection is None and (options.csv or options.since):
        parser.error("--csv and --since go with --collection")
    names = (options.created, options.started, options.finished)
    if len(set(names)) < 3:
        parser.error(f"expected three names, not {', '.join(names)}")
    return options


def read_jobs(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Job]:
    names = (options.created, options.started, options.finished)
    if options.jobs:
        return read_csv(options.jobs, names)
    queue = {"DEPLOYMENT": "worker", **environ, "QUEUE_COLLECTION": options.collection}
    settings = scaler.read_settings(queue)
    jobs, unfinished = read_firestore(settings, queue, names, options.since)
    for line in unfinished:
        note(f"skipped: {line}")
    if options.csv:
        write_csv(options.csv, jobs)
    return jobs


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    base = environment_of(options.cronjob) if options.cronjob else environ
    variants = read_variants(base, options.tries)
    jobs = read_jobs(options, base)
    check_span(jobs)
    outcomes = [what_happened(jobs)]
    for name, settings in variants.items():
        outcome = simulate(name, settings, jobs, options.pod_start)
        outcomes.append(outcome)
        if outcome.unfinished:
            note(f"{name}: stopped with {outcome.unfinished} of {len(jobs)} jobs not finished")
    rows = [outcome.row for outcome in outcomes]
    print("\n".join(map(as_json, rows)) if options.json else table(rows))
    if options.svg:
        caption = "What other settings would have done with the jobs"
        chart = draw([outcome.panel for outcome in outcomes], caption)
        try:
            options.svg.write_text(chart, encoding="utf-8")
        except OSError as error:
            raise Problem(f"{options.svg}: {error.strerror}") from None


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    options = parse_arguments(argv)
    try:
        run(options, environ)
    except Problem as problem:
        note(str(problem))
        return 2
    except scaler.Failure as failure:
        note("; ".join(filter(None, (str(failure), failure.advice))))
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))

#!/usr/bin/env python3
"""queue-scaler: keeps the pods of one Kubernetes Deployment in step with a Firestore job queue.

A CronJob starts this script every minute. It reads the length of the queue and what the last
runs left in the Deployment's annotations, decides, sets `spec.replicas`, says why, and exits:

    environment ──▶ Settings ───────────────┐
    Deployment ───▶ replicas, annotations ──┤
    Firestore ────▶ waiting, busy ──────────┼──▶ decide() ──▶ apply ──▶ report ──▶ exit code
    clock ────────▶ now ────────────────────┘    (pure)

This is one look. With POLLING_INTERVAL_SECONDS a run looks again and again until its time is up.
`scaler.py --help` lists the settings. Exit codes: 0, the run did its work; 1, the queue or the
cluster did not answer and nothing was shrunk; 2, a person has to change something first.
"""

# ruff: noqa: E402 - the signals come before all other imports
from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
if __name__ == "__main__":
    # First of all: process 1 of a container has no default handlers, so that a signal that is not
    # blocked yet would be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

import gc
import json
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

    from google.cloud.firestore import Client
    from kubernetes.client import ApiClient
    from tenacity import Retrying

__version__ = "0.2.0"

# fmt: off
Reason = Literal[
    "ScaledUp", "ScaledDown", "AtTarget", "ScaleUpCooldown", "ScaleDownCooldown",
    "ScaleUpStabilized", "ScaleDownStabilized", "ScaleUpDisabled", "ScaleDownDisabled",
    "WorkersBusy", "Paused", "ScalingDisabled", "TooFewReplicas", "TooManyReplicas", "Fallback",
    "QueueUnavailable", "ClusterUnavailable", "InvalidSettings", "DeploymentNotFound", "Forbidden",
]
# fmt: on
T = TypeVar("T")

FIELD_MANAGER = "queue-scaler"
ANNOTATION = "queue-scaler/"
LAST_SCALE_TIME = ANNOTATION + "last-scale-time"
LAST_SCALE = ANNOTATION + "last-scale"
RECOMMENDATIONS = ANNOTATION + "recommendations"
FAILING_SINCE = ANNOTATION + "queue-failing-since"
PAUSED = ANNOTATION + "paused"
PAUSED_REPLICAS = ANNOTATION + "paused-replicas"
PAUSED_SCALE_IN = ANNOTATION + "paused-scale-in"
PAUSED_SCALE_OUT = ANNOTATION + "paused-scale-out"
PAUSED_UNTIL = ANNOTATION + "paused-until"
PAUSES = frozenset((PAUSED, PAUSED_REPLICAS, PAUSED_SCALE_IN, PAUSED_SCALE_OUT))
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
INT32_MAX = 2**31 - 1  # the most that Kubernetes takes for replicas, and Firestore for a limit


class Failure(Exception):
    """Why a look ends without the change it wanted: a reason, a sentence for people, an exit code.

    `transient`: it is worth another try before the deadline, not before `retry_after` seconds have
    passed. `status` is the API server's HTTP status. `read_again`: the Deployment changed since it
    was read, or may have been changed by us.
    """

    status, retry_after, read_again = 0, 0.0, False

    def __init__(
        self, reason: Reason, message: str, exit_code: int = 1, transient: bool = True
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.exit_code, self.transient = exit_code, transient and exit_code == 1


class QueueFailure(Failure):
    """The queue could not be read."""


# ---------------------------------------------------------------------------------- settings

Filter = tuple[str, str, Any]  # field, operator, value, in the words of a Firestore query
Parser = Callable[[str], Any]  # raises ValueError, which says what it expected

# The web's spelling, and the Python client's; people copy from both.
ARRAY = ("array-contains", "array-contains-any", "array_contains", "array_contains_any")
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not-in", *ARRAY)
LIST_OPERATORS = {"in": 30, "not-in": 10, "array_contains_any": 30}
MAP_DEPTH = 20  # how deep Firestore lets values be nested
SEGMENT = r"[^/\s](?:[^/]*[^/\s])?"  # of a collection's path
# Of a field's path: as the API takes it, or else without a space around it, which would match
# nothing, for ever.
FIELD = r"([A-Za-z_][A-Za-z_0-9]*(?![^.])|`(?:[^`\\]|\\.)+`)|[^\s.`](?:[^.`]*[^\s.`])?"
FIELD_PATH = rf"(?:{FIELD})(?:\.(?:{FIELD}))*"
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY, TIME = "|".join(WEEKDAYS), r"(?:[01]\d|2[0-3]):[0-5]\d"
SCHEDULED = rf"(?ai)(\d{{1,10}}) ({DAY})(?:-({DAY}))? ({TIME})-(?!\4)(24:00|{TIME}) (\S+)"


def quoted(value: object) -> str:
    """A value as an error shows it: quoted, and cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def matching(pattern: str, expected: str, convert: Parser = str) -> Parser:
    """A parser of text that has to match a pattern as a whole."""

    def parse(raw: str) -> Any:
        if not re.fullmatch(pattern, raw):
            raise ValueError(f"expected {expected}")
        return convert(raw)

    return parse


def bounded_integer(least: int, most: int, unit: str) -> Parser:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", raw) or not least <= int(raw) <= most:
            raise ValueError(f"expected a whole number of {unit} from {least} to {most}")
        return int(raw)

    return parse


def api_field_path(raw: str) -> str:
    """A field's path with quotes where the API needs them and people leave them out."""
    return re.sub(FIELD, lambda part: part[1] or "`" + part[0].replace("\\", r"\\") + "`", raw)


non_empty = matching(r"(?s).+", "a name, not an empty one")
object_name = matching(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    "a Kubernetes name: lower-case letters, digits, '-' and '.'",
)
collection = matching(
    rf"/*{SEGMENT}(?:/{SEGMENT}/{SEGMENT})*/*",
    "a collection path such as jobs or tenants/acme/jobs: an odd number of segments, none of them "
    "empty, no space around one",
    lambda raw: raw.strip("/"),
)
field_path = matching(
    FIELD_PATH,
    "the name of a field, such as status or worker.pod, with no empty part and no space around one",
    api_field_path,
)
boolean = matching("(?i)true|false", "true or false", lambda raw: raw.lower() == "true")
level = matching("(?i)debug|info|warning|error", "DEBUG, INFO, WARNING or ERROR")
line_format = matching("(?i)text|json", "text or json")
step = matching(r"[0-9]{1,9}%?", "a number of pods such as 2, or a percentage such as 50%")
replica_count = bounded_integer(0, INT32_MAX, "pods")
positive = bounded_integer(1, INT32_MAX, "pods or jobs")
seconds = bounded_integer(0, 31_536_000, "seconds")
window_seconds = bounded_integer(0, 3600, "seconds")  # the HPA's API takes no longer ones
budget_seconds = bounded_integer(1, 3600, "seconds")


def filters(raw: str) -> tuple[Filter, ...]:
    form = 'expected a JSON list of [field, op, value], such as [["status", "==", "waiting"]]'
    try:
        triples = json.loads(raw)
        if not isinstance(triples, list):
            raise ValueError("this is not a list")
        return tuple(parse_filter(triple) for triple in triples)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{form}; this is not JSON") from None
    except ValueError as error:
        raise ValueError(f"{form}; {error}") from None


def parse_filter(triple: object) -> Filter:
    if not (isinstance(triple, list) and len(triple) == 3):
        raise ValueError(f"{quoted(triple)} is not such a triple")
    name, op, value = triple
    if not (isinstance(name, str) and re.fullmatch(FIELD_PATH, name)):
        raise ValueError(f"{quoted(name)} is not a field path: no empty part, no space around one")
    if op not in OPERATORS:
        raise ValueError(f"{quoted(op)} is not one of the operators {', '.join(OPERATORS)}")
    op = op.replace("array-", "array_").replace("-any", "_any")
    most = LIST_OPERATORS.get(op)
    if most and not (isinstance(value, list) and 1 <= len(value) <= most):
        raise ValueError(f"{op} takes a list of 1 to {most} values, not {quoted(value)}")
    if op not in ("==", "!=") and (value is None or value != value):
        raise ValueError(f"null goes with == and != only, not with {op}")
    if not encodable(value):
        limits = f"at most 64 bits a number, text is Unicode, nested at most {MAP_DEPTH} deep"
        raise ValueError(f"{quoted(value)} cannot be sent: {limits}")
    return api_field_path(name), op, value


def encodable(value: object, depth: int = 0) -> bool:
    """Whether a value from JSON has a form in Firestore."""
    if isinstance(value, list | dict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return depth < MAP_DEPTH and all(encodable(one, depth + 1) for one in inner)
    if isinstance(value, str):
        return not re.search(r"[\ud800-\udfff]", value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


@dataclass(frozen=True)
class ScheduledMinimum:
    """Hours of the week with a higher minimum, in pods. `days` count from a Monday (0), `begin` and
    `end` are minutes of the day; hours past midnight belong to the day on which they begin."""

    text: str
    replicas: int
    days: range
    begin: int
    end: int
    timezone: tzinfo

    def in_force(self, now: datetime) -> bool:
        local, day, week = now.astimezone(self.timezone), 24 * 60, 7 * 24 * 60
        minute = local.weekday() * day + local.hour * 60 + local.minute
        length = (self.end - self.begin) % day or day
        return any((minute - start * day - self.begin) % week < length for start in self.days)


def scheduled_minimums(raw: str) -> tuple[ScheduledMinimum, ...]:
    """Hours in the syntax of kube-downscaler, each with its number of pods in front."""
    return tuple(scheduled_minimum(" ".join(part.split())) for part in raw.split(";"))


def scheduled_minimum(text: str) -> ScheduledMinimum:
    from zoneinfo import ZoneInfo  # for those who use it: every import is paid 1,440 times a day

    found = re.fullmatch(SCHEDULED, text)
    if not found:
        form = "expected PODS DAYS HOURS TIMEZONE, such as 5 Mon-Fri 07:30-20:00 Asia/Seoul"
        raise ValueError(f"{quoted(text)}: {form}, hours from 00:00 to 24:00")
    replicas, first, last, begin, end, zone = found.groups()
    since, until = WEEKDAYS.index(first.lower()), WEEKDAYS.index((last or first).lower())
    days = range(since, since + (until - since) % 7 + 1)
    minutes = [int(time[:2]) * 60 + int(time[3:]) for time in (begin, end)]
    try:
        return ScheduledMinimum(text, int(replicas), days, minutes[0], minutes[1], ZoneInfo(zone))
    except (KeyError, ValueError, OSError):  # unknown, no name at all, a directory of zones
        raise ValueError(f"{quoted(zone)}: expected a time zone, as Asia/Seoul or UTC") from None


REQUIRED = "required"


def setting(parse: Parser, default: str | None, meaning: str, shown: str = "") -> Any:
    """A field of Settings, read from the variable of the same name in upper case.

    `default` is written as the variable would be, None where there is none; `shown` says for
    people what holds then.
    """
    shown = default if default is not None else shown
    return field(metadata={"parse": parse, "default": default, "meaning": meaning, "shown": shown})


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Its fields, in order, are the table of `--help`."""

    # fmt: off
    deployment: str = setting(object_name, None, "name of the Deployment to scale", REQUIRED)
    namespace: str | None = setting(object_name, None, "its namespace",
        "the pod's own; outside a cluster, the kubeconfig context's")
    firestore_project: str | None = setting(non_empty, None, "Google Cloud project",
        "from the credentials")
    firestore_database: str = setting(non_empty, "(default)", "database id")
    queue_collection: str = setting(collection, None,
        "collection path, such as jobs or tenants/acme/jobs, one document a job", REQUIRED)
    queue_collection_group: bool = setting(boolean, "false",
        "true: count every collection of that id, wherever it lies")
    waiting_filter: tuple[Filter, ...] = setting(filters, '[["status", "==", "waiting"]]',
        "JSON list of Firestore filters [field, op, value], all of which a waiting job meets; "
        "[] counts every document")
    busy_filter: tuple[Filter, ...] | None = setting(filters, None,
        "the same for a job that a pod is working on", "unset: not busy-aware")
    busy_pod_field: str = setting(field_path, "assignedPodId",
        "field of a job's document that holds the name of its pod")
    min_replicas: int = setting(replica_count, "1",
        "lower end of the range, in pods; 0 scales to zero")
    max_replicas: int = setting(positive, "3", "upper end of the range, in pods")
    scheduled_min_replicas: tuple[ScheduledMinimum, ...] | None = setting(scheduled_minimums, None,
        "hours with a higher minimum, separated by ;, each PODS DAYS HOURS TIMEZONE, such as "
        "5 Mon-Fri 07:30-20:00 Asia/Seoul", "unset")
    jobs_per_pod: int = setting(positive, "1", "target jobs a pod, waiting and busy together")
    scale_up_cooldown_seconds: int = setting(seconds, "120",
        "least time from a scale-up to the next scale-up")
    scale_down_cooldown_seconds: int = setting(seconds, "300",
        "least time from any scale to a scale-down")
    scale_up_stabilization_seconds: int = setting(window_seconds, "0",
        "window as in the HPA's behavior.scaleUp, at most 3600")
    scale_down_stabilization_seconds: int = setting(window_seconds, "300",
        "window as in the HPA's behavior.scaleDown, at most 3600")
    scale_up_step: str | None = setting(step, None,
        "most pods added in one scale, as 2 or 50%; 0 switches scale-up off", "unset: no limit")
    scale_down_step: str | None = setting(step, None,
        "most pods removed in one scale, as 2 or 50%; 0 switches scale-down off", "unset: no limit")
    fallback_replicas: int | None = setting(replica_count, None,
        "floor held when the queue stays unreadable; it only ever adds pods", "unset: hold")
    fallback_after_seconds: int = setting(seconds, "180", "how long unreadable before that")
    polling_interval_seconds: int | None = setting(seconds, None,
        "look again every so many seconds, 1 or more and less than TIMEOUT_SECONDS",
        "unset: one look a run")
    timeout_seconds: int = setting(budget_seconds, "45",
        "budget of the whole run, retries and looks included")
    dry_run: bool = setting(boolean, "false",
        "decide and report, change nothing (--dry-run does the same)")
    log_level: str = setting(level, "INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: str = setting(line_format, "text",
        "json: one JSON object a line, with severity and message as Cloud Logging reads them")
    termination_log: str = setting(non_empty, "/dev/termination-log",
        "where the result record goes; the default is written only where it exists (in a pod), "
        "a path that was set is created")
    # fmt: on

    @property
    def count_limit(self) -> int:
        """The most jobs worth counting: a billed read covers 1,000 index entries, and more than
        fill the range change nothing."""
        return min(max(1000, self.max_replicas * self.jobs_per_pod), INT32_MAX)

    def minimum(self, now: datetime) -> tuple[int, str]:
        """The minimum in force, in pods, and the setting that it comes from, as people wrote it."""
        least = (self.min_replicas, f"MIN_REPLICAS={self.min_replicas}")
        for scheduled in self.scheduled_min_replicas or ():
            if scheduled.replicas > least[0] and scheduled.in_force(now):
                least = (scheduled.replicas, f"SCHEDULED_MIN_REPLICAS={scheduled.text}")
        return least


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Parse and check every variable.

    Raises a Failure that names all mistakes at once: variable, value found, what is accepted.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in fields(Settings):
        variable, default = item.name.upper(), item.metadata["default"]
        required = item.metadata["shown"] == REQUIRED
        raw = environ.get(variable, default)
        try:
            if raw is None and required:
                problems.append(f"{variable} is not set: expected the {item.metadata['meaning']}")
            elif raw is None or (raw == "" and default is None and not required):
                values[item.name] = None
            elif not encodable(raw):
                raise ValueError("expected text in UTF-8")
            else:
                values[item.name] = item.metadata["parse"](raw.strip())
        except ValueError as error:
            problems.append(f"{variable}={quoted(raw)}: {error}")
    problems += contradictions(values)
    if problems:
        raise Failure("InvalidSettings", "; ".join(problems), exit_code=2)
    return Settings(**values)


def contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """The mistakes that show only when settings are held against each other. `values` lacks those
    that could not be parsed."""
    most, timeout = values.get("max_replicas"), values.get("timeout_seconds")
    counts = [(name, values.get(name.lower())) for name in ("MIN_REPLICAS", "FALLBACK_REPLICAS")]
    for scheduled in values.get("scheduled_min_replicas") or ():
        counts.append((f"SCHEDULED_MIN_REPLICAS: {scheduled.text!r}: PODS", scheduled.replicas))
    for name, count in counts:
        if count is not None and most is not None and count > most:
            yield f"{name}='{count}': expected no more than MAX_REPLICAS, which is '{most}'"
    interval = values.get("polling_interval_seconds")
    if interval is not None and timeout is not None and not 1 <= interval < timeout:
        expected = f"1 or more, and less than TIMEOUT_SECONDS, which is '{timeout}'"
        yield f"POLLING_INTERVAL_SECONDS='{interval}': expected {expected}"
    path = values.get("queue_collection") or ""
    if values.get("queue_collection_group") and "/" in path:
        expected = f"the bare id of the collections, such as {path.rsplit('/', 1)[-1]}"
        reason = "QUEUE_COLLECTION_GROUP is true"
        yield f"QUEUE_COLLECTION={quoted(path)}: expected {expected}, where {reason}"
    if any(op == "not-in" for _, op, _ in values.get("busy_filter") or ()):
        yield (
            "BUSY_FILTER: expected no not-in, which Firestore cannot combine with the in over "
            "the pods' names; say which values are busy instead"
        )


def misspelled(environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each variable that is one of ours but for a letter or two: it would be ignored
    without a word."""
    from difflib import get_close_matches

    ours = {item.name.upper() for item in fields(Settings)}
    for name in sorted(environ.keys() - ours):
        for known in get_close_matches(name.upper(), ours, 1, cutoff=0.85):
            yield f"{name} is not a variable of the scaler: is {known} meant?"


# ---------------------------------------------------------------------------------- decision

Recommendation = tuple[int, int]  # when, in Unix seconds, and how many pods
Hold = tuple[Reason, str]  # why the replicas stay, and the end of the sentence that says so
BUSY_COST = INT32_MAX


@dataclass(frozen=True)
class QueueLength:
    """What was read of the queue, in jobs. `busy` is None where nobody asked."""

    waiting: int
    capped: bool = False
    busy: int | None = None

    def __str__(self) -> str:
        waiting = f"{self.waiting} or more" if self.capped else str(self.waiting)
        jobs = "job" if waiting == "1" else "jobs"
        return f"{waiting} {jobs} waiting" + ("" if self.busy is None else f", {self.busy} busy")


@dataclass(frozen=True)
class Pod:
    """A live pod. `deletion_rank` orders pods as the ReplicaSet controller does before it looks at
    deletion costs: those that sort first are removed first."""

    name: str
    owner: str
    deletion_rank: tuple[bool, int, bool]
    deletion_cost: int


def pods(number: int) -> str:
    return "1 pod" if number == 1 else f"{number} pods"


def read_time(value: str) -> datetime:
    """A time as a person types it: RFC 3339 with any offset and fraction, or Unix seconds.

    One without an offset counts as UTC. Eight digits are a date, as in 20260101. Raises ValueError.
    """
    try:
        if re.fullmatch(r"\s*\d{9,}(\.\d+)?\s*", value):
            return datetime.fromtimestamp(float(value), UTC)
        when = datetime.fromisoformat(value.strip().upper())
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("not a time such as 2026-01-01T00:00:00Z or 1767225600") from None


def write_time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_history(value: str) -> tuple[Recommendation, ...]:
    """The inverse of `write_history`. Raises ValueError."""
    if not re.fullmatch(r"\s*(\d{1,12}:\d{1,10}\s+)*\d{1,12}:\d{1,10}\s*", value):
        raise ValueError("not a history such as '1767225600:3 1767225660:1', so it starts afresh")
    pairs = (word.split(":") for word in value.split())
    return tuple((int(at), int(replicas)) for at, replicas in pairs)


def write_history(entries: Iterable[Recommendation]) -> str | None:
    return " ".join(f"{at}:{replicas}" for at, replicas in sorted(entries)) or None


def read_pause(value: str) -> bool:
    word = value.strip().lower()
    if word not in ("true", "t", "1", "false", "f", "0"):
        raise ValueError("not true or false: it holds")
    return word in ("true", "t", "1")


def annotation(parse: Parser, default: Any = None) -> Any:
    """A field of State, read from our annotation of the same name."""
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True)
class State:
    """What the Deployment's annotations say. `last_scale` is the direction, if it is "up" or
    "down". `warnings` names each value that does not count."""

    last_scale_time: datetime | None = annotation(read_time)
    last_scale: str | None = annotation(lambda value: value.strip().partition(" ")[0])
    recommendations: tuple[Recommendation, ...] = annotation(read_history, ())
    queue_failing_since: datetime | None = annotation(read_time)
    paused_until: datetime | None = annotation(read_time)  # read before the pauses that it ends
    paused: bool = annotation(read_pause, False)
    paused_scale_in: bool = annotation(read_pause, False)
    paused_scale_out: bool = annotation(read_pause, False)
    paused_replicas: int | None = annotation(replica_count)
    warnings: tuple[str, ...] = ()

    @property
    def until(self) -> str:
        return f" until {write_time(self.paused_until)}" if self.paused_until else ""


def parse_state(
    annotations: Mapping[str, str],
    settings: Settings,
    now: datetime,
    rolled_back: frozenset[str] = frozenset(),
) -> State:
    """Read our annotations. A value that cannot be read is warned about and counts as absent,
    but for a pause: whoever wrote one wanted to pause (KEDA reads it so, too).

    `rolled_back` are those that a `kubectl rollout undo` put back: they are not carried out. A
    pause among them holds, with the number of pods that is there.
    """
    cooldowns = settings.scale_up_cooldown_seconds, settings.scale_down_cooldown_seconds
    latest = now + timedelta(seconds=max(cooldowns))
    found: dict[str, Any] = {}
    warnings = []
    for item in fields(State):
        name, parse = ANNOTATION + item.name.replace("_", "-"), item.metadata.get("parse")
        over = name in PAUSES and "paused_until" in found and now >= found["paused_until"]
        if over or parse is None or name not in annotations:
            continue
        value = annotations[name]
        try:
            if name in rolled_back:
                holds = "a pause holds" if parse is read_pause else "is not carried out"
                advice = "; delete it, and set it again if it is meant" if name in PAUSES else ""
                raise ValueError(f"came back with a kubectl rollout undo, and {holds}{advice}")
            parsed = parse(value)
            if name in (LAST_SCALE_TIME, FAILING_SINCE) and parsed > latest:
                raise ValueError("further ahead than the longest cooldown, so it counts as absent")
            found[item.name] = parsed
        except ValueError as error:
            warnings.append(f"{name}={quoted(value)}: {error}")
            if name in PAUSES:
                found["paused" if name == PAUSED_REPLICAS else item.name] = True
    return State(**found, warnings=tuple(warnings))


@dataclass(frozen=True)
class Inputs:
    """All that a decision rests on.

    `current` is spec.replicas, in pods; `own_zero` whether a 0 there was set by this scaler.
    `busy_floor` is the least number of pods that costs no busy one, None where it was not read,
    and `busy_because` says why nothing can go.
    """

    now: datetime
    current: int
    state: State = State()
    queue: QueueLength | None = None
    busy_floor: int | None = None
    busy_because: str = ""
    own_zero: bool = False


@dataclass(frozen=True)
class Decision:
    """How many replicas the Deployment gets and why; with names and times, the result record.

    `replicas` is None where nobody knows what the Deployment has now, `desired` (the
    recommendation within the range) and `queue` where the queue was not read. `annotations` are
    those to write: None removes one, and those not named stay as they are.
    """

    replicas: int | None
    reason: Reason
    message: str
    current: int | None = None
    desired: int | None = None
    queue: QueueLength | None = None
    annotations: Mapping[str, str | None] = field(default_factory=dict)
    exit_code: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def change(self) -> int:
        """Pods added, or removed where it is below 0."""
        if self.replicas is None or self.current is None:
            return 0
        return self.replicas - self.current


def decide(settings: Settings, inputs: Inputs) -> Decision:
    """The rules of the scaler, in their order. Pure: no I/O, no clock.

    | rule                                                    | function                        |
    |---------------------------------------------------------|---------------------------------|
    | 1 a person's pause, number to hold, or paused direction | `paused`, `paused_direction`    |
    | 2 switched off: 0 replicas that this scaler did not set | `switched_off`                  |
    | 3 outside the range: back into it at once               | `out_of_range`                  |
    | 4 the recommendation: pods for the jobs, in the range   | `recommend`                     |
    | 5 stabilization windows, as the HPA has them            | `stabilize`                     |
    | 6 at most one step                                      | `limit_step`                    |
    | 7 a scale-down leaves the busy pods                     | `leave_busy_pods`               |
    | 8 cooldowns since the last scale                        | `cool_down`                     |

    Rules 1 to 3 decide alone, and need no queue; rule 3 obeys a paused direction and rule 7. Rules
    4 to 8 follow the queue: each of 5 to 8 takes the number of the one before and gives another
    one, or a reason to hold. `without_queue` stands in for them while the queue cannot be read.
    """
    return override(settings, inputs) or follow_queue(settings, inputs)


def override(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rules 1 to 3. None where the queue decides."""
    rules = (paused, switched_off, out_of_range)
    return next((found for rule in rules if (found := rule(settings, inputs))), None)


def conclude(inputs: Inputs, ruling: int | Hold, reason: Reason, why: str) -> Decision:
    """The decision for a number of pods with its reason, or for a hold with the hold's own."""
    number, current, because = ruling, inputs.current, ""
    if not isinstance(number, int):
        (reason, because), number = number, current
    done = f"stays at {pods(current)}{because}"
    if number != current:
        done = f"scaled {'up' if number > current else 'down'} from {current} to {pods(number)}"
    # Failures of the queue count in a row: a look that does without it breaks the row.
    kept = {FAILING_SINCE: None}
    return Decision(number, reason, f"{why}; {done}", current, None, inputs.queue, kept)


def paused(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 1, the forms that hold a number."""
    state = inputs.state
    if state.paused:
        return conclude(inputs, inputs.current, "Paused", f"paused by annotation{state.until}")
    if state.paused_replicas is not None:
        why = f"{PAUSED_REPLICAS} orders {pods(state.paused_replicas)}{state.until}"
        return conclude(inputs, state.paused_replicas, "Paused", why)
    return None


def switched_off(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 2. Where MIN_REPLICAS is 0, a 0 is a number like any other, in scheduled hours, too."""
    if inputs.current > 0 or settings.min_replicas == 0 or inputs.own_zero:
        return None
    why = f"somebody set 0 replicas although MIN_REPLICAS={settings.min_replicas}"
    off: Hold = ("ScalingDisabled", ", switched off until somebody scales it to 1 or more")
    return conclude(inputs, off, "ScalingDisabled", why)


def out_of_range(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 3: back into the range at once, as the HPA does it; busy pods stay protected."""
    reason: Reason = "TooFewReplicas"
    bound, limit = settings.minimum(inputs.now)
    if inputs.current > settings.max_replicas:
        bound, reason = settings.max_replicas, "TooManyReplicas"
        limit = f"MAX_REPLICAS={bound}"
    elif inputs.current >= bound:
        return None
    ruling = apply_rules((paused_direction, leave_busy_pods), settings, inputs, bound)
    return conclude(inputs, ruling, reason, f"{pods(inputs.current)} where {limit}")


def follow_queue(settings: Settings, inputs: Inputs) -> Decision:
    """Rules 4 to 8, and what the stabilization windows have to remember of them."""
    desired, why = recommend(settings, inputs)
    ruling: int | Hold = ("AtTarget", "")
    if desired != inputs.current:
        rules = (paused_direction, stabilize, limit_step, leave_busy_pods, cool_down)
        ruling = apply_rules(rules, settings, inputs, desired)
    reason: Reason = "ScaledUp" if desired > inputs.current else "ScaledDown"
    decision = conclude(inputs, ruling, reason, why)
    history = None
    if isinstance(paused_direction(settings, inputs, desired), int):
        history = write_history(new_history(settings, inputs, desired, decision.change))
    annotations = {**decision.annotations, RECOMMENDATIONS: history}
    return replace(decision, desired=desired, annotations=annotations)


Rule = Callable[[Settings, Inputs, int], "int | Hold"]


def apply_rules(
    rules: Sequence[Rule], settings: Settings, inputs: Inputs, target: int
) -> int | Hold:
    """One rule after another, each on the number of the one before; the first hold ends it."""
    for rule in rules:
        ruling = rule(settings, inputs, target)
        if not isinstance(ruling, int):
            return ruling
        target = ruling
    return target


def recommend(settings: Settings, inputs: Inputs) -> tuple[int, str]:
    """Rule 4: enough pods for the jobs waiting and busy, within the range; and what the queue
    asks for, as the beginning of a sentence."""
    queue = inputs.queue
    assert queue is not None, "rules 4 to 8 need the queue"
    least, limit = settings.minimum(inputs.now)
    wanted = math.ceil((queue.waiting + (queue.busy or 0)) / settings.jobs_per_pod)
    desired = min(max(wanted, least), settings.max_replicas)
    bound = ", the maximum" if desired == settings.max_replicas else ""
    if desired == least:
        bound = ", the minimum" + (f" ({limit})" if least > settings.min_replicas else "")
    return desired, f"{queue}: {pods(desired)} wanted{bound}"


def disabled(up: bool, until: str = "") -> Hold:
    """A direction that is switched off."""
    because = f", as scale-{'up' if up else 'down'} is switched off{until}"
    return ("ScaleUpDisabled" if up else "ScaleDownDisabled"), because


def paused_direction(settings: Settings, inputs: Inputs, target: int) -> int | Hold:
    """Rule 1, the forms that switch a direction off."""
    state, up = inputs.state, target > inputs.current
    off = state.paused_scale_out if up else state.paused_scale_in
    return disabled(up, state.until) if off else target


def stabilize(settings: Settings, inputs: Inputs, target: int) -> int | Hold:
    """Rule 5: the lowest recommendation of the scale-up window, the highest of the scale-down
    window, as the HPA controller's `stabilizeRecommendationWithBehaviors` has it."""
    current, up = inputs.current, target > inputs.current
    window = settings.scale_up_stabilization_seconds
    if not up:
        window = settings.scale_down_stabilization_seconds
    entries = within_window(inputs, window)
    numbers = [target, *(replicas for _, replicas in entries)]
    stable = max(current, min(numbers)) if up else min(current, max(numbers))
    if stable != current:
        return stable
    newest = max(at for at, n in entries if (n <= current if up else n >= current))
    left = newest + window - int(inputs.now.timestamp())
    variable = f"SCALE_{'UP' if up else 'DOWN'}_STABILIZATION_SECONDS"
    because = f" for {left} s more ({variable}={window})"
    return ("ScaleUpStabilized" if up else "ScaleDownStabilized"), because


# Looks at most this far apart, in seconds, are in a row: one run a minute, and one that is missed.
IN_A_ROW_SECONDS = 150


def within_window(inputs: Inputs, window: int) -> set[Recommendation]:
    """The past recommendations inside a window, in seconds; one exactly as old lies outside.

    Where there are none, the recommendation up to now was the current number, as in the HPA
    controller's `recordInitialRecommendation`. Where looks are always further apart than the
    window is long, there are none as a rule, and that would hold for ever: the HPA then goes by
    the newest recommendation alone, and so does this. A history from a clock ahead of ours counts
    as of now, so that it cannot hold for longer than its window.
    """
    now = int(inputs.now.timestamp())
    entries = {(min(at, now), replicas) for at, replicas in inputs.state.recommendations}
    inside = {(at, replicas) for at, replicas in entries if at > now - window}
    times = sorted({at for at, _ in entries})
    usual_gap = times[-1] - times[-2] if len(times) > 1 else 0
    in_a_row = times and now - times[-1] <= max(IN_A_ROW_SECONDS, 2 * usual_gap)
    return inside if inside or in_a_row or window == 0 else {(now, inputs.current)}


def new_history(
    settings: Settings, inputs: Inputs, desired: int, change: int
) -> set[Recommendation]:
    """What the windows have to remember, with this look's recommendation: nothing at rest, as
    starting afresh could only make them hold from one look later."""
    up = settings.scale_up_stabilization_seconds
    down = settings.scale_down_stabilization_seconds
    replicas = inputs.current + change
    if (desired >= replicas or not down) and (desired <= replicas or not up):
        return set()
    now = int(inputs.now.timestamp())
    before = max((at for at, _ in inputs.state.recommendations if at < now), default=None)
    last_look = {entry for entry in inputs.state.recommendations if entry[0] == before}
    windows = within_window(inputs, up) | within_window(inputs, down)
    return {*last_look, *windows, (now, desired)}


def limit_step(settings: Settings, inputs: Inputs, target: int) -> int | Hold:
    """Rule 6: at most one step towards the target, and at least one pod of it. The percentages
    are rounded in floating point because the HPA controller's are."""
    current, up = inputs.current, target > inputs.current
    limit = settings.scale_up_step if up else settings.scale_down_step
    if limit is None:
        return target
    size = int(limit.rstrip("%"))
    if size == 0:
        return disabled(up)
    if up:
        most = math.ceil(current * (1 + size / 100)) if "%" in limit else current + size
        return min(target, max(most, current + 1))
    least = int(current * (1 - size / 100)) if "%" in limit else current - size
    return max(target, least)


def leave_busy_pods(settings: Settings, inputs: Inputs, target: int) -> int | Hold:
    """Rule 7: a scale-down never goes below the number of pods that costs no busy one."""
    if target > inputs.current or inputs.busy_floor is None:
        return target
    if inputs.busy_floor >= inputs.current:
        return "WorkersBusy", inputs.busy_because
    return max(target, inputs.busy_floor)


def busy_floor(live: Sequence[Pod], busy: set[str]) -> tuple[int, str]:
    """The least number of replicas at which the controllers remove idle pods only, once each busy
    pod has the highest deletion cost; and why nothing can go where that is all of them.

    The ReplicaSet controller takes pods that are unassigned, pending or not ready before it
    compares deletion costs, so an idle pod is a safe victim only if it comes before the first
    busy one in the whole order. During a rollout the Deployment controller shares a scale-in
    between the ReplicaSets in proportion to their sizes, and no mark can steer it: nothing is
    removed then.
    """
    ranks = [(pod.deletion_rank, BUSY_COST) for pod in live if pod.name in busy]
    if not ranks:
        return 0, ""
    if len({pod.owner for pod in live}) > 1:
        return INT32_MAX, f", as a rollout is going on with {pods(len(ranks))} busy"
    idle = [(pod.deletion_rank, pod.deletion_cost) for pod in live if pod.name not in busy]
    safe = sum(rank < min(ranks) for rank in idle)
    return len(live) - safe, ", as removing one would cost a busy one"


def cool_down(settings: Settings, inputs: Inputs, target: int) -> int | Hold:
    """Rule 8: a scale-up waits after a scale-up, a scale-down after any scale. If the direction
    of the last one is unknown, both wait."""
    last, up = inputs.state.last_scale_time, target > inputs.current
    if last is None or (up and inputs.state.last_scale == "down"):
        return target
    cooldown = settings.scale_up_cooldown_seconds if up else settings.scale_down_cooldown_seconds
    left = math.ceil(cooldown - (inputs.now - last).total_seconds())
    if left <= 0:
        return target
    variable = f"SCALE_{'UP' if up else 'DOWN'}_COOLDOWN_SECONDS"
    because = f" for {left} s more ({variable}={cooldown} since {write_time(last)})"
    return ("ScaleUpCooldown" if up else "ScaleDownCooldown"), because


def without_queue(settings: Settings, inputs: Inputs, problem: QueueFailure) -> Decision:
    """What an unreadable queue leads to: the replicas stay, or after a while go up to the
    fallback. They never go down, and the fallback does not act against a person's number."""
    current, fallback = inputs.current, settings.fallback_replicas
    stays, ordered = f"{problem}; stays at {pods(current)}", inputs.state.paused_replicas
    held = Decision(current, problem.reason, stays, current, exit_code=problem.exit_code)
    if override(settings, inputs):
        waits = "" if ordered is None else f"; {PAUSED_REPLICAS}={ordered} waits"
        because = ", as busy pods cannot be told from idle ones"
        return replace(held, message=f"{stays}{because}{waits}")
    if fallback is None:
        return held
    since = inputs.state.queue_failing_since
    if since is None:
        since = inputs.now
        held = replace(held, annotations={FAILING_SINCE: write_time(since)})
    left = math.ceil(settings.fallback_after_seconds - (inputs.now - since).total_seconds())
    if left > 0:
        return replace(held, message=f"{stays}, and falls back to {fallback} in {left} s")
    ruling: int | Hold = current
    if fallback > current:
        ruling = apply_rules((paused_direction, limit_step), settings, inputs, fallback)
    if not isinstance(ruling, int):
        return replace(held, reason=ruling[0], message=stays + ruling[1])
    why = f"{problem}; falls back to FALLBACK_REPLICAS={fallback}"
    found = conclude(inputs, max(current, fallback), "Fallback", why)
    return replace(held, replicas=found.replicas, reason="Fallback", message=found.message)


# --------------------------------------------------------------- one run: its time, its report

RECORD_BYTES = 4095  # the kubelet keeps less than 4,096
DEFAULT_TERMINATION_LOG = "/dev/termination-log"
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR")
SECRETS = re.compile(
    r"(?is)\bbearer\s+[^\s\"',;]+|-----BEGIN.*?(?:-----END[^-]*-----|\Z)|\beyJ[\w-]+\.[\w.-]+"
)


@dataclass
class Run:
    """One run: where it comes from, how far it has come, and what has been told of it.

    `started` is on the monotonic clock, in seconds. Of the present look, `current` is the number
    of pods that it has read; `in_doubt` is true while a patch may or may not have reached the
    Deployment; `done` is what it has done already, whatever fails after that. `resting` is true
    between two looks. Whoever reports holds `reporting`.
    """

    environ: Mapping[str, str]
    clock: Callable[[], datetime]
    started: float = field(default_factory=time.monotonic)
    interval: int | None = None
    namespace: str | None = None
    deadline: float = 0.0
    call_seconds: float = 0.0
    stage: str = "reading the settings"
    stage_reason: Reason = "ClusterUnavailable"
    current: int | None = None
    in_doubt: bool = False
    done: Decision | None = None
    looks: int = 0
    last: Decision | None = None
    last_scale: Decision | None = None
    resting: bool = False
    exit_code: int | None = None
    reporting: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # A value that is not accepted is reported with the other settings, as by default.
        words = {name: value.strip().upper() for name, value in self.environ.items()}
        level = words.get("LOG_LEVEL")
        self.severities = SEVERITIES[SEVERITIES.index(level if level in SEVERITIES else "INFO") :]
        self.as_json = words.get("LOG_FORMAT") == "JSON"
        self.dry_run = words.get("DRY_RUN") == "TRUE"
        self.begun = self.clock()

    def now(self) -> datetime:
        """The beginning of the run plus whole seconds since: most looks have one time only, and
        do not miss the end of a cooldown by how long an import takes."""
        passed = int((self.clock() - self.begun).total_seconds())
        return self.begun + timedelta(seconds=max(0, passed))

    def begin_look(self, end: float) -> None:
        """A look ends with the run or, where others follow, after an interval; but one has 5 s.
        One call gets a third of it, so that one that is never answered can be tried again."""
        now = time.monotonic()
        if self.interval is not None:
            end = min(end, now + max(5, self.interval))
        self.deadline, self.call_seconds = end, min(10.0, (end - now) / 3)
        self.current, self.in_doubt, self.done = None, False, None

    def left(self, reserve: bool = False) -> float:
        """Seconds until the look's deadline. The queue, and reading again, keep the time of one
        call in reserve for what comes after, such as the patch of a fallback."""
        return max(0.0, self.deadline - time.monotonic() - (self.call_seconds if reserve else 0))

    def for_call(self, reserve: bool = False) -> float:
        """Seconds for one call. Never 0, which the clients would read as no limit."""
        return max(0.05, min(self.call_seconds, self.left(reserve)))

    def retrying(self, flag: str, reserve: bool = False) -> Retrying:
        """Tries again after failures with that flag, while the next try still begins before the
        deadline, with growing, jittered pauses after the server's Retry-After."""
        import tenacity

        again = tenacity.retry_if_exception(lambda error: getattr(error, flag, False))
        asked = tenacity.wait_exception(lambda error: getattr(error, "retry_after", 0.0))
        pause = asked + tenacity.wait_random_exponential(multiplier=0.2, max=5)
        stop = tenacity.stop_before_delay(self.left(reserve))
        return tenacity.Retrying(retry=again, wait=pause, stop=stop, reraise=True)

    def enter(self, stage: str, reason: Reason) -> None:
        """Say what the run is about to wait for, and the reason it ends with if that fails."""
        self.stage, self.stage_reason = stage, reason

    def break_off(self, why: str, reason: Reason | None = None, exit_code: int = 1) -> Decision:
        """What a look that ends early comes to: what it has done, or else that nothing changes."""
        if self.done:
            return self.done
        if self.in_doubt:
            why += "; whether the patch arrived is not known, the next look will see"
        elif self.current is not None:
            why += f"; stays at {pods(self.current)}"
        replicas = None if self.in_doubt else self.current
        reason = reason or self.stage_reason
        return Decision(replicas, reason, why, self.current, exit_code=exit_code)

    def log(self, severity: str, message: str, record: Mapping[str, Any] | None = None) -> None:
        """One line, for people or as a JSON object in the terms of Cloud Logging."""
        if severity not in self.severities:
            return
        when, message = write_time(self.clock()), scrub(f"AutoScaler {message}")
        line = f"{when} {severity} {message}"
        if self.as_json:
            entry = {"time": when, **(record or {}), "severity": severity, "message": message}
            line = json.dumps(entry, ensure_ascii=False)
        # A line that cannot be written is lost; it does not keep the run from its work.
        with suppress(OSError, ValueError):
            print(line, flush=True)

    def tell(self, decision: Decision) -> None:
        """Note how a look ended, and log its line where it has something new to say."""
        scales, before = decision.change != 0 and not self.dry_run, self.last
        self.looks, self.last = self.looks + 1, decision
        self.last_scale = decision if scales else self.last_scale
        told = before and replace(
            before, message=decision.message, annotations=decision.annotations
        )
        if told == decision and not scales:
            return
        for warning in decision.warnings:
            self.log("WARNING", warning)
        record = self.record(decision)
        target = "/".join(filter(None, (record["namespace"], record["deployment"])))
        line = f"{target} {decision.reason}: {decision.message}".strip()
        self.log({0: "INFO", 1: "WARNING"}.get(decision.exit_code, "ERROR"), line, record)

    def record(self, decision: Decision) -> dict[str, Any]:
        """The result record of a decision."""
        queue, change = decision.queue, decision.change
        # As they were set, right or wrong.
        names = [self.environ.get(variable) for variable in ("NAMESPACE", "DEPLOYMENT")]
        namespace, deployment = (name and one_line(name, 253) for name in names)
        record = {
            "time": write_time(self.now()),
            "namespace": self.namespace or namespace,
            "deployment": deployment,
            "waiting": queue.waiting if queue else None,
            "waitingCapped": bool(queue and queue.capped),
            "busy": queue.busy if queue else None,
            "current": decision.current,
            "desired": decision.desired,
            "replicas": decision.current if self.dry_run else decision.replicas,
            "action": "scale-up" if change > 0 else "scale-down" if change < 0 else "none",
            "reason": decision.reason,
            "message": scrub(decision.message),
            "dryRun": self.dry_run,
            "durationSeconds": round(time.monotonic() - self.started, 3),
        }
        return record if self.interval is None else {**record, "looks": self.looks}

    def end(self, why: str = "") -> int:
        """Write the result record: the last look's if that failed, else the last one's that
        scaled, else the last one's. Returns the exit code."""
        assert self.last is not None, "a run has a look"
        told = self.last if self.last.exit_code else self.last_scale or self.last
        record = self.record(replace(told, message=told.message + why))
        path = Path(self.environ.get("TERMINATION_LOG") or DEFAULT_TERMINATION_LOG)
        try:
            if str(path) != DEFAULT_TERMINATION_LOG or path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_record(record))
        except OSError as error:
            self.log("WARNING", f"the result record was not written: {error}")
        return self.last.exit_code


def encode_record(record: dict[str, Any]) -> bytes:
    """JSON of no more than RECORD_BYTES; the message gives way."""
    while True:
        data = json.dumps(record, ensure_ascii=False).encode(errors="replace")
        message = record["message"]
        if len(data) <= RECORD_BYTES or not message:
            return data
        record = {**record, "message": message[: len(message) * 3 // 4]}


def scrub(message: str) -> str:
    """Without tokens and keys, which errors of libraries and answers of proxies may quote."""
    return SECRETS.sub("[removed]", message)


def one_line(text: object, most: int = 1200) -> str:
    """An error of a library, or a name, in one line of so many characters at most."""
    line = " ".join(scrub(str(text)).encode(errors="replace").decode().split())
    line = line or type(text).__name__
    return line if len(line) <= most else line[: most - 3] + "..."


# ------------------------------------------------------------------------------------- queue

# By gRPC status code: what gets better by itself, and what to do where nothing does.
TRANSIENT_CODES = frozenset(
    ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "CANCELLED"]
)
ADVICE = {
    "UNAUTHENTICATED": "check GOOGLE_APPLICATION_CREDENTIALS or Workload Identity",
    "PERMISSION_DENIED": "grant the scaler's Google account the IAM role roles/datastore.viewer",
    "NOT_FOUND": "check FIRESTORE_PROJECT and FIRESTORE_DATABASE",
    "INVALID_ARGUMENT": "check QUEUE_COLLECTION, WAITING_FILTER, BUSY_FILTER and BUSY_POD_FIELD",
    "FAILED_PRECONDITION": "if an index is missing, create it with the link above",
}
IN_VALUES = 30  # the most that Firestore takes in an `in`


def queue_failure(doing: str, error: Exception) -> QueueFailure:
    """The failure that an error of the Firestore client stands for."""
    code = getattr(getattr(error, "grpc_status_code", None), "name", type(error).__name__)
    message = f"Firestore failed while {doing}: {code}: {one_line(error)}"
    if code in ADVICE:
        denied = code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        reason: Reason = "Forbidden" if denied else "QueueUnavailable"
        return QueueFailure(reason, f"{message}; {ADVICE[code]}", exit_code=2)
    return QueueFailure("QueueUnavailable", message, transient=code in TRANSIENT_CODES)


class JobQueue:
    """The Firestore collection that holds the jobs. Its client is opened when it is first asked
    something, so that nothing of Google's is waited for before the Deployment was read. Every
    public method raises QueueFailure."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._opening: Future[Client] | None = None

    def count(self, pod_names: Sequence[str] | None) -> QueueLength:
        """Count the waiting jobs and, given the live pods' names, right after it their busy jobs:
        a job claimed between the two counts twice, which costs no pod."""
        limit = self._settings.count_limit

        def read(query: Any, **call: Any) -> int:
            results = query.limit(limit).count(alias="jobs").get(**call)
            # The client gives a count of zero as 0.0.
            counts = [int(row.value) for rows in results for row in rows if row.value >= 0]
            if len(counts) != 1:
                problem = f"Firestore gave no usable count while {self._run.stage}"
                raise QueueFailure("QueueUnavailable", problem, transient=False)
            return counts[0]

        waiting = self._ask("counting waiting jobs", read, self._settings.waiting_filter)
        if pod_names is None:
            return QueueLength(waiting, waiting >= limit)
        batches = self._busy_filters(pod_names)
        busy = sum(self._ask("counting busy jobs", read, batch) for batch in batches)
        return QueueLength(waiting, waiting >= limit, busy)

    def busy_pods(self, pod_names: Sequence[str]) -> set[str]:
        """Which of these pods hold a busy job."""
        name, doing = self._settings.busy_pod_field, "reading which pods are busy"

        def read(query: Any, **call: Any) -> set[str]:
            return {str(job.get(name)) for job in query.select([name]).stream(**call)}

        batches = self._busy_filters(pod_names)
        return {pod for batch in batches for pod in self._ask(doing, read, batch)}

    def _busy_filters(self, pod_names: Sequence[str]) -> Iterator[list[Filter]]:
        """The filters for as many pods as Firestore takes in an `in`, whose limit is on the product
        of it and of the lists in BUSY_FILTER."""
        conditions = self._settings.busy_filter or ()
        lists = [len(v) for _, op, v in conditions if op in ("in", "array_contains_any")]
        batch = max(1, IN_VALUES // math.prod(lists))
        for start in range(0, len(pod_names), batch):
            names = list(pod_names[start : start + batch])
            yield [*conditions, (self._settings.busy_pod_field, "in", names)]

    def _ask(self, doing: str, read: Callable[..., T], conditions: Sequence[Filter]) -> T:
        """Put a question, with retries. tenacity's are the ones with a deadline, so the client's
        own are switched off: not by None, which its streams take for an object when an answer
        breaks off."""
        # Before the first count, and not between the two, which belong to one moment.
        client, path = self._client(), self._settings.queue_collection
        from google.api_core.exceptions import GoogleAPIError
        from google.api_core.retry import Retry, if_exception_type
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.firestore import FieldFilter

        by_group = self._settings.queue_collection_group
        query: Any = client.collection_group(path) if by_group else client.collection(path)
        for name, op, value in conditions:
            query = query.where(filter=FieldFilter(name, op, value))
        never = Retry(predicate=if_exception_type())

        def once() -> T:
            self._run.enter(doing, "QueueUnavailable")
            started = time.monotonic()
            try:
                answer = read(query, retry=never, timeout=self._run.for_call(reserve=True))
            except (GoogleAPIError, GoogleAuthError) as error:
                raise queue_failure(doing, error) from error
            took = time.monotonic() - started
            self._run.log("DEBUG", f"{doing} took {took:.3f} s: {answer}")
            return answer

        return self._run.retrying("transient", reserve=True)(once)

    def _client(self) -> Client:
        """The client, from a thread of its own: looking for credentials asks Google's metadata
        server, which may accept and never answer, and no timeout covers that."""
        from concurrent.futures import ThreadPoolExecutor

        if self._opening is None:
            self._run.enter("looking for Google credentials", "QueueUnavailable")
            self._opening = ThreadPoolExecutor(1).submit(open_firestore, self._settings)
        try:
            return self._opening.result(self._run.left(reserve=True))
        except TimeoutError:
            problem = "Google's metadata server did not answer while looking for credentials"
            raise QueueFailure("QueueUnavailable", problem) from None
        except QueueFailure:
            self._opening = None  # for the next look
            raise


def open_firestore(settings: Settings) -> Client:
    """Raises QueueFailure where there are no usable Google credentials."""
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.firestore import Client

    try:
        return Client(settings.firestore_project, database=settings.firestore_database)
    except (GoogleAuthError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # All of these come out of the library for a damaged key file. Without its text, which
        # quotes what it was given: at times a private key.
        problem = (
            "no usable Google credentials or project for Firestore: looked for "
            "GOOGLE_APPLICATION_CREDENTIALS (the path of a file), gcloud's login, Workload "
            f"Identity, FIRESTORE_PROJECT ({type(error).__name__})"
        )
        raise QueueFailure("Forbidden", problem, exit_code=2) from error


# ----------------------------------------------------------------------------------- cluster

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
NOT_ALLOWED = (
    "; is DEPLOYMENT={name} written as in the Role? If so, the Role in namespace {namespace} has "
    "to allow {verb} on {resource} (rbac.yaml), and a RoleBinding there has to name this account"
)
# All the calls that this script makes: method, resource, and the verb that a Role has for it.
CALLS = {
    "reading the Deployment": ("GET", "deployments", "get"),
    "patching the Deployment": ("PATCH", "deployments", "patch"),
    "listing the pods": ("GET", "pods", "list"),
    "marking pods": ("PATCH", "pods", "patch"),
    "writing the Event": ("POST", "events", "create"),
}
# What an HTTP status means: the reason, the exit code and what to do. One that is not here counts
# as 400 or, from 500 on, as 500.
REFUSALS: Mapping[int, tuple[Reason, int, str]] = {
    400: ("ClusterUnavailable", 2, ""),
    401: ("Forbidden", 2, "; the credentials of the scaler are missing or expired"),
    403: ("Forbidden", 2, NOT_ALLOWED),
    404: ("DeploymentNotFound", 2, "; check DEPLOYMENT and NAMESPACE"),
    408: ("ClusterUnavailable", 1, ""),
    409: ("ClusterUnavailable", 1, ""),
    422: ("Forbidden", 2, ""),  # an admission policy, or a number that the API does not take
    429: ("ClusterUnavailable", 1, ""),
    500: ("ClusterUnavailable", 1, ""),
}


@dataclass(frozen=True)
class Deployment:
    """What one GET of the Deployment tells.

    `rolled_back` are those of our annotations that a `kubectl rollout undo` put back,
    `replicas_owners` the entries of managedFields that own spec.replicas.
    """

    uid: str
    resource_version: str
    replicas: int
    annotations: Mapping[str, str]
    selector: str
    rolled_back: frozenset[str]
    replicas_owners: Sequence[Mapping[str, Any]]


def expect(kind: type[T], found: Any) -> T:
    """A part of an answer that is of this kind. Raises ValueError where it is not."""
    if not isinstance(found, kind):
        raise ValueError(f"expected {kind.__name__}, not {quoted(found)}")
    return found


def parse_deployment(answer: Any) -> Deployment:
    """Raises what reading a dict wrong raises where the answer is not what the API has."""
    metadata, spec = answer["metadata"], answer["spec"]
    annotations, managed = metadata.get("annotations") or {}, metadata.get("managedFields") or ()
    return Deployment(
        uid=str(metadata.get("uid", "")),
        resource_version=expect(str, metadata["resourceVersion"]),
        replicas=expect(int, spec.get("replicas", 1)),
        annotations={name: expect(str, annotations[name]) for name in annotations},
        selector=selector_string(spec["selector"]),
        rolled_back=rolled_back(managed),
        replicas_owners=[entry for entry in managed if "f:replicas" in owned(entry, "f:spec")],
    )


def selector_string(selector: Any) -> str:
    """A label selector in the form that a list request takes."""
    forms = {"In": "{} in ({})", "NotIn": "{} notin ({})", "Exists": "{}", "DoesNotExist": "!{}"}
    words = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for one in selector.get("matchExpressions") or ():
        words.append(forms[one["operator"]].format(one["key"], ",".join(one.get("values") or ())))
    if not words:
        # It would select every pod of the namespace; the API allows no such Deployment.
        raise ValueError("the Deployment has no selector")
    return ",".join(words)


def owned(entry: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The fields under a path that an entry of managedFields owns."""
    node = entry.get("fieldsV1") or {}
    for key in path:
        node = node.get(key) or {}
    return expect(dict, node)


def rolled_back(managed: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Our annotations that a `kubectl rollout undo` wrote. It updates the whole Deployment in the
    name of plain `kubectl`; what people write is owned by `kubectl-annotate` and the like.

    The time of the last scale is read as it is: an older one holds nothing up for longer.
    """
    undone, others = set[str](), {f"f:{LAST_SCALE_TIME}", f"f:{LAST_SCALE}"}
    for entry in managed:
        whole = (entry.get("manager"), entry.get("operation"), entry.get("subresource", ""))
        names = undone if whole == ("kubectl", "Update", "") else others
        names.update(owned(entry, "f:metadata", "f:annotations"))
    ours = (name.removeprefix("f:") for name in undone - others)
    return frozenset(name for name in ours if name.startswith(ANNOTATION))


def other_manager(owners: Sequence[Mapping[str, Any]], last_scale: datetime | None) -> str | None:
    """Who sets `spec.replicas` beside this scaler, if it is not a person's kubectl.

    Whoever created the Deployment owns the field, too: only a change after the scaler's own, or
    one through the scale subresource, is another master's.
    """
    last = max(owners, key=lambda entry: str(entry.get("time") or ""), default={})
    manager, at = str(last.get("manager")), str(last.get("time") or "")
    ours = FIELD_MANAGER in {entry.get("manager") for entry in owners}
    if not last or ours or re.match(r"kubectl(-|$)", manager):
        return None
    if last.get("subresource") == "scale":
        manager += " through the scale subresource"
        if "controller-manager" in manager:
            manager = f"a HorizontalPodAutoscaler ({manager})"
    elif last_scale is None or at <= write_time(last_scale):
        return None
    return manager + (at and f" at {at}")


def parse_pod(item: Any, deployment: str) -> Pod | None:
    """None for a pod that is ending or has ended, or that is not of this Deployment: its owner
    has to be a ReplicaSet with the name that the Deployment controller gives it."""
    metadata, status = item["metadata"], item.get("status") or {}
    phase, annotations = status.get("phase", ""), metadata.get("annotations") or {}
    template_hash = (metadata.get("labels") or {}).get("pod-template-hash")
    own = ("ReplicaSet", f"{deployment}-{template_hash}", True)
    owners = [
        owner["uid"]
        for owner in metadata.get("ownerReferences") or ()
        if own == (owner["kind"], owner["name"], owner.get("controller"))
    ]
    if not owners or metadata.get("deletionTimestamp") or phase in ("Succeeded", "Failed"):
        return None
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
    rank = {"Pending": 0, "Unknown": 1, "Running": 2}.get(phase, 0)
    assigned, ready = bool(item["spec"].get("nodeName")), conditions.get("Ready") == "True"
    cost = annotations.get(DELETION_COST, "0")
    # The controller takes an unreadable cost for 0; -1 has it written anew.
    cost = int(cost) if re.fullmatch(r"-?[0-9]{1,10}", cost) else -1
    return Pod(expect(str, metadata["name"]), owners[0], (assigned, rank, ready), cost)


class Cluster:
    """The API server, as far as this scaler may see it: one Deployment, its pods, its events.
    Every public method raises a Failure."""

    def __init__(self, client: ApiClient, namespace: str, name: str, run: Run) -> None:
        self.namespace, self.name, self.run = namespace, name, run
        self._client = client

    def read_deployment(self) -> Deployment:
        return self._insist("reading the Deployment", parse_deployment, self.name)

    def live_pods(self, selector: str) -> list[Pod]:
        """The pods that the Deployment's ReplicaSets count."""

        def parse(answer: Any) -> list[Pod]:
            if answer["kind"] != "PodList":  # or an empty answer would mean that no pod is busy
                raise ValueError(f"kind is {quoted(answer['kind'])}")
            return [pod for item in answer["items"] or () if (pod := parse_pod(item, self.name))]

        return self._insist("listing the pods", parse, labelSelector=selector)

    def set_deletion_cost(self, pod: Pod, cost: int) -> bool:
        """False where the pod is gone."""
        body = {"metadata": {"annotations": {DELETION_COST: str(cost)}}}
        try:
            self._insist("marking pods", dict, pod.name, body)
        except Failure as failure:
            if failure.status == 404:
                return False
            raise
        return True

    def patch_deployment(self, body: Mapping[str, Any]) -> Deployment:
        """One merge patch, and the Deployment after it. It is not repeated here: where it fails
        with `read_again`, only the Deployment itself can tell what became of it."""
        try:
            return self._call("patching the Deployment", parse_deployment, self.name, body)
        except Failure as failure:
            failure.read_again = failure.transient
            raise

    def post_event(self, uid: str, when: str, decision: Decision) -> None:
        """An Event of the kind that the HPA writes, on the Deployment with this uid."""
        name, namespace = self.name, self.namespace
        about = {"kind": "Deployment", "name": name, "namespace": namespace, "uid": uid}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name[:200]}.{os.urandom(8).hex()}", "namespace": namespace},
            "involvedObject": {"apiVersion": "apps/v1", **about},
            "type": "Normal",
            "reason": "SuccessfulRescale",
            "message": scrub(f"New size: {decision.replicas}; {decision.message}")[:1024],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": FIELD_MANAGER,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "count": 1,
        }
        self._call("writing the Event", dict, body=event)

    def _insist(self, doing: str, parse: Callable[[Any], T], *call: Any, **more: Any) -> T:
        """A call that is tried again while that can help."""
        return self.run.retrying("transient")(lambda: self._call(doing, parse, *call, **more))

    def _call(
        self, doing: str, parse: Callable[[Any], T], name: str = "", body: Any = None, **query: str
    ) -> T:
        """One of the CALLS, and its answer as `parse` reads it."""
        method, resource, _ = CALLS[doing]
        self.run.enter(doing, "ClusterUnavailable")
        if not self.run.left():
            raise Failure("ClusterUnavailable", f"no time was left for {doing}")
        group = "/apis/apps/v1" if resource == "deployments" else "/api/v1"
        path = f"{group}/namespaces/{self.namespace}/{resource}" + (f"/{name}" if name else "")
        started = time.monotonic()
        response = self._request(doing, method, path, body, query)
        took = time.monotonic() - started
        self.run.log("DEBUG", f"{method} {path}: {response.status} in {took:.3f} s")
        if not 200 <= response.status < 300:
            raise self._refusal(doing, response)
        try:
            return parse(json.loads(response.data))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            found = f"{type(error).__name__}: {one_line(error)}"
            problem = f"the API server's answer makes no sense while {doing}: {found}"
            raise Failure("ClusterUnavailable", problem) from error

    def _request(self, doing: str, method: str, path: str, body: Any, query: Any) -> Any:
        """The response, read to its end, whatever its status. It stays plain JSON, which spares the
        import of the client's generated models: more CPU than all the rest of a run."""
        from kubernetes.client.exceptions import OpenApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        parameters = list((query if method == "GET" else {"fieldManager": FIELD_MANAGER}).items())
        try:
            request = self._client.param_serialize(
                method, path, None, parameters, headers, body, auth_settings=["BearerToken"]
            )
            response = self._client.call_api(*request, _request_timeout=self.run.for_call())
            response.read()
        except (HTTPError, OpenApiException, ConfigException, OSError) as error:
            problem = f"the API server did not answer while {doing}: {one_line(error)}"
            raise Failure("ClusterUnavailable", problem) from error
        except ValueError:
            # From http.client; its text quotes the whole header.
            problem = "the credentials hold a character that no HTTP header can, such as a line end"
            raise Failure("Forbidden", problem, exit_code=2) from None
        return response

    def _refusal(self, doing: str, response: Any) -> Failure:
        """The failure that an HTTP status stands for, with what to do about it."""
        status = known = response.status
        _, resource, verb = CALLS[doing]
        if status not in REFUSALS or (status == 404 and resource != "deployments"):
            known = 500 if status >= 500 else 400
        reason, exit_code, advice = REFUSALS[known]
        try:
            message = one_line(expect(str, json.loads(response.data)["message"]))
        except (ValueError, TypeError, LookupError, RecursionError):  # perhaps a proxy's page
            message = quoted(response.data.decode(errors="replace"))
        said = f"the API server answered {status} while {doing}: {message}"
        if known == 404:
            said = f"there is no Deployment {self.name} in namespace {self.namespace}"
        if " denied " not in message:  # or else by an admission policy or webhook, not the Role
            names = {"name": self.name, "namespace": self.namespace}
            said += advice.format(verb=verb, resource=resource, **names)
        failure = Failure(reason, said, exit_code)
        failure.status = status
        # Seconds. A date is not read: ours and the server's clock may differ.
        pause = response.headers.get("Retry-After") or ""
        failure.retry_after = float(pause) if re.fullmatch(r"\d{1,6}", pause) else 0.0
        return failure


def open_cluster(settings: Settings, run: Run) -> Cluster:
    """The cluster that this pod runs in or, outside one, the kubeconfig's, as for kubectl.

    Raises a Failure where there is no usable configuration.
    """
    run.enter("loading the Kubernetes client", "ClusterUnavailable")
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.config.incluster_config import InClusterConfigLoader
    from yaml import YAMLError

    configuration = Configuration()
    configuration.retries = False  # urllib3's own would outlast the deadline
    try:
        if "KUBERNETES_SERVICE_HOST" in run.environ and not run.environ.get("KUBECONFIG"):
            token, ca = str(SERVICE_ACCOUNT / "token"), str(SERVICE_ACCOUNT / "ca.crt")
            InClusterConfigLoader(token, ca, environ=run.environ).load_and_set(configuration)
            own = (SERVICE_ACCOUNT / "namespace").read_text().strip()
        else:
            path = run.environ.get("KUBECONFIG") or "~/.kube/config"
            config.load_kube_config(path, client_configuration=configuration, persist_config=False)
            context = config.list_kube_config_contexts(path)[1]["context"]
            own = context.get("namespace") or "default"
    except (config.ConfigException, YAMLError, OSError, ValueError, TypeError, KeyError,
            AttributeError) as error:  # fmt: skip
        # All of these come out of the library for a damaged file.
        known = isinstance(error, config.ConfigException | OSError)
        problem = (
            "no usable cluster configuration: looked for a service account "
            f"(KUBERNETES_SERVICE_HOST and {SERVICE_ACCOUNT}), KUBECONFIG and ~/.kube/config: "
            f"{type(error).__name__}: {one_line(error) if known else 'damaged'}"
        )
        raise Failure("ClusterUnavailable", problem, exit_code=2) from error
    client = ApiClient(configuration)
    client.user_agent = f"{FIELD_MANAGER}/{__version__}"
    run.namespace = settings.namespace or own
    return Cluster(client, run.namespace, settings.deployment, run)


# ---------------------------------------------------------------------------------- one look


class Look:
    """Read, decide, apply. `pending` are the decisions whose patch may or may not have reached
    the Deployment."""

    def __init__(self, settings: Settings, cluster: Cluster, queue: JobQueue) -> None:
        self.settings, self.cluster, self.queue, self.run = settings, cluster, queue, cluster.run
        self.pending: list[Decision] = []

    def take(self) -> Decision:
        """Look, and again from the start where another writer came in between.

        Raises a Failure.
        """
        # An attempt that begins later would blame the queue for the time that it lacks.
        return self.run.retrying("read_again", reserve=True)(self.attempt)

    def attempt(self) -> Decision:
        run, deployment = self.run, self.cluster.read_deployment()
        run.current, run.in_doubt = deployment.replicas, False
        for decision in self.pending:
            if landed(decision, deployment):
                return self.finish(deployment, decision)
        now, owners = run.now(), deployment.replicas_owners
        state = parse_state(deployment.annotations, self.settings, now, deployment.rolled_back)
        own_zero = {entry.get("manager") for entry in owners} == {FIELD_MANAGER}
        inputs = Inputs(now, deployment.replicas, state, own_zero=own_zero)
        try:
            decision = self.gather(deployment, inputs)
        except QueueFailure as problem:
            decision = without_queue(self.settings, inputs, problem)
        warnings = state.warnings
        if other := other_manager(owners, state.last_scale_time):
            warnings += (f"two masters: spec.replicas was last set by {other}; keep one",)
        dry = "dry run, nothing is changed: " if run.dry_run else ""
        decision = replace(decision, message=dry + decision.message, warnings=warnings)
        return self.apply(deployment, decision)

    def gather(self, deployment: Deployment, inputs: Inputs) -> Decision:
        """Decide, and read what that needs, and no more: the queue is not waited for where a
        person or the range decides, and no document is read unless a scale-down is about to
        happen. Raises a Failure."""
        settings, live = self.settings, None
        decision = override(settings, inputs)
        if decision is None:
            if settings.busy_filter is not None:
                live = self.cluster.live_pods(deployment.selector)
            names = None if live is None else [pod.name for pod in live]
            inputs = replace(inputs, queue=self.queue.count(names))
            decision = decide(settings, inputs)
        if decision.change >= 0 or settings.busy_filter is None:
            return decision
        if live is None:
            live = self.cluster.live_pods(deployment.selector)
        return self.protect_busy_pods(live, inputs)

    def protect_busy_pods(self, live: Sequence[Pod], inputs: Inputs) -> Decision:
        """Mark the live pods so that a scale-down takes idle ones, and decide once more with what
        a second reading, after the marking, says of them: a job claimed in between protects its
        pod. Raises a Failure."""

        def read(live: Sequence[Pod]) -> tuple[set[str], Decision]:
            busy = self.queue.busy_pods([pod.name for pod in live])
            floor, because = busy_floor(live, busy)
            known = replace(inputs, busy_floor=floor, busy_because=because)
            return busy, decide(self.settings, known)

        busy, decision = read([replace(pod, deletion_cost=0) for pod in live])
        if decision.change >= 0 or self.run.dry_run:
            return decision
        before = {pod.name: pod.deletion_cost for pod in live}
        live = self.mark_pods(live, busy)
        # A pod that finished since it was marked keeps its mark, and so its place, until the next
        # look.
        busy, decision = read(live)
        claimed = [pod for pod in live if pod.name in busy and pod.deletion_cost != BUSY_COST]
        marked = sum(pod.deletion_cost != before[pod.name] for pod in live)
        if marked + len(claimed) > len(live):
            # More than one mark a pod: too much is going on. The next look has fewer to make.
            because = ", as jobs were claimed while the pods were marked"
            known = replace(inputs, busy_floor=INT32_MAX, busy_because=because)
            decision = decide(self.settings, known)
        if decision.change < 0:
            # A person's order is carried out whatever it costs, so that each mark has to be right.
            self.mark_pods(live if decision.reason == "Paused" else claimed, busy)
        return decision

    def mark_pods(self, live: Iterable[Pod], busy: set[str]) -> list[Pod]:
        """Give pods the deletion cost they should have, where they have another. The pods after
        that, without those that somebody deleted meanwhile. Raises a Failure."""
        costs = [(pod, BUSY_COST if pod.name in busy else 0) for pod in live]
        return [
            replace(pod, deletion_cost=cost)
            for pod, cost in costs
            if pod.deletion_cost == cost or self.cluster.set_deletion_cost(pod, cost)
        ]

    def apply(self, deployment: Deployment, decision: Decision) -> Decision:
        """The one place that changes the Deployment. `resourceVersion` as read makes the API
        server refuse the patch if anybody else wrote in between. Raises a Failure."""
        run, annotations = self.run, dict(decision.annotations)
        if decision.change:
            verb = "up" if decision.change > 0 else "down"
            annotations[LAST_SCALE_TIME] = write_time(run.now())
            annotations[LAST_SCALE] = f"{verb} {decision.current}->{decision.replicas}"
        there = deployment.annotations
        annotations = {name: v for name, v in annotations.items() if there.get(name) != v}
        decision = replace(decision, annotations=annotations)
        if run.dry_run or not (annotations or decision.change):
            return decision
        body: dict[str, Any] = {"metadata": {"resourceVersion": deployment.resource_version}}
        if annotations:
            body["metadata"]["annotations"] = annotations
        if decision.change:
            body["spec"] = {"replicas": decision.replicas}
        run.in_doubt = True
        try:
            after = self.cluster.patch_deployment(body)
        except Failure as failure:
            # With a status below 500 the API server has refused it.
            run.in_doubt = failure.read_again and not 400 <= failure.status < 500
            if run.in_doubt and decision.change:
                self.pending.append(decision)
            raise
        return self.finish(after, decision)

    def finish(self, deployment: Deployment, decision: Decision) -> Decision:
        """What remains once the patch is known to have landed: the Event, as the HPA writes one."""
        self.run.in_doubt = False
        if not decision.change:
            return decision
        self.run.done = decision
        try:
            self.cluster.post_event(deployment.uid, write_time(self.run.now()), decision)
        except Failure as failure:
            self.run.log("WARNING", f"no Event was written: {failure}")
        return decision


def landed(decision: Decision, deployment: Deployment) -> bool:
    """Whether the Deployment carries the patch of a decision."""
    there = deployment.annotations
    return deployment.replicas == decision.replicas and all(
        there.get(name) == value for name, value in decision.annotations.items()
    )


# -------------------------------------------------------------------------------------- main


def main(argv: Sequence[str], environ: Mapping[str, str], clock: Callable[[], datetime]) -> int:
    """One run as a process of its own: a signal, or the end of its time, ends it in order.
    Returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # A run of one look is over before a garbage collection could free anything worth its time.
    gc.disable()
    return execute(argv, environ, clock, watch)


def execute(
    argv: Sequence[str],
    environ: Mapping[str, str],
    clock: Callable[[], datetime],
    supervise: Callable[[Run, int], None] | None = None,
) -> int:
    """One run, without signals, timers or an exit of its own. Returns the exit code.

    `supervise` is called in a thread of its own with the run's budget in seconds, once the settings
    are read and before anything is waited for.
    """
    if not {"--help", "-h", "--version"}.isdisjoint(argv):
        with suppress(OSError):
            print(f"queue-scaler {__version__}" if "--version" in argv else usage(), flush=True)
        return 0
    if not logging.getLogger().handlers:
        # Else Python prints what libraries log: a login helper's output, for one.
        logging.getLogger().addHandler(logging.NullHandler())
    run = Run({**environ, "DRY_RUN": "true"} if "--dry-run" in argv else environ, clock)

    def start() -> None:
        unknown = [quoted(argument) for argument in argv if argument != "--dry-run"]
        if unknown:
            problem = f"unknown argument {unknown[0]}: expected --dry-run, --help, --version"
            raise Failure("InvalidSettings", problem, exit_code=2)
        settings = read_settings(run.environ)
        if supervise:
            budget = (run, settings.timeout_seconds)
            threading.Thread(target=supervise, args=budget, daemon=True).start()
        run.interval = settings.polling_interval_seconds
        poll(settings, open_cluster(settings, run), JobQueue(settings, run))

    for warning in misspelled(environ):
        run.log("WARNING", warning)
    decision = guarded(run, start)
    with run.reporting:
        if decision:
            run.tell(decision)
        run.exit_code = run.end()
    return run.exit_code


def guarded(run: Run, action: Callable[[], T]) -> T | Decision:
    """What an action returns or, where it fails, the decision to leave the replicas alone."""
    try:
        return action()
    except Failure as failure:
        return run.break_off(str(failure), failure.reason, failure.exit_code)
    except Exception as error:
        # A bug of ours, or a case that a library's pages do not name: it must not cost the line
        # and the record, nor the looks that follow.
        run.log("ERROR", traceback.format_exc())
        why = f"internal error while {run.stage}: {type(error).__name__}: {one_line(error)}"
        return replace(run.break_off(why), exit_code=1)


def poll(settings: Settings, cluster: Cluster, queue: JobQueue) -> None:
    """One look or, with POLLING_INTERVAL_SECONDS, one after another, each due at a fixed time from
    the start. One that is late is left out."""
    run, interval, total = cluster.run, settings.polling_interval_seconds, settings.timeout_seconds
    # The clients give up a little before the watchdog would, as they can say more.
    last_moment = run.started + total - min(1.0, total / 10)
    longest = 0.0
    while True:
        began = time.monotonic()
        run.begin_look(last_moment)
        decision = guarded(run, Look(settings, cluster, queue).take)
        with run.reporting:
            run.tell(decision)
            run.resting = True
        if interval is None:
            return
        now = time.monotonic()
        longest = max(longest, now - began)
        due = run.started + interval * math.ceil((now - run.started) / interval)
        if due + longest > last_moment:
            return
        gc.enable()
        threading.Event().wait(due - now)  # time.sleep, but for a clock that a test moves
        run.resting = False


def watch(run: Run, budget: int) -> None:
    """End the run on SIGTERM, on SIGINT, and when its time is up, whatever the main thread is
    waiting for: no timeout of a client covers an answer that drips in, or a name server."""
    received = signal.sigtimedwait(SIGNALS, max(0.0, run.started + budget - time.monotonic()))
    why = f"out of time (TIMEOUT_SECONDS={budget})"
    if received:
        why = f"ended by {signal.Signals(received.si_signo).name}"
    exit_code = 128 + received.si_signo if received else 1
    # Not given back: the main thread has nothing more to say. It may hang in its own line.
    if run.reporting.acquire(timeout=1):
        if run.exit_code is not None:
            exit_code = run.exit_code
        elif run.resting:
            run.end(f"; {why}")
        else:
            decision = run.break_off(f"{why} while {run.stage}")
            exit_code = exit_code if received else decision.exit_code
            run.tell(replace(decision, exit_code=exit_code))
            run.end()
    leave(exit_code)


def leave(exit_code: int) -> NoReturn:
    """Exit without tearing down the interpreter and gRPC, which is a fifth of a run's CPU; all
    that has to be written has been, or cannot be."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream:
                stream.flush()
    os._exit(exit_code)


def usage() -> str:
    """What `--help` prints, with the table of the settings."""
    rows = [(f.name.upper(), f.metadata["shown"], f.metadata["meaning"]) for f in fields(Settings)]
    table = "\n".join(f"  {name}\n      {meaning} [{shown}]" for name, shown, meaning in rows)
    return f"""\
usage: scaler.py [--dry-run] [--help] [--version]

{__doc__}
Environment variables, with their defaults:
{table}

FIRESTORE_EMULATOR_HOST and GOOGLE_APPLICATION_CREDENTIALS work as in every Google client. Inside a
cluster the service account is used, outside one KUBECONFIG or ~/.kube/config."""


if __name__ == "__main__":
    leave(main(sys.argv[1:], os.environ, lambda: datetime.now(UTC)))

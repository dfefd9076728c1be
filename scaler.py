#!/usr/bin/env python3
"""queue-scaler: sets the replicas of one Kubernetes Deployment by a Firestore job queue.

A CronJob starts this script every minute. It reads the length of the queue and the state that
earlier runs left in the Deployment's annotations, decides, sets `spec.replicas`, says why, and
exits:

    environment ──▶ Settings ───────────────┐
    Deployment ───▶ replicas, annotations ──┤
    Firestore ────▶ waiting, busy ──────────┼──▶ decide() ──▶ apply ──▶ report ──▶ exit code
    clock ────────▶ now ────────────────────┘    (pure)

This is one look. A run is one look; one more if a delay ends within 15 s; or, with
POLLING_INTERVAL_SECONDS, one look after another. `scaler.py --help` lists the settings.
Exit codes: 0, the run did its work; 1, the queue or the cluster did not respond in time, and the
next run tries again; 2, you have to fix something first; 143, interrupted.
"""

# The sections, in order; each uses only those above it:
#
#   failures             why a look ends early
#   filters              what a job has to match
#   output and settings  environment variables; a new setting is one field of Settings
#   annotations          what the Deployment says: state, pauses, and who wrote them
#   decision             pure: decide() and one function per rule; a new rule goes here
#   removal              pure: whose pods, which of them are busy, which may go
#   deadline             the time of a look, and how far it has come
#   queue                Firestore
#   cluster              the API server
#   look                 read, decide, choose victims, set their costs, read again, patch
#   report               log lines and the result record
#   main                 runs, polling, signals
#
# A new reason is one word in Reason; CONTRIBUTING.md lists the tests and docs that need it.

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
from collections import Counter
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

__version__ = "0.3.0"

T = TypeVar("T")
U = TypeVar("U")
Clock = Callable[[], datetime]

FIELD_MANAGER = "queue-scaler"
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1  # of replicas, deletion costs and Firestore's limits


# ---------------------------------------------------------------------------------- failures

# fmt: off
Reason = Literal[
    "ScaledUp", "ScaledDown", "AtTarget", "ScaleUpCooldown", "ScaleDownCooldown",
    "ScaleUpStabilized", "ScaleDownStabilized", "ScaleUpDisabled", "ScaleDownDisabled",
    "WorkersBusy", "Paused", "ScalingDisabled", "TooFewReplicas", "TooManyReplicas", "Fallback",
    "QueueUnavailable", "ClusterUnavailable", "InvalidSettings", "DeploymentNotFound", "Forbidden",
    "Interrupted",
]
# fmt: on


class Failure(Exception):
    """Why a look ends without the change it wanted.

    The message says what happened, `advice` what to do about it. `transient`: another try before
    the deadline may succeed, after `retry_after` seconds at the earliest. `status` is the API
    server's HTTP status. `read_again`: the Deployment or its pods have changed since they were
    read, or we may have changed them.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        advice: str = "",
        exit_code: int = 1,
        transient: bool = True,
        status: int = 0,
        retry_after: float = 0.0,
        read_again: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.advice, self.exit_code, self.status = advice, exit_code, status
        self.transient = transient and exit_code == 1
        self.retry_after, self.read_again = retry_after, read_again

    @property
    def whole(self) -> str:
        return f"{self}; {self.advice}" if self.advice else str(self)


class QueueFailure(Failure):
    """The queue could not be read."""


SECRETS = re.compile(
    r"(?is)\bbearer\s+[^\s\"',;]+|-----BEGIN.*?(?:-----END[^-]*-----|\Z)|\beyJ[\w-]+\.[\w.-]+"
)


def scrub(message: str) -> str:
    """Without tokens and keys, which libraries' errors and proxies' responses may quote."""
    return SECRETS.sub("[removed]", message)


def one_line(text: object, limit: int = 1200) -> str:
    """A library's error, or a name, in one line of at most `limit` characters."""
    line = " ".join(scrub(str(text)).encode(errors="replace").decode().split())
    line = line or type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def quoted(value: object) -> str:
    """A value as an error shows it: quoted, and truncated if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def did_you_mean(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """The known name that a misspelled one most likely stands for."""
    from difflib import get_close_matches  # rarely needed, and every import is paid 1,440 times

    return next(iter(get_close_matches(name, known, 1, cutoff)), None)


# ----------------------------------------------------------------------------------- filters

Parser = Callable[[str], Any]  # raises ValueError, which says what was expected
Condition = tuple[str, str, Any]  # field, operator, value, in the words of a Firestore query
Filter = tuple[tuple[Condition, ...], ...]  # alternatives: a job matches all conditions of one


# The web's spelling, and the Python client's; people copy from both.
ARRAY = ("array-contains", "array-contains-any", "array_contains", "array_contains_any")
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not-in", *ARRAY)
INEQUALITIES = ("<", "<=", ">", ">=")
SORTING = (*INEQUALITIES, "!=")  # and not-in, which goes with no alternatives
LIST_OPERATORS = {"in": 30, "not-in": 10, "array_contains_any": 30}
DISJUNCTIONS = 30  # Firestore's limit on a query in disjunctive normal form
MAP_DEPTH = 20  # Firestore's limit on nested values
SEGMENT = r"[^/\s](?:[^/]*[^/\s])?"  # of a path
# One part of a field's path: as the API accepts it, or else with no space at its ends, which
# would never match.
FIELD = r"([A-Za-z_][A-Za-z_0-9]*(?![^.])|`(?:[^`\\]|\\.)+`)|[^\s.`](?:[^.`]*[^\s.`])?"
FIELD_PATH = rf"(?:{FIELD})(?:\.(?:{FIELD}))*"
RFC3339 = r"(?i)\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"
RELATIVE = r"now(?:([+-])(\d{1,9})([smhd]))?"
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True)
class RelativeTime:
    """A filter's value that is the time of the look, plus an offset."""

    offset: timedelta


@dataclass(frozen=True)
class Reference:
    """A filter's value that is a document of the same database."""

    path: str


def matching(pattern: str, expected: str, convert: Parser = str) -> Parser:
    """A parser of text that has to match a pattern as a whole."""

    def parse(raw: str) -> Any:
        if not re.fullmatch(pattern, raw):
            raise ValueError(f"expected {expected}")
        return convert(raw)

    return parse


def api_field_path(raw: str) -> str:
    """A field's path with quotes where the API needs them and people leave them out."""
    return re.sub(FIELD, lambda part: part[1] or "`" + part[0].replace("\\", r"\\") + "`", raw)


document_path = matching(
    rf"/*{SEGMENT}/{SEGMENT}(?:/{SEGMENT}/{SEGMENT})*/*",
    "a document path such as lanes/fast: an even number of segments",
    lambda raw: raw.strip("/"),
)
field_path = matching(
    FIELD_PATH,
    "the name of a field, such as status or worker.pod, with no empty part, no space at its ends",
    api_field_path,
)


def filters(raw: str) -> Filter:
    """A list of conditions, or a list of such lists, of which a job matches any."""
    form = 'expected a JSON list of [field, op, value], such as [["status", "==", "waiting"]]'
    try:
        found = json.loads(raw)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{form}; this is not JSON") from None
    try:
        if not isinstance(found, list):
            raise ValueError("this is not a list")
        nested = [bool(isinstance(one, list) and one and isinstance(one[0], list)) for one in found]
        if any(nested) and not all(nested):
            raise ValueError(
                "a list of such lists has no condition, and no empty list, beside them"
            )
        alternatives = found if any(nested) else [found]
        parsed = tuple(tuple(parse_condition(one) for one in each) for each in alternatives)
        if disjunctions(parsed) > DISJUNCTIONS:
            raise ValueError(f"Firestore takes at most {DISJUNCTIONS} alternatives, lists included")
        for _, question in signed_union(parsed):
            if (together := math.prod(map(disjunctions, question))) > DISJUNCTIONS:
                raise ValueError(
                    f"a job can match several alternatives, which multiply to {together}, lists "
                    f"included, and Firestore takes at most {DISJUNCTIONS}"
                )
        used = {op for each in parsed for _, op, _ in each}
        if "not-in" in used and (len(parsed) > 1 or used & {"in", "array_contains_any"}):
            raise ValueError("Firestore cannot combine not-in with alternatives, in or any")
        return parsed
    except ValueError as error:
        raise ValueError(f"{form}; {error}") from None


def disjunctions(alternatives: Filter) -> int:
    """How many disjunctions Firestore makes of a filter."""
    counted = ("in", "array_contains_any")
    return sum(math.prod(len(v) for _, op, v in each if op in counted) for each in alternatives)


def parse_condition(triple: object) -> Condition:
    if not (isinstance(triple, list) and len(triple) == 3):
        raise ValueError(f"{quoted(triple)} is not such a triple")
    name, op, value = triple
    if not (isinstance(name, str) and re.fullmatch(FIELD_PATH, name)):
        raise ValueError(f"{quoted(name)} is not a field path: no empty part, no space at its ends")
    if op not in OPERATORS:
        raise ValueError(f"{quoted(op)} is not one of the operators {', '.join(OPERATORS)}")
    op = op.replace("array-", "array_").replace("-any", "_any")
    limit = LIST_OPERATORS.get(op)
    if limit and not (isinstance(value, list) and 1 <= len(value) <= limit):
        raise ValueError(f"{op} takes a list of 1 to {limit} values, not {quoted(value)}")
    if op not in ("==", "!=") and (value is None or value != value):
        raise ValueError(f"null goes with == and != only, not with {op}")
    if not encodable(value):
        limits = f"at most 64 bits a number, text is Unicode, nested at most {MAP_DEPTH} deep"
        raise ValueError(f"{quoted(value)} cannot be sent: {limits}")
    return api_field_path(name), op, typed(value)


def encodable(value: object, depth: int = 0) -> bool:
    """Whether a value from JSON has a form in Firestore."""
    if isinstance(value, list | dict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return depth < MAP_DEPTH and all(encodable(one, depth + 1) for one in inner)
    if isinstance(value, str):
        return not re.search(r"[\ud800-\udfff]", value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def typed(value: Any) -> Any:
    """A value from JSON with the two types that JSON lacks, named as in Firestore's REST API."""
    if isinstance(value, list):
        return [typed(one) for one in value]
    if not isinstance(value, dict):
        return value
    for key, parse in (("timestampValue", timestamp_value), ("referenceValue", reference_value)):
        if key in value:
            if len(value) > 1:
                raise ValueError(f"{quoted(value)}: expected {key} alone")
            return parse(value[key])
    return {key: typed(one) for key, one in value.items()}


def timestamp_value(value: object) -> RelativeTime | datetime:
    text = str(value)
    relative = re.fullmatch(RELATIVE, text)
    try:
        if relative:
            sign, number, unit = relative.groups(default="")
            offset = timedelta(**{UNITS[unit or "s"]: int(sign + (number or "0"))})
            datetime(2000, 1, 1) + offset  # what no calendar holds fails here, not in a run
            return RelativeTime(offset)
        if re.fullmatch(RFC3339, text):
            return read_time(text)
    except (ValueError, OverflowError):
        pass
    expected = "now, now-15m, now+2h (s, m, h or d) or a time such as 2026-01-01T00:00:00Z"
    raise ValueError(f"timestampValue {quoted(value)}: expected {expected}")


def reference_value(value: object) -> Reference:
    try:
        return Reference(document_path(value if isinstance(value, str) else ""))
    except ValueError as error:
        raise ValueError(f"referenceValue {quoted(value)}: {error}") from None


def read_time(value: str) -> datetime:
    """A time as people type it: RFC 3339 with any offset and fraction, or Unix seconds.

    One without an offset is UTC. Eight digits are a date, as in 20260101. Raises ValueError.
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


Question = tuple[Filter, ...]  # filters all of which a job matches


def signed_union(alternatives: Filter) -> list[tuple[int, Question]]:
    """Questions whose counts, added with these signs, count a job that matches once.

    An inequality sorts by its field, in whichever alternative it is, and Firestore leaves out of a
    sorted query the jobs without the field. So only alternatives with inequalities on the same
    fields share a query; the jobs that two queries count are subtracted.

    Raises ValueError if that takes more than DISJUNCTIONS questions.
    """
    groups: dict[frozenset[str], list[tuple[Condition, ...]]] = {}
    for each in alternatives:
        fields = frozenset(name for name, op, _ in each if op in SORTING)
        groups.setdefault(fields, []).append(each)
    found: list[Question] = []
    for group in map(tuple, groups.values()):
        beside = [some for some in found if not any(exclusive(group, one) for one in some)]
        found += [(group,), *((*some, group) for some in beside)]
        if len(found) > DISJUNCTIONS:
            raise ValueError(
                f"counting each job once would take more than {DISJUNCTIONS} queries: a job can "
                "match too many alternatives with inequalities on different fields"
            )
    return [(1 if len(some) % 2 else -1, some) for some in found]


def single(signed: Iterable[tuple[int, Question]], beside: int = 0) -> list[Question]:
    """The questions about one group of alternatives, and `beside` more filters."""
    return [question for _, question in signed if len(question) == 1 + beside]


def exclusive(left: Filter, right: Filter) -> bool:
    """Whether no job can match both, as each pair of alternatives wants other values of a field."""

    def wanted(each: tuple[Condition, ...]) -> dict[str, list[Any]]:
        return {name: [v] if op == "==" else v for name, op, v in each if op in ("==", "in")}

    def differ(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> bool:
        shared = one.keys() & other.keys()
        return any(all(v not in other[name] for v in one[name]) for name in shared)

    return all(differ(wanted(one), wanted(other)) for one in left for other in right)


def unmatched_times(variable: str, alternatives: Filter) -> Iterator[str]:
    """Firestore compares values of one type only, so that text never orders with a timestamp."""
    for name, op, value in (condition for each in alternatives for condition in each):
        if op in INEQUALITIES and isinstance(value, str) and re.fullmatch(RFC3339, value):
            yield (
                f"{variable} matches no job: {json.dumps([name, op, value])} compares text, "
                f"which no timestamp matches; if {name} is a timestamp, write "
                '{"timestampValue": "now"} or {"timestampValue": ' + json.dumps(value) + "}"
            )


# ----------------------------------------------------------------------- output and settings

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY, TIME = "|".join(WEEKDAYS), r"(?:[01]\d|2[0-3]):[0-5]\d"
SCHEDULED = rf"(?ai)(\d{{1,10}}) ({DAY})(?:-({DAY}))? ({TIME})-(?!\4)(24:00|{TIME}) (\S+)"


def bounded_integer(least: int, most: int, unit: str) -> Parser:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", raw) or not least <= int(raw) <= most:
            raise ValueError(f"expected a whole number of {unit} from {least} to {most}")
        return int(raw)

    return parse


non_empty = matching(r"(?s).+", "a name, not an empty one")
object_name = matching(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    "a Kubernetes name: lower-case letters, digits, '-' and '.'",
)
collection = matching(
    rf"/*{SEGMENT}(?:/{SEGMENT}/{SEGMENT})*/*",
    "a collection path such as jobs or tenants/acme/jobs, or several, separated by commas: an odd "
    "number of segments each, none of them empty, no space around one",
    lambda raw: raw.strip("/"),
)
boolean = matching("(?i)true|false", "true or false", lambda raw: raw.lower() == "true")
level = matching("(?i)debug|info|warning|error", "DEBUG, INFO, WARNING or ERROR", str.upper)
line_format = matching("(?i)text|json", "text or json", str.lower)
step = matching(r"[0-9]{1,9}%?", "a number of pods such as 2, or a percentage such as 50%")
replica_count = bounded_integer(0, INT32_MAX, "pods")
positive = bounded_integer(1, INT32_MAX, "pods or jobs")
seconds = bounded_integer(0, 31_536_000, "seconds")
window_seconds = bounded_integer(0, 3600, "seconds")  # the HPA's API accepts no longer window
budget_seconds = bounded_integer(1, 3600, "seconds")


def collections(raw: str) -> tuple[str, ...]:
    paths = tuple(collection(path.strip()) for path in raw.split(","))
    if len(set(paths)) < len(paths):
        raise ValueError("expected each collection once, or its jobs would count twice")
    return paths


@dataclass(frozen=True)
class ScheduledMinimum:
    """Hours of the week with a higher minimum, in pods. `days` count from a Monday (0), `begin` and
    `end` are minutes of the day; hours past midnight belong to the day on which they start."""

    text: str
    replicas: int
    days: range
    begin: int
    end: int
    timezone: tzinfo

    def applies(self, now: datetime) -> bool:
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
        form = "expected a time zone such as Asia/Seoul or UTC"
        raise ValueError(f"{quoted(zone)}: {form}") from None


REQUIRED = "required"


def setting(parse: Parser, default: str | None, meaning: str, shown: str = "") -> Any:
    """A field that is read from the variable of the same name in upper case.

    `default` is written as the variable would be, None if there is none; `shown` tells people what
    applies then.
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
    firestore_database: str = setting(non_empty, "(default)", "database ID")
    queue_collection: tuple[str, ...] = setting(collections, None,
        "collection path, such as jobs or tenants/acme/jobs, one document per job; several, "
        "separated by commas, are added up", REQUIRED)
    queue_collection_group: bool = setting(boolean, "false",
        "true: count every collection with that ID, wherever it is")
    waiting_filter: Filter = setting(filters, '[["status", "==", "waiting"]]',
        "JSON list of Firestore filters [field, op, value]; a waiting job matches all of them; [] "
        "counts every document; a list of such lists: a job matches any of them")
    waiting_since_field: str | None = setting(field_path, None,
        "field with the time since which a job has been waiting, such as createdAt; the log line "
        "and the record then include how long the oldest job has waited", "unset")
    busy_filter: Filter | None = setting(filters, None,
        "the same for a job that a pod is working on", "unset: not busy-aware")
    busy_pod_field: str = setting(field_path, "assignedPodId",
        "field of a job's document that holds the name of its pod")
    min_replicas: int = setting(replica_count, "1", "minimum, in pods; 0 scales to zero")
    max_replicas: int = setting(positive, "3", "maximum, in pods")
    scheduled_min_replicas: tuple[ScheduledMinimum, ...] | None = setting(scheduled_minimums, None,
        "hours with a higher minimum, separated by ;, each PODS DAYS HOURS TIMEZONE, such as "
        "5 Mon-Fri 07:30-20:00 Asia/Seoul", "unset")
    jobs_per_pod: int = setting(positive, "1", "target jobs per pod, waiting and busy together")
    scale_up_cooldown_seconds: int = setting(seconds, "120",
        "minimum time from a scale-up to the next scale-up")
    scale_down_cooldown_seconds: int = setting(seconds, "300",
        "minimum time from any rescale to a scale-down")
    scale_up_stabilization_seconds: int = setting(window_seconds, "0",
        "window as in the HPA's behavior.scaleUp, at most 3600")
    scale_down_stabilization_seconds: int = setting(window_seconds, "300",
        "window as in the HPA's behavior.scaleDown, at most 3600")
    scale_up_step: str | None = setting(step, None,
        "maximum pods added at once, as 2 or 50%; 0 disables scale-up", "unset: no limit")
    scale_down_step: str | None = setting(step, None,
        "maximum pods removed at once, as 2 or 50%; 0 disables scale-down", "unset: no limit")
    fallback_replicas: int | None = setting(replica_count, None,
        "minimum pods while the queue stays unreadable; only ever adds pods", "unset: hold")
    fallback_after_seconds: int = setting(seconds, "180", "time unreadable before the fallback")
    polling_interval_seconds: int | None = setting(seconds, None,
        "seconds between looks, 1 or more and less than TIMEOUT_SECONDS",
        "unset: one look per run")
    timeout_seconds: int = setting(budget_seconds, "45",
        "time budget of the whole run, retries and looks included")
    # fmt: on

    @property
    def count_limit(self) -> int:
        """The most jobs worth counting: a billed read covers 1,000 index entries, and more jobs
        than fill the range change nothing."""
        return min(max(1000, self.max_replicas * self.jobs_per_pod), INT32_MAX)

    def minimum(self, now: datetime) -> tuple[int, str]:
        """The minimum that applies, in pods, and the setting it comes from, as people wrote it."""
        least = (self.min_replicas, f"MIN_REPLICAS={self.min_replicas}")
        for scheduled in self.scheduled_min_replicas or ():
            if scheduled.replicas > least[0] and scheduled.applies(now):
                least = (scheduled.replicas, f"SCHEDULED_MIN_REPLICAS={scheduled.text}")
        return least


@dataclass(frozen=True)
class Output:
    """How a run reports. These are parsed first and always have a value, so that every mistake in
    the other settings can be reported; their own are reported with those."""

    # fmt: off
    dry_run: bool = setting(boolean, "false",
        "decide and report, change nothing (--dry-run does the same)")
    log_level: str = setting(level, "INFO",
        "DEBUG, INFO, WARNING or ERROR; the line with the decision is always written")
    log_format: str = setting(line_format, "text",
        "json: one JSON object per line, with severity and message as Cloud Logging reads them")
    termination_log: str = setting(non_empty, "/dev/termination-log",
        "file for the result record; the default is written only if it exists (in a pod), any "
        "other path is created")
    # fmt: on


VARIABLES = {item.name.upper(): item for item in (*fields(Settings), *fields(Output))}


def read_output(environ: Mapping[str, str]) -> Output:
    """The default for each value that is not accepted."""
    values = {}
    for item in fields(Output):
        parse, default = item.metadata["parse"], item.metadata["default"]
        try:
            values[item.name] = parse(environ.get(item.name.upper(), default).strip())
        except ValueError:
            values[item.name] = parse(default)
    return Output(**values)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Parse and check every variable.

    Raises a Failure that names all mistakes at once: variable, value found, what is accepted.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for variable, item in VARIABLES.items():
        default, required = item.metadata["default"], item.metadata["shown"] == REQUIRED
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
    host = environ.get("FIRESTORE_EMULATOR_HOST")
    if host and "/" in host:
        problems.append(f"FIRESTORE_EMULATOR_HOST={quoted(host)}: expected HOST:PORT, no scheme")
    if problems:
        raise Failure("InvalidSettings", "; ".join(problems), exit_code=2)
    return Settings(**{item.name: values[item.name] for item in fields(Settings)})


def contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """The mistakes that show only when settings are compared. `values` lacks those that could not
    be parsed."""
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
    for path in values.get("queue_collection") or ():
        if values.get("queue_collection_group") and "/" in path:
            expected = f"the bare ID of the collections, such as {path.rsplit('/', 1)[-1]}"
            reason = "QUEUE_COLLECTION_GROUP is true"
            yield f"QUEUE_COLLECTION={quoted(path)}: expected {expected}, as {reason}"
    if any(op == "not-in" for each in values.get("busy_filter") or () for _, op, _ in each):
        yield (
            "BUSY_FILTER: expected no not-in: Firestore cannot combine it with the query for the "
            "pods' names; list the values that are busy instead"
        )


def misspelled(environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each likely misspelling of one of our variables: it would be ignored
    silently."""
    for name in sorted(environ.keys() - VARIABLES.keys()):
        if known := did_you_mean(name.upper(), VARIABLES, cutoff=0.85):
            yield f"the variable {name} is unknown to the scaler: did you mean {known}?"


SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass
class Log:
    """Lines on standard output, for people or as JSON objects in the terms of Cloud Logging. Each
    names the Deployment, as far as it is known; `once` are the notes that a run has written."""

    output: Output
    clock: Clock
    namespace: str | None = None
    deployment: str | None = None
    waiting_since: bool = False
    once: set[str] = field(default_factory=set)

    def debug(self, message: Callable[[], str]) -> None:
        if self.output.log_level == "DEBUG":
            self.line("DEBUG", message())

    def line(self, severity: str, message: str) -> None:
        if SEVERITIES.index(severity) >= SEVERITIES.index(self.output.log_level):
            self.write(severity, f": {message}", {})

    def write(self, severity: str, message: str, record: Mapping[str, Any]) -> None:
        """One line, whatever the level."""
        target = "/".join(filter(None, (self.namespace, self.deployment)))
        when = write_time(self.clock())
        message = scrub(f"AutoScaler {target}".rstrip() + message)
        line = f"{when} {severity} {message}"
        if self.output.log_format == "json":
            names = {"namespace": self.namespace, "deployment": self.deployment}
            entry = {"time": when, **names, **record, "severity": severity, "message": message}
            line = json.dumps(entry, ensure_ascii=False)
        # A line that cannot be written is lost; it does not keep the run from its work.
        with suppress(OSError, ValueError):
            print(line, flush=True)


# ------------------------------------------------------------------------------- annotations

ANNOTATION = "queue-scaler/"
LAST_SCALE_TIME = ANNOTATION + "last-scale-time"
LAST_SCALE = ANNOTATION + "last-scale"
RECOMMENDATIONS = ANNOTATION + "recommendations"
FAILING_SINCE = ANNOTATION + "queue-failing-since"
LEASE = ANNOTATION + "scale-down-lease"
PAUSED = ANNOTATION + "paused"
PAUSED_REPLICAS = ANNOTATION + "paused-replicas"
PAUSED_SCALE_IN = ANNOTATION + "paused-scale-in"
PAUSED_SCALE_OUT = ANNOTATION + "paused-scale-out"
PAUSED_UNTIL = ANNOTATION + "paused-until"
PAUSES = (PAUSED, PAUSED_REPLICAS, PAUSED_SCALE_IN, PAUSED_SCALE_OUT)

Recommendation = tuple[int, int]  # when, in Unix seconds, and how many pods


def whole_second(when: datetime) -> datetime:
    """The next whole second: annotations hold no fractions, and no delay may end early."""
    return when + timedelta(microseconds=-when.microsecond % 1_000_000)


def read_history(value: str) -> tuple[Recommendation, ...]:
    """The inverse of `write_history`. Raises ValueError."""
    if not re.fullmatch(r"\s*(\d{1,12}:\d{1,10}\s+)*\d{1,12}:\d{1,10}\s*", value):
        raise ValueError("not a history such as '1767225600:3 1767225660:1'")
    pairs = (word.split(":") for word in value.split())
    return tuple((int(at), int(replicas)) for at, replicas in pairs)


def write_history(entries: Iterable[Recommendation]) -> str | None:
    return " ".join(f"{at}:{replicas}" for at, replicas in sorted(entries)) or None


def read_pause(value: str) -> bool:
    word = value.strip().lower()
    if word not in ("true", "t", "1", "false", "f", "0"):
        raise ValueError("not true or false")
    return word in ("true", "t", "1")


@dataclass(frozen=True)
class Lease:
    """Which look may set deletion costs: until when, the cost it sets, and its token."""

    until: datetime
    cost: int
    token: str

    def __str__(self) -> str:
        return f"{write_time(self.until)} {self.cost} {self.token}"


def read_lease(value: str) -> Lease:
    found = re.fullmatch(r"\s*(\S+) (-?\d{1,10}) ([0-9a-f]+)\s*", value)
    if not found:
        raise ValueError("not a lease of a run")
    return Lease(read_time(found[1]), int(found[2]), found[3])


READERS: Mapping[str, Parser] = {
    LAST_SCALE_TIME: read_time,
    LAST_SCALE: lambda value: value.strip().partition(" ")[0],
    RECOMMENDATIONS: read_history,
    FAILING_SINCE: read_time,
    LEASE: read_lease,
    PAUSED_UNTIL: read_time,
    PAUSED: read_pause,
    PAUSED_REPLICAS: lambda value: replica_count(value.strip()),
    PAUSED_SCALE_IN: read_pause,
    PAUSED_SCALE_OUT: read_pause,
}
# What is done about a value that cannot be read.
UNREADABLE = dict.fromkeys(READERS, "counts as absent") | {
    RECOMMENDATIONS: "the window starts over",
    PAUSED_UNTIL: "nothing expires",
    PAUSED: "counts as true",
    PAUSED_REPLICAS: "holds the current number",
    PAUSED_SCALE_IN: "counts as true",
    PAUSED_SCALE_OUT: "counts as true",
}


@dataclass(frozen=True)
class State:
    """What the Deployment's annotations say. `last_scale` is the direction, if it is "up" or
    "down"; `expired` are paused-until and the pauses that it has ended, to be removed; `warnings`
    name each value that is not applied."""

    last_scale_time: datetime | None = None
    last_scale: str | None = None
    recommendations: tuple[Recommendation, ...] = ()
    queue_failing_since: datetime | None = None
    scale_down_lease: Lease | None = None
    paused_until: datetime | None = None
    paused: bool = False
    paused_scale_in: bool = False
    paused_scale_out: bool = False
    paused_replicas: int | None = None
    expired: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def until(self) -> str:
        return f" until {write_time(self.paused_until)}" if self.paused_until else ""


def parse_state(
    annotations: Mapping[str, str],
    settings: Settings,
    now: datetime,
    restored: frozenset[str] = frozenset(),
) -> State:
    """Read our annotations: parse them, end what has expired, drop what a rollback restored.

    A value that cannot be parsed counts as absent, with a warning, except for a pause: whoever
    wrote one wanted to pause (KEDA reads it so, too). `restored` are those that a rollback brought
    back: they are not applied, except that a pause among them still pauses, and a restored
    paused-replicas holds the current number.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name in READERS.keys() & annotations.keys():
        try:
            values[name] = READERS[name](annotations[name])
        except ValueError as error:
            problems[name] = f"{error}: {UNREADABLE[name]}"
    cooldowns = settings.scale_up_cooldown_seconds, settings.scale_down_cooldown_seconds
    latest = now + timedelta(seconds=max(cooldowns) + 1)  # one second for `whole_second`
    for name in (LAST_SCALE_TIME, FAILING_SINCE):
        if name in values and values[name] > latest:
            problems[name] = "further ahead than the longest cooldown: counts as absent"
    # A minute for clocks that differ.
    longest = timedelta(seconds=settings.timeout_seconds + 60)
    if LEASE in values and values[LEASE].until > now + longest:
        problems[LEASE] = "further ahead than a run can last: counts as absent"
    if LEASE in restored:  # nobody's: there is nothing that anyone could do about it
        values.pop(LEASE, None)
    for name in (restored & READERS.keys() & annotations.keys()) - {LEASE}:
        holds = name in PAUSES and values.get(name) is True
        applied = "the pause holds" if holds else "not applied"
        problems[name] = f"may have been restored by a rollback: {applied}"
        if name in (*PAUSES, PAUSED_UNTIL):
            problems[name] += "; delete it, and set it again with kubectl annotate if intended"
    until = values.get(PAUSED_UNTIL) if PAUSED_UNTIL not in problems else None
    expired: tuple[str, ...] = ()
    if until and now >= until:
        ended = [name for name in PAUSES if name in annotations and name not in restored]
        expired = (PAUSED_UNTIL, *ended)
    given = {name: values[name] for name in values.keys() - problems.keys() - set(expired)}
    for name in PAUSES:
        if name in problems and name not in expired and values.get(name) is not False:
            given[PAUSED if name == PAUSED_REPLICAS else name] = True
    warnings = [f"{name}={quoted(annotations[name])}: {problems[name]}" for name in problems]
    warnings += unknown_annotations(annotations)
    named = {name.removeprefix(ANNOTATION).replace("-", "_"): v for name, v in given.items()}
    return State(**named, expired=expired, warnings=tuple(sorted(warnings)))


def unknown_annotations(names: Iterable[str]) -> Iterator[str]:
    """A warning for each annotation under our prefix that is none of ours: it would be ignored
    silently."""
    ours = [known.removeprefix(ANNOTATION) for known in READERS]
    for name in names:
        if name.startswith(ANNOTATION) and name not in READERS:
            likely = did_you_mean(name.removeprefix(ANNOTATION), ours, cutoff=0.6)
            meant = f"did you mean {ANNOTATION}{likely}?" if likely else "delete it"
            yield f"the annotation {name} is unknown to the scaler: {meant}"


def expect(kind: type[T], found: Any) -> T:
    """A part of a response that is of this kind. Raises ValueError if it is not."""
    if not isinstance(found, kind):
        raise ValueError(f"expected {kind.__name__}, not {quoted(found)}")
    return found


def owned(entry: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The fields under a path that an entry of managedFields owns."""
    node = entry.get("fieldsV1") or {}
    for key in path:
        node = node.get(key) or {}
    return expect(dict, node)


# The commands with which people edit have names of their own.
EDITORS = re.compile(r"kubectl-(annotate|edit|patch|replace|client-side-apply)|" + FIELD_MANAGER)
BARE_CLIENT = re.compile(r"(kubectl|oc)(\.exe)?|k9s")


def restored(managed: Sequence[Mapping[str, Any]], created: str) -> frozenset[str]:
    """Our annotations that a rollback brought back.

    A rollback writes the annotations and the pod template of an older ReplicaSet in one Update,
    under the bare name of the client. If it only removed fields of the template, the name alone
    tells. Whoever created the Deployment wrote both, too.

    The time of the last scale is read as it is: an older one holds nothing up for longer.
    """
    undone, others = set[str](), {f"f:{LAST_SCALE_TIME}", f"f:{LAST_SCALE}"}
    for entry in managed:
        manager = str(entry.get("manager"))
        update = entry.get("operation") == "Update" and not entry.get("subresource")
        edited = EDITORS.fullmatch(manager) or entry.get("time") == created
        whole = owned(entry, "f:spec", "f:template") or BARE_CLIENT.fullmatch(manager)
        names = undone if update and not edited and whole else others
        names.update(owned(entry, "f:metadata", "f:annotations"))
    ours = (name.removeprefix("f:") for name in undone - others)
    return frozenset(name for name in ours if name.startswith(ANNOTATION))


# Clients that users act with: kubectl and oc under any name, consoles, desktop programs, and the
# browsers and libraries that web consoles identify themselves as.
PEOPLE = re.compile(
    r"(?i)(kubectl|oc|k9s|kubecolor|headlamp|rancher|mozilla|node-fetch|okhttp|octant|aptakube)"
    r"([-._].*)?|.*(lens|dashboard|console).*"
)


def other_writer(owners: Sequence[Mapping[str, Any]], last_scale: datetime | None) -> str | None:
    """Who sets `spec.replicas` besides this scaler, if it is not a person.

    Whoever created the Deployment owns the field, too: only a change after the scaler's own, or
    one through the scale subresource, is a second writer's.
    """
    last = max(owners, key=lambda entry: str(entry.get("time") or ""), default={})
    manager, at = str(last.get("manager")), str(last.get("time") or "")
    ours = FIELD_MANAGER in {entry.get("manager") for entry in owners}
    if not last or ours or PEOPLE.fullmatch(manager):
        return None
    if last.get("subresource") == "scale":
        manager += " through the scale subresource"
        if "controller-manager" in manager:
            manager = f"a HorizontalPodAutoscaler ({manager})"
    elif last_scale is None or at <= write_time(last_scale):
        return None
    return manager + (at and f" at {at}")


# ---------------------------------------------------------------------------------- decision


@dataclass(frozen=True)
class QueueLength:
    """What was read of the queue, in jobs. `busy` is None if it was not read; so is
    `oldest_seconds`, how long the oldest waiting job has waited."""

    waiting: int
    capped: bool = False
    busy: int | None = None
    oldest_seconds: float | None = None

    def __str__(self) -> str:
        waiting = f"{self.waiting} or more" if self.capped else str(self.waiting)
        jobs, oldest = ("job", "") if waiting == "1" else ("jobs", ", the oldest")
        text = f"{waiting} {jobs} waiting"
        if self.oldest_seconds is not None:
            text += f"{oldest} for {duration(self.oldest_seconds)}"
        return text + ("" if self.busy is None else f", {self.busy} busy")


@dataclass(frozen=True)
class Removable:
    """How many replicas can go without hitting a busy pod, and why no more can."""

    pods: int
    because: str = ""


@dataclass(frozen=True)
class Inputs:
    """All that a decision rests on.

    `current` is spec.replicas, in pods; `own_zero` whether a 0 there was set by this scaler;
    `reach`, how many pods paused-replicas may remove now, if not all that it asks for. What was
    not read is None.
    """

    now: datetime
    current: int
    state: State = State()
    queue: QueueLength | None = None
    removable: Removable | None = None
    own_zero: bool = False
    reach: Removable | None = None


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of a number of pods: another number or, with a reason, to keep the current
    one. `wait`: seconds until the delay that holds it back ends."""

    replicas: int
    reason: Reason | None = None
    because: str = ""
    wait: float | None = None


@dataclass(frozen=True)
class Decision:
    """How many replicas the Deployment gets and why; with names and times, the result record.

    `replicas` is None if it is not known what the Deployment has now, `desired` (the
    recommendation within the range) and `queue` if the queue was not read. `annotations` are those
    to write: None removes one, and those not named stay as they are. `advice` says what to do,
    `wait` is the number of seconds until a delay ends.
    """

    replicas: int | None
    reason: Reason
    message: str
    current: int | None = None
    desired: int | None = None
    queue: QueueLength | None = None
    annotations: Mapping[str, str | None] = field(default_factory=dict)
    exit_code: int = 0
    advice: str = ""
    warnings: tuple[str, ...] = ()
    wait: float | None = None

    @property
    def change(self) -> int:
        """Pods added, or removed if it is below 0."""
        if self.replicas is None or self.current is None:
            return 0
        return self.replicas - self.current


def pods(number: int) -> str:
    return "1 pod" if number == 1 else f"{number} pods"


def duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {unit}"
    return f"{int(seconds)} s"


def decide(settings: Settings, inputs: Inputs) -> Decision:
    """The rules of the scaler, in their order. Pure: no I/O, no clock.

    | rule                                                   | function                        |
    |--------------------------------------------------------|---------------------------------|
    | 1 paused, paused-replicas, or a paused direction       | `paused`, `paused_direction`    |
    | 2 disabled: 0 replicas that this scaler did not set    | `scaling_disabled`              |
    | 3 outside the range: back into it immediately          | `out_of_range`                  |
    | 4 the recommendation: pods for the jobs, in the range  | `recommend`                     |
    | 5 stabilization windows, as in the HPA                 | `stabilize`                     |
    | 6 at most one step                                     | `limit_step`                    |
    | 7 a scale-down removes idle pods only                  | `spare_busy_pods`               |
    | 8 cooldowns since the last rescale                     | `cool_down`                     |

    Rules 1 to 3 decide alone and need no queue; rule 3 respects a paused direction and rule 7.
    Rules 4 to 8 follow the queue: each of 5 to 8 takes the number of the one before and returns
    another one, or a reason to hold. `without_queue` replaces them while the queue is unreadable.
    """
    return override(settings, inputs) or follow_queue(settings, inputs)


def override(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rules 1 to 3. None if the queue decides."""
    rules = (paused, scaling_disabled, out_of_range)
    return next((found for rule in rules if (found := rule(settings, inputs))), None)


def conclude(inputs: Inputs, verdict: Verdict, reason: Reason, why: str) -> Decision:
    """The decision for a number of pods, with its reason unless the verdict has one to hold."""
    return Decision(
        verdict.replicas,
        verdict.reason or reason,
        f"{why}; {outcome(inputs.current, verdict)}",
        inputs.current,
        queue=inputs.queue,
        # Only consecutive failures of the queue count: a look that does not need it resets them.
        annotations={FAILING_SINCE: None},
        wait=verdict.wait,
    )


def outcome(current: int, verdict: Verdict) -> str:
    number = verdict.replicas
    if number == current:
        return f"stays at {pods(current)}{verdict.because}"
    return f"scaled {'up' if number > current else 'down'} from {current} to {pods(number)}"


def paused(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 1, the forms that hold a number."""
    state = inputs.state
    if state.paused:
        why = f"paused by annotation{state.until}"
        if state.paused_replicas is not None:
            why += f", {PAUSED_REPLICAS}={state.paused_replicas} waits until it is deleted"
        return conclude(inputs, Verdict(inputs.current), "Paused", why)
    if state.paused_replicas is not None:
        why = f"{PAUSED_REPLICAS}={state.paused_replicas}{state.until}"
        number = state.paused_replicas
        if inputs.reach and number < inputs.current - inputs.reach.pods:
            number = inputs.current - inputs.reach.pods
            why += inputs.reach.because
        return conclude(inputs, Verdict(number), "Paused", why)
    return None


def scaling_disabled(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 2. With MIN_REPLICAS=0 a 0 is a number like any other, in scheduled hours, too."""
    if inputs.current > 0 or settings.min_replicas == 0 or inputs.own_zero:
        return None
    why = f"scaled to 0 externally despite MIN_REPLICAS={settings.min_replicas}"
    held = Verdict(0, "ScalingDisabled", ", disabled until someone scales it to 1 or more")
    return conclude(inputs, held, "ScalingDisabled", why)


def out_of_range(settings: Settings, inputs: Inputs) -> Decision | None:
    """Rule 3: back into the range immediately, as the HPA does; busy pods stay protected."""
    reason: Reason = "TooFewReplicas"
    bound, limit = settings.minimum(inputs.now)
    where = "below"
    if inputs.current > settings.max_replicas:
        bound, reason, where = settings.max_replicas, "TooManyReplicas", "above"
        limit = f"MAX_REPLICAS={bound}"
    elif inputs.current >= bound:
        return None
    verdict = apply_rules((paused_direction, spare_busy_pods), settings, inputs, bound)
    return conclude(inputs, verdict, reason, f"{pods(inputs.current)}, {where} {limit}")


def follow_queue(settings: Settings, inputs: Inputs) -> Decision:
    """Rules 4 to 8, and what the stabilization windows have to remember of them."""
    desired, why = recommend(settings, inputs)
    verdict = Verdict(desired, "AtTarget")
    if desired != inputs.current:
        rules = (paused_direction, stabilize, limit_step, spare_busy_pods, cool_down)
        verdict = apply_rules(rules, settings, inputs, desired)
    reason: Reason = "ScaledUp" if desired > inputs.current else "ScaledDown"
    decision = conclude(inputs, verdict, reason, why)
    history = None
    if not paused_direction(settings, inputs, desired).reason:
        history = write_history(new_history(settings, inputs, desired, decision.change))
    annotations = {**decision.annotations, RECOMMENDATIONS: history}
    return replace(decision, desired=desired, annotations=annotations)


Rule = Callable[[Settings, Inputs, int], Verdict]


def apply_rules(rules: Sequence[Rule], settings: Settings, inputs: Inputs, target: int) -> Verdict:
    """One rule after another, each on the number of the one before; the first hold ends it."""
    verdict = Verdict(target)
    for rule in rules:
        verdict = rule(settings, inputs, verdict.replicas)
        if verdict.reason:
            break
    return verdict


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


def disabled(inputs: Inputs, up: bool, by: str) -> Verdict:
    """A direction in which nothing happens, and the setting or annotation that says so."""
    because = f", as scale-{'up' if up else 'down'} is disabled ({by})"
    return Verdict(inputs.current, "ScaleUpDisabled" if up else "ScaleDownDisabled", because)


def paused_direction(settings: Settings, inputs: Inputs, target: int) -> Verdict:
    """Rule 1, the forms that disable a direction."""
    state, up = inputs.state, target > inputs.current
    off = target != inputs.current and (state.paused_scale_out if up else state.paused_scale_in)
    by = f"{PAUSED_SCALE_OUT if up else PAUSED_SCALE_IN}{state.until}"
    return disabled(inputs, up, by) if off else Verdict(target)


def stabilize(settings: Settings, inputs: Inputs, target: int) -> Verdict:
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
        return Verdict(stable)
    newest = max(at for at, n in entries if (n <= current if up else n >= current))
    wait = newest + window - inputs.now.timestamp()
    variable = f"SCALE_{'UP' if up else 'DOWN'}_STABILIZATION_SECONDS"
    because = f" for {math.ceil(wait)} s more ({variable}={window})"
    return Verdict(current, "ScaleUpStabilized" if up else "ScaleDownStabilized", because, wait)


# Looks at most this far apart, in seconds, are in a row: one run a minute, and one that is missed.
IN_A_ROW_SECONDS = 150


def within_window(inputs: Inputs, window: int) -> set[Recommendation]:
    """The past recommendations inside a window, in seconds; one exactly as old is outside.

    Without any, the recommendation so far is the current number, as in the HPA controller's
    `recordInitialRecommendation`. If looks are always further apart than the window is long, there
    usually are none, and that would hold forever: the HPA then follows the newest recommendation
    alone, and so does this. A history from a clock ahead of ours counts as of now, so that it
    cannot hold for longer than its window.
    """
    now = inputs.now.timestamp()
    entries = {(min(at, math.ceil(now)), n) for at, n in inputs.state.recommendations}
    inside = {(at, replicas) for at, replicas in entries if at > now - window}
    times = sorted({at for at, _ in entries})
    usual_gap = times[-1] - times[-2] if len(times) > 1 else 0
    in_a_row = times and now - times[-1] <= max(IN_A_ROW_SECONDS, 2 * usual_gap)
    return inside if inside or in_a_row or window == 0 else {(math.ceil(now), inputs.current)}


def new_history(
    settings: Settings, inputs: Inputs, desired: int, change: int
) -> set[Recommendation]:
    """What the windows have to remember, with this look's recommendation: nothing at rest, as
    starting over could only make them hold from one look later."""
    up = settings.scale_up_stabilization_seconds
    down = settings.scale_down_stabilization_seconds
    replicas = inputs.current + change
    if (desired >= replicas or not down) and (desired <= replicas or not up):
        return set()
    now = math.ceil(inputs.now.timestamp())
    before = max((at for at, _ in inputs.state.recommendations if at < now), default=None)
    last_look = {entry for entry in inputs.state.recommendations if entry[0] == before}
    windows = within_window(inputs, up) | within_window(inputs, down)
    return {*last_look, *windows, (now, desired)}


def limit_step(settings: Settings, inputs: Inputs, target: int) -> Verdict:
    """Rule 6: at most one step towards the target, and at least one pod of it. The percentages
    are rounded in floating point because the HPA controller's are."""
    current, up = inputs.current, target > inputs.current
    limit = settings.scale_up_step if up else settings.scale_down_step
    if limit is None:
        return Verdict(target)
    size = int(limit.rstrip("%"))
    if size == 0:
        return disabled(inputs, up, f"SCALE_{'UP' if up else 'DOWN'}_STEP={limit}")
    if up:
        most = math.ceil(current * (1 + size / 100)) if "%" in limit else current + size
        return Verdict(min(target, max(most, current + 1)))
    least = int(current * (1 - size / 100)) if "%" in limit else current - size
    return Verdict(max(target, least))


def spare_busy_pods(settings: Settings, inputs: Inputs, target: int) -> Verdict:
    """Rule 7: a scale-down goes only as far as it hits no busy pod."""
    removable, current = inputs.removable, inputs.current
    if target > current or removable is None:
        return Verdict(target)
    if removable.pods <= 0:
        return Verdict(current, "WorkersBusy", removable.because)
    return Verdict(max(target, current - removable.pods))


def cool_down(settings: Settings, inputs: Inputs, target: int) -> Verdict:
    """Rule 8: a scale-up waits after a scale-up, a scale-down after any rescale. If the direction
    of the last one is unknown, both wait."""
    last, up = inputs.state.last_scale_time, target > inputs.current
    cooldown = settings.scale_up_cooldown_seconds if up else settings.scale_down_cooldown_seconds
    if last is None or not cooldown or (up and inputs.state.last_scale == "down"):
        return Verdict(target)
    wait = cooldown - (inputs.now - last).total_seconds()
    if wait <= 0:
        return Verdict(target)
    variable = f"SCALE_{'UP' if up else 'DOWN'}_COOLDOWN_SECONDS"
    because = f" for {math.ceil(wait)} s more ({variable}={cooldown} since {write_time(last)})"
    reason: Reason = "ScaleUpCooldown" if up else "ScaleDownCooldown"
    return Verdict(inputs.current, reason, because, wait)


def without_queue(settings: Settings, inputs: Inputs, problem: QueueFailure) -> Decision:
    """What an unreadable queue leads to: the replicas stay, or after a while go up to the
    fallback. They never go down, and the fallback does not act against paused-replicas."""
    current, fallback, state = inputs.current, settings.fallback_replicas, inputs.state
    stays = f"{problem}; stays at {pods(current)}"
    held = Decision(current, problem.reason, stays, current, exit_code=problem.exit_code)
    held = replace(held, advice=problem.advice)
    if override(settings, inputs):
        waits = f"; {PAUSED_REPLICAS}={state.paused_replicas} waits for the queue"
        waits = "" if state.paused_replicas is None else waits
        return replace(held, message=f"{stays}, as it is unknown which pods are busy{waits}")
    if fallback is None:
        return held
    since = state.queue_failing_since
    if since is None:
        since = whole_second(inputs.now)
        held = replace(held, annotations={FAILING_SINCE: write_time(since)})
    wait = settings.fallback_after_seconds - (inputs.now - since).total_seconds()
    if wait > 0:
        message = f"{stays}; falls back to FALLBACK_REPLICAS={fallback} in {math.ceil(wait)} s"
        return replace(held, message=message, wait=wait)
    if fallback > current:
        verdict = apply_rules((paused_direction, limit_step), settings, inputs, fallback)
        if verdict.reason:
            return replace(held, reason=verdict.reason, message=stays + verdict.because)
    number = max(current, fallback)
    why = f"{problem}; falls back to FALLBACK_REPLICAS={fallback}"
    message = f"{why}; {outcome(current, Verdict(number))}"
    return replace(held, replicas=number, reason="Fallback", message=message)


def rescale_annotations(decision: Decision, now: datetime) -> dict[str, str | None]:
    """What a decision that changes the replicas writes beside them, and in the same patch."""
    if not decision.change:
        return {}
    verb = "up" if decision.change > 0 else "down"
    return {
        LAST_SCALE_TIME: write_time(whole_second(now)),
        LAST_SCALE: f"{verb} {decision.current}->{decision.replicas}",
    }


# ----------------------------------------------------------------------------------- removal

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
MARKS_BEGAN = datetime(2020, 1, 1, tzinfo=UTC)
HIGHEST_MARK = -100_000_000  # each deletion cost that a run sets is this or lower
MARK_OF_BUSY = INT32_MAX  # except that 0.2.0 set this on busy pods, and might have left it


@dataclass(frozen=True)
class Pod:
    """A live pod of the Deployment.

    `version` is its resourceVersion, `owner` its ReplicaSet's UID. `rank` sorts pods as the
    ReplicaSet controller does before it looks at deletion costs: the lowest goes first.
    `own_cost`: the deletion cost was set by a run of this scaler. `addresses`: its IP addresses and
    its host name, if the template sets one.
    """

    name: str
    uid: str
    version: str
    owner: str
    node: str
    rank: tuple[bool, int, bool]
    cost: int = 0
    own_cost: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplicaSet:
    """One that the Deployment controls, and the numbers of pods that it wants and has."""

    uid: str
    replicas: int
    present: int = 0


@dataclass(frozen=True)
class Fleet:
    """The live pods of the Deployment. `unsettled` says why a scale-down could not be steered now,
    or is empty; `uncertain` whether there may be more pods; `removing` whether a ReplicaSet still
    has pods to remove, so that no deletion cost may change."""

    pods: tuple[Pod, ...]
    unsettled: str = ""
    uncertain: bool = False
    removing: bool = False

    @property
    def names(self) -> list[str]:
        return [pod.name for pod in self.pods]

    @property
    def marked(self) -> list[Pod]:
        """Pods whose deletion cost a run has set, and that are still here: its scale-down did not
        come to its end. A higher cost was restored by a run, or set by 0.2.0, and harms nothing."""
        return [pod for pod in self.pods if pod.own_cost and pod.cost <= HIGHEST_MARK]


def make_fleet(
    replicas: int, observed: bool, sets: Sequence[ReplicaSet], live: Iterable[Pod]
) -> Fleet:
    """The Deployment's own pods among those that its selector finds.

    `replicas` is the Deployment's number, `observed` whether its controller has seen the last
    change. The controller shares a scale-down among the ReplicaSets that want pods, in proportion
    to their sizes and even if one of them has none, so that no deletion cost could steer it. A new
    Deployment that is about to adopt a ReplicaSet does not control it yet.
    """
    own = {one.uid: one.replicas for one in sets}
    mine = tuple(pod for pod in live if pod.owner in own)
    present, there = Counter(pod.owner for pod in mine), sum(one.present for one in sets)
    removing = any(present[uid] > wanted for uid, wanted in own.items())
    rollout = sum(wanted > 0 for wanted in own.values()) > 1
    behind = not observed or (sum(own.values()) != replicas and not rollout)
    unsettled = ""
    if rollout:
        unsettled = "a rollout is in progress"
    elif behind:
        unsettled = "the Deployment controller has not applied the last change yet"
    elif len(mine) < there:
        unsettled = f"only {len(mine)} of {pods(there)} were listed"
    elif removing:
        unsettled = "the last scale-down has not finished yet"
    return Fleet(mine, unsettled, behind or len(mine) < there, removing or not observed)


def are_busy(number: int) -> str:
    return "1 pod is busy" if number == 1 else f"{number} pods are busy"


def removable(fleet: Fleet, current: int, busy: frozenset[str], cost: int | None) -> Removable:
    """How many of `current` replicas can go so that the controllers remove idle pods only.

    The ReplicaSet controller removes pods that are unassigned, pending or not ready before it
    compares deletion costs, so an idle pod is a safe victim only if it comes before the first busy
    one in the whole order. With `cost`, each idle pod could still be given that deletion cost;
    without, the costs are what they are.
    """
    ranks = [(pod.rank, pod.cost) for pod in fleet.pods if pod.name in busy]
    if fleet.uncertain and not ranks:
        return Removable(0, f", as {fleet.unsettled}, and a pod may be busy")
    if not ranks:
        return Removable(current)
    if fleet.unsettled:
        return Removable(0, f", as {fleet.unsettled} and {are_busy(len(ranks))}")
    idle = [pod for pod in fleet.pods if pod.name not in busy]
    safe = sum((pod.rank, pod.cost if cost is None else cost) < min(ranks) for pod in idle)
    # Replicas without a pod go before any pod does.
    missing = max(0, current - len(fleet.pods))
    because = ", as removing one would hit a busy pod"
    if idle and not safe and cost is not None:
        first = min((pod for pod in fleet.pods if pod.name in busy), key=lambda pod: pod.rank)
        because = f", as the busy pod {first.name} would be removed first"
    return Removable(safe + missing, because)


def choose_victims(live: Sequence[Pod], busy: Iterable[str], count: int) -> list[Pod]:
    """The idle pods to remove: first those that the ReplicaSet controller removes first, by their
    rank and by a deletion cost that somebody else has set, then those on the nodes with the fewest
    busy pods and, of these, with the fewest pods to remove, so that whole nodes become free."""
    held = set(busy)
    busy_on = Counter(pod.node for pod in live if pod.name in held)
    idle = [pod for pod in live if pod.name not in held]
    idle_on = Counter(pod.node for pod in idle)

    def order(pod: Pod) -> tuple[Any, ...]:
        # That of a run counts as none, unless the run only gave back what was there before.
        none = pod.own_cost and (pod.cost <= HIGHEST_MARK or pod.cost == MARK_OF_BUSY)
        cost = 0 if none else pod.cost
        return pod.rank, cost, busy_on[pod.node], idle_on[pod.node], pod.node, pod.name

    return sorted(idle, key=order)[: max(0, count)]


def victim_cost(now: datetime, live: Iterable[Pod], lease: Lease | None) -> int:
    """A deletion cost lower than any that is there, and lower than any that an earlier run, however
    late, may still set: it falls with time."""
    lowest = -int((now - MARKS_BEGAN).total_seconds())
    there = [pod.cost for pod in live] + ([lease.cost] if lease else [])
    return max(INT32_MIN, min([lowest, HIGHEST_MARK, *(cost - 1 for cost in there)]))


@dataclass(frozen=True)
class BusyPods:
    """Which live pods hold a busy job, how many such jobs there are, and what is odd about them.
    `inexact`: some name their pod in another form than by its name; `incomplete`: and there are
    more of them than were read."""

    names: frozenset[str] = frozenset()
    jobs: int = 0
    inexact: bool = False
    incomplete: bool = False
    warnings: tuple[str, ...] = ()


def find_busy_pods(live: Sequence[Pod], jobs: Iterable[tuple[str, object]], name: str) -> BusyPods:
    """Match busy jobs, each its document's path and the value of the field `name`, with pods.

    People store a pod's name in many forms. Each in which it can be recognized counts: whoever
    holds a job must not be removed for its spelling.
    """
    exact = {pod.name for pod in live}
    forms = {form.lower(): pod.name for pod in live for form in (pod.name, pod.uid)}
    # What several pods may share, such as the node's name, which a worker with hostNetwork stores:
    # which of them it is, is unknown.
    places: dict[str, set[str]] = {}
    for pod in live:
        host = pod.node.partition(".")[0]
        for place in filter(None, (pod.node, "" if host.isdigit() else host, *pod.addresses)):
            places.setdefault(place.lower(), set()).add(pod.name)
    busy: set[str] = set()
    held: set[str] = set()
    odd: list[str] = []
    unknown: list[str] = []
    nameless: list[str] = []
    for path, value in jobs:
        shown = f"{quoted(getattr(value, 'path', value))} in {path}"
        if isinstance(value, str) and value in exact:
            found = {value}
        elif found := set().union(*(recognize(text, forms, places) for text in texts(value))):
            some = ", ".join(sorted(found)[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            odd.append(f"{shown} counts as {some}{more}")
        else:
            (unknown if any(texts(value)) else nameless).append(shown)
        busy |= found
        held |= {path} if found else set()
    warnings = []
    if odd:
        warnings.append(
            f"{busy_jobs(odd, 'does', 'do')} not hold the plain name of a pod in {name}: {odd[0]}; "
            "such a pod is not removed, but its job may not be counted; store metadata.name from "
            "the downward API"
        )
    if nameless:
        warnings.append(
            f"{busy_jobs(nameless, 'names', 'name')} no pod, such as {name}={nameless[0]}; "
            "the pod that works on such a job is not protected; set the field in the same write "
            "that claims the job"
        )
    if unknown:
        warnings.append(
            f"{busy_jobs(unknown, 'names', 'name')} no live pod of the Deployment, such as "
            f"{name}={unknown[0]}, and {'protects' if len(unknown) == 1 else 'protect'} none; if "
            "that worker is gone, return its job to the queue"
        )
    return BusyPods(frozenset(busy), len(held), bool(odd), warnings=tuple(warnings))


def busy_jobs(found: Sequence[str], one: str, many: str) -> str:
    return f"1 busy job {one}" if len(found) == 1 else f"{len(found)} busy jobs {many}"


def texts(value: object) -> Iterator[str]:
    """All text inside a field's value."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]  # a set is a map of its members
    if isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)
    elif value is not None:
        path = getattr(value, "path", value)  # a document reference
        yield str(path).strip().lower()


def recognize(text: str, forms: Mapping[str, str], places: Mapping[str, set[str]]) -> set[str]:
    """The pods that a text names: as a whole, or as a part of it, as in `namespace/pod`, in a host
    name with its domain, or an address with a port."""
    if text in forms:
        return {forms[text]}
    words = re.findall(r"[\w.:-]*[\w-]", text)
    parts = [*words, *(word.rpartition(":")[0] for word in words), text.partition(".")[0]]
    found = set().union(*(places.get(part, ()) for part in parts))
    return found or {name for form, name in forms.items() if form in text}


# ---------------------------------------------------------------------------------- deadline

DELAY_SECONDS = 15  # a delay that ends within this is waited for


@dataclass(frozen=True)
class Deadline:
    """The time of one look: when it ends, on the monotonic clock, and how long one call may take,
    in seconds. `run_end` is when the run has to be over."""

    end: float
    call_seconds: float
    run_end: float

    def left(self, reserve: bool = False) -> float:
        """Seconds until the look's deadline. The queue, and reading again, keep the time of one
        call in reserve for what comes after, such as the patch of a fallback."""
        return max(0.0, self.end - time.monotonic() - (self.call_seconds if reserve else 0))

    def for_call(self, reserve: bool = False) -> float:
        """Seconds for one call. Never 0, which the clients would read as no limit."""
        return max(0.05, min(self.call_seconds, self.left(reserve)))

    def overslept(self) -> float:
        """Seconds since the run should have ended, if it is well past that: the watchdog would
        have ended it, so the whole process must have been suspended."""
        late = time.monotonic() - self.run_end
        return late if late > 1 else 0.0

    def retrying(self, flag: str, reserve: bool = False) -> Retrying:
        """Tries again after failures with that flag, while the next try still begins before the
        deadline, with growing, jittered pauses after the server's Retry-After."""
        import tenacity

        again = tenacity.retry_if_exception(lambda error: getattr(error, flag, False))
        asked = tenacity.wait_exception(lambda error: getattr(error, "retry_after", 0.0))
        most = 1 if flag == "read_again" else 5  # a lost race is no overload
        pause = asked + tenacity.wait_random_exponential(multiplier=0.2, max=most)
        stop = tenacity.stop_before_delay(self.left(reserve))
        return tenacity.Retrying(retry=again, wait=pause, stop=stop, reraise=True)


def look_deadline(run_end: float, margin: float, interval: int | None) -> Deadline:
    """A look ends with the run, a margin earlier, or, if others follow, after an interval; but it
    has at least 5 s. One call gets a third of it, so that one without a response can be retried."""
    now, end = time.monotonic(), run_end - margin
    if interval is not None:
        end = min(end, now + max(5, interval))
    return Deadline(end, max(0.05, min(10.0, (end - now) / 3)), run_end)


@dataclass
class Progress:
    """How far a look has come, for whoever has to report it if it ends early.

    `current` is the number of pods it has read; `in_doubt` is true while a patch may or may not
    have been applied; `done` is what it has already done, whatever fails after that.
    """

    deadline: Deadline
    stage: str = "reading the settings"
    reason: Reason = "ClusterUnavailable"
    current: int | None = None
    in_doubt: bool = False
    done: Decision | None = None

    def enter(self, stage: str, reason: Reason) -> None:
        """What the look is about to wait for, and the reason to end with if that fails."""
        self.stage, self.reason = stage, reason
        if late := self.deadline.overslept():
            raise Failure("Interrupted", suspended(late), exit_code=INTERRUPTED)

    def abort(self, why: str, reason: Reason | None = None, exit_code: int = 1) -> Decision:
        """The decision of a look that ends early: what it has done, or else no change."""
        if self.done:
            return self.done
        if self.in_doubt:
            why += "; not known whether the patch was applied, the next look will check"
        elif self.current is not None:
            why += f"; stays at {pods(self.current)}"
        replicas = None if self.in_doubt else self.current
        return Decision(replicas, reason or self.reason, why, self.current, exit_code=exit_code)


INTERRUPTED = 128 + signal.SIGTERM


def suspended(late: float) -> str:
    until = f"until {late:.0f} s past its deadline"
    return f"the process was suspended {until}; the next run looks again"


def sleep(seconds: float) -> None:
    """time.sleep, except under a clock that a test moves."""
    threading.Event().wait(seconds)


def concurrently(action: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """The results in the order of the items. The first failure is raised once what has begun has
    ended; the rest is not begun."""
    if len(items) < 2:
        return [action(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(CONCURRENT_CALLS, len(items))) as pool:
        return list(pool.map(action, items))


CONCURRENT_CALLS = 8


# ------------------------------------------------------------------------------------- queue

# By gRPC status code: what gets better without help, and what to do about what does not.
TRANSIENT_CODES = frozenset(
    ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "CANCELLED"]
)
ADVICE = {
    "UNAUTHENTICATED": "check GOOGLE_APPLICATION_CREDENTIALS or Workload Identity",
    "PERMISSION_DENIED": "grant the scaler's Google account the IAM role roles/datastore.viewer",
    "NOT_FOUND": "check FIRESTORE_PROJECT and FIRESTORE_DATABASE",
    "INVALID_ARGUMENT": "check QUEUE_COLLECTION, WAITING_FILTER, BUSY_FILTER and BUSY_POD_FIELD",
    "FAILED_PRECONDITION": "check FIRESTORE_DATABASE and the filters",
}
BUSY_JOBS = 5_000  # read at most, or twice the pods
METADATA = "Google's metadata server did not respond while looking for credentials"


def queue_failure(doing: str, error: Exception, advice: str = "") -> QueueFailure:
    """The failure that an error of the Firestore client stands for."""
    code = getattr(getattr(error, "grpc_status_code", None), "name", type(error).__name__)
    text = one_line(error)
    message = f"Firestore failed while {doing}: {code}: {text}"
    if code not in ADVICE:
        if "metadata.google.internal" in text or "computeMetadata" in text:
            refused = re.search(r"Status: 4\d\d", text)
            what = "gave no token, check Workload Identity" if refused else "did not respond"
            advice = f"Google's metadata server {what}: the next run tries again"
        transient = code in TRANSIENT_CODES
        return QueueFailure("QueueUnavailable", message, advice=advice, transient=transient)
    denied = code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    advice = ADVICE[code]
    if code == "FAILED_PRECONDITION" and "https://" in text:
        advice = "create the index with the link above"
    elif "datastore mode" in text.lower():
        advice = "set FIRESTORE_DATABASE to a database in native mode: the scaler reads no other"
    reason: Reason = "Forbidden" if denied else "QueueUnavailable"
    return QueueFailure(reason, message, advice=advice, exit_code=2)


def proxy_advice(environ: Mapping[str, str]) -> str:
    """gRPC reads the proxy's variables in lower case only."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        lower = ("grpc_proxy", "https_proxy", "http_proxy")
        if environ.get(name) and not any(environ.get(one) for one in lower):
            return f"{name} is set, but gRPC reads only https_proxy, in lower case: set that, too"
    return ""


class Firestore:
    """Google's client, opened on first use, so that no call to Google delays reading the
    Deployment. It is kept from look to look."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings, self.environ = settings, environ
        self._opening: Future[Client] | None = None

    def client(self, progress: Progress) -> Client:
        """Raises QueueFailure."""
        retrying = progress.deadline.retrying("transient", reserve=True)
        return retrying(lambda: self._open(progress))

    def _open(self, progress: Progress) -> Client:
        """In a thread of its own: looking for credentials asks Google's metadata server, which may
        accept and never respond, and no timeout covers that."""
        from concurrent.futures import ThreadPoolExecutor

        progress.enter("looking for Google credentials", "QueueUnavailable")
        if self._opening is None:
            opener = ThreadPoolExecutor(1)
            self._opening = opener.submit(open_firestore, self._settings, self.environ)
        try:
            return self._opening.result(progress.deadline.left(reserve=True))
        except TimeoutError:
            raise QueueFailure("QueueUnavailable", METADATA, transient=False) from None
        except QueueFailure:
            self._opening = None  # for the next try
            raise


def open_firestore(settings: Settings, environ: Mapping[str, str]) -> Client:
    """Raises QueueFailure if there are no usable Google credentials: a transient one if a metadata
    server may still come up, as on GKE in the first seconds of a pod."""
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.firestore import Client

    project = settings.firestore_project
    if project:
        # Otherwise Google's library looks the credentials' project up, which may hang.
        os.environ.setdefault("GOOGLE_CLOUD_PROJECT", project)
    try:
        return Client(project, database=settings.firestore_database)
    except (GoogleAuthError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        expected = any(name.startswith("GCE_METADATA_") for name in environ)
        expected |= "KUBERNETES_SERVICE_HOST" in environ
        configured = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        if expected and not configured and environ.get("NO_GCE_CHECK") != "true":
            advice = (
                "the next run tries again; outside Google Cloud set "
                "GOOGLE_APPLICATION_CREDENTIALS to a key file"
            )
            raise QueueFailure("QueueUnavailable", METADATA, advice=advice) from error
        # Without the library's text, which quotes what it was given: at times a private key.
        problem = (
            "no usable Google credentials or project for Firestore: looked for "
            "GOOGLE_APPLICATION_CREDENTIALS (the path of a file), gcloud's login, Workload "
            f"Identity, FIRESTORE_PROJECT ({type(error).__name__})"
        )
        advice = "set one of them"
        raise QueueFailure("Forbidden", problem, advice=advice, exit_code=2) from error


class JobQueue:
    """The Firestore collections that hold the jobs, as one look at `now` sees them. Every public
    method raises QueueFailure."""

    def __init__(
        self, settings: Settings, firestore: Firestore, progress: Progress, now: datetime, log: Log
    ) -> None:
        self._settings, self._firestore, self._progress = settings, firestore, progress
        self._now, self._log = now, log

    def count(self, pod_names: Sequence[str] | None) -> tuple[QueueLength, tuple[str, ...]]:
        """Count the waiting jobs and, given the live pods' names, right after them their busy
        jobs: a job claimed in between counts twice, which removes no pod. And warnings."""
        settings = self._settings
        limit = settings.count_limit

        def read(query: Any, **call: Any) -> int:
            results = query.limit(limit).count(alias="jobs").get(**call)
            # The client returns a count of zero as 0.0.
            counts = [int(row.value) for rows in results for row in rows if row.value >= 0]
            if len(counts) != 1:
                problem = f"Firestore returned no usable count while {self._progress.stage}"
                raise QueueFailure("QueueUnavailable", problem, transient=False)
            return counts[0]

        def count(doing: str, signed: Sequence[tuple[int, Question]]) -> tuple[int, bool]:
            signs = [sign for sign, _ in signed] * len(settings.queue_collection)
            counts = self._ask_all(doing, read, [question for _, question in signed])
            parts = [sign * number for sign, number in zip(signs, counts, strict=True)]
            # Jobs that come and go between the queries: a union is no smaller than a part of it.
            total = max(0, sum(parts), *parts)
            capped = any(number >= limit for number in counts)
            return (max(total, limit) if capped else total), capped

        waiting, capped = count("counting waiting jobs", signed_union(settings.waiting_filter))
        busy: int | None = None
        if pod_names is not None:
            busy, _ = count("counting busy jobs", list(self._batches(pod_names)))
        warnings: list[str] = []
        if not waiting:
            warnings += unmatched_times("WAITING_FILTER", settings.waiting_filter)
        if busy == 0 and pod_names:
            warnings += unmatched_times("BUSY_FILTER", settings.busy_filter or ())
        oldest = None
        if waiting and settings.waiting_since_field:
            oldest, problem = self._oldest_seconds(settings.waiting_since_field)
            warnings += [problem] if problem else []
        return QueueLength(waiting, capped, busy, oldest), tuple(warnings)

    def _oldest_seconds(self, name: str) -> tuple[float | None, str]:
        """How long the oldest waiting job has waited, or why that is unknown. One try: the rest of
        the look does not depend on it."""

        def read(query: Any, **call: Any) -> list[object]:
            first = query.order_by(name).limit(1).select([name])
            return [job.get(name) for job in first.stream(**call)]

        doing = "reading the oldest waiting job"
        try:
            groups = single(signed_union(self._settings.waiting_filter))
            asked = self._ask_all(doing, read, groups, retry=False)
        except QueueFailure as failure:
            return None, f"WAITING_SINCE_FIELD={name} was not read: {failure.whole}"
        ages = []
        for value in (value for found in asked for value in found):
            try:
                ages.append((self._now - waiting_since(value)).total_seconds())
            except ValueError:
                return None, (
                    f"WAITING_SINCE_FIELD={name} is not a time in the job that sorts first: "
                    f"{quoted(value)}; store a timestamp"
                )
        if not ages:
            return None, f"WAITING_SINCE_FIELD={name}: no waiting job has that field"
        return max(0.0, *ages), ""

    def unknown_field(self) -> str:
        """Which field of WAITING_FILTER no document has, as far as one cheap read tells: a wrong
        collection or field would count 0 jobs forever. "" if one has it, or if that is unknown."""
        settings = self._settings
        names = [name for each in settings.waiting_filter for name, _, _ in each]
        if not names or settings.queue_collection_group:  # a group has no index for it as a rule
            return ""

        def read(query: Any, **call: Any) -> bool:
            return any(True for _ in query.order_by(names[0]).limit(1).select([]).stream(**call))

        try:
            if any(self._ask_all("looking for a field", read, [()], retry=False)):
                return ""
        except QueueFailure:
            return ""
        where = " or ".join(f"`{path}`" for path in settings.queue_collection)
        return (
            f"no document in {where} has the field `{names[0]}`: unless the queue is just empty, "
            "check QUEUE_COLLECTION and WAITING_FILTER"
        )

    def busy_pods(self, live: Sequence[Pod]) -> BusyPods:
        """Which of these pods hold a busy job, whatever pod the busy jobs name.

        Raises a Failure if busy jobs exist and none has BUSY_POD_FIELD: nothing is known then.
        """
        name, most = self._settings.busy_pod_field, max(BUSY_JOBS, 2 * len(live))
        groups = single(signed_union(self._settings.busy_filter or ()))
        asked = self._pod_fields(groups, most)
        # A job that was read twice may have changed hands meanwhile: both pods count.
        pairs = {(path, *texts(value)): (path, value) for one in asked for path, value in one}
        jobs = list(pairs.values())
        if jobs and all(value is None for _, value in jobs):
            self._blame_pod_field(live, len(jobs), groups)
        found = find_busy_pods(live, jobs, name)
        if not any(len(one) >= most for one in asked):
            return found
        # There are more busy jobs than were read: read those of the pods by name and, if that is
        # cut off, too, one of each pod that is not known to be busy yet.
        questions = single(self._batches([pod.name for pod in live]), beside=1)
        each = max(DISJUNCTIONS, most // max(1, len(questions)))
        named = self._pod_fields(questions, each)
        exact = find_busy_pods(live, [job for one in named for job in one], name)
        names, count = found.names | exact.names, max(found.jobs, exact.jobs)
        if any(len(one) >= each for one in named):
            rest = [pod.name for pod in live if pod.name not in names]
            last = self._pod_fields(single(self._batches(rest, 1), beside=1), 1)
            names |= find_busy_pods(live, [job for one in last for job in one], name).names
        more = (
            f"there are more busy jobs than the {most} that are read: a job that does not hold the "
            f"plain name of its pod in {name} may not protect it; return the jobs of lost workers "
            "to the queue"
        )
        warnings = (*found.warnings, more)
        return replace(found, names=names, jobs=count, incomplete=found.inexact, warnings=warnings)

    def _pod_fields(
        self, questions: Sequence[Question], limit: int
    ) -> list[list[tuple[str, object]]]:
        """The path and BUSY_POD_FIELD of at most `limit` jobs per question; None if it is empty."""
        name = self._settings.busy_pod_field

        def value(job: Any) -> object:
            with suppress(KeyError):
                found: object = job.get(name)
                return found if any(texts(found)) else None
            return None

        def read(query: Any, **call: Any) -> list[tuple[str, object]]:
            rows = query.limit(limit).select([name]).stream(**call)
            return [(job.reference.path, value(job)) for job in rows]

        return self._ask_all("reading which pods are busy", read, questions)

    def _blame_pod_field(
        self, live: Sequence[Pod], count: int, groups: Sequence[Question]
    ) -> NoReturn:
        """Name a field that the busy jobs do have, best the one that holds a pod's name."""

        def read(query: Any, **call: Any) -> list[dict[str, object]]:
            return [job.to_dict() or {} for job in query.limit(1).stream(**call)]

        document: dict[str, object] = {}
        with suppress(QueueFailure):  # then there is less to say
            asked = self._ask_all("reading a busy job", read, groups, retry=False)
            document = next((job for found in asked for job in found), {})
        names = sorted(
            document,
            key=lambda name: (not find_busy_pods(live, [("", document[name])], name).names, name),
        )
        shown = ", ".join(f"`{name}`" for name in names[:5])
        shown = f"; a busy job has {shown}" if names else ""
        name = self._settings.busy_pod_field
        none = (
            "the busy job names no pod" if count == 1 else f"none of {count} busy jobs names a pod"
        )
        raise Failure(
            "InvalidSettings",
            f"{none} in the field `{name}` (BUSY_POD_FIELD), so it is unknown which pods are busy",
            advice=f"set BUSY_POD_FIELD to the field with the pod's name{shown}",
            exit_code=2,
        )

    def _batches(
        self, pod_names: Sequence[str], most: int = DISJUNCTIONS
    ) -> Iterator[tuple[int, Question]]:
        """The questions about the busy jobs of as many pods as Firestore takes in an `in`, whose
        limit is on the product of it and of the alternatives and lists in BUSY_FILTER."""
        for sign, question in signed_union(self._settings.busy_filter or ()):
            size = min(most, max(1, DISJUNCTIONS // math.prod(map(disjunctions, question))))
            for start in range(0, len(pod_names), size):
                names = list(pod_names[start : start + size])
                yield sign, (*question, (((self._settings.busy_pod_field, "in", names),),))

    def _ask_all(
        self, doing: str, read: Callable[..., T], asked: Sequence[Question], retry: bool = True
    ) -> list[T]:
        """Ask each of the collections each of the questions, several at a time."""
        client = self._firestore.client(self._progress)
        paths = self._settings.queue_collection
        questions = [(path, one) for path in paths for one in asked]
        again = self._progress.deadline.retrying("transient", reserve=True)

        def ask(question: tuple[str, Question]) -> T:
            query = self._query(client, *question)
            return again(self._ask, doing, read, query) if retry else self._ask(doing, read, query)

        return concurrently(ask, questions)

    def _query(self, client: Client, path: str, question: Question) -> Any:
        from google.cloud.firestore import And, FieldFilter, Or

        by_group = self._settings.queue_collection_group
        query: Any = client.collection_group(path) if by_group else client.collection(path)
        for alternatives in question:
            each = [
                And([FieldFilter(name, op, self._resolve(client, v)) for name, op, v in conditions])
                for conditions in alternatives
                if conditions
            ]
            if each:
                query = query.where(filter=Or([*each]) if len(each) > 1 else each[0])
        return query

    def _resolve(self, client: Client, value: Any) -> Any:
        """A filter's value as the client takes it."""
        if isinstance(value, RelativeTime):
            return self._now + value.offset
        if isinstance(value, Reference):
            return client.document(value.path)
        if isinstance(value, list):
            return [self._resolve(client, one) for one in value]
        if isinstance(value, dict):
            return {key: self._resolve(client, one) for key, one in value.items()}
        return value

    def _ask(self, doing: str, read: Callable[..., T], query: Any) -> T:
        """One try. tenacity's retries are the ones with a deadline, so the client's own are
        disabled: not by None, which its streams take for an object when a response breaks off."""
        from google.api_core.exceptions import GoogleAPIError
        from google.api_core.retry import Retry, if_exception_type
        from google.auth.exceptions import GoogleAuthError

        never = Retry(predicate=if_exception_type())
        self._progress.enter(doing, "QueueUnavailable")
        started = time.monotonic()
        try:
            timeout = self._progress.deadline.for_call(reserve=True)
            answer = read(query, retry=never, timeout=timeout)
        except (GoogleAPIError, GoogleAuthError) as error:
            raise queue_failure(doing, error, proxy_advice(self._firestore.environ)) from error
        except (ValueError, TypeError) as error:
            problem = f"a job's document cannot be read while {doing}: {one_line(error)}"
            advice = "no field that is read may hold a reference into another database"
            raise QueueFailure("QueueUnavailable", problem, advice=advice, exit_code=2) from error
        self._log.debug(lambda: f"{doing} took {time.monotonic() - started:.3f} s: {answer}")
        return answer


def waiting_since(value: object) -> datetime:
    """The time in a job's field. Raises ValueError."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value / 1000 if value > 1e11 else value)  # JavaScript's are milliseconds
    if isinstance(value, str):
        return read_time(value)
    raise ValueError("not a time")


# ----------------------------------------------------------------------------------- cluster

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAGE = 500
OBSERVE_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# All requests of this script: method, resource, and the verb that a Role has for it.
REQUESTS = {
    "reading the Deployment": ("GET", "deployments", "get"),
    "patching the Deployment": ("PATCH", "deployments", "patch"),
    "listing the ReplicaSets": ("GET", "replicasets", "list"),
    "listing the pods": ("GET", "pods", "list"),
    "setting a pod's deletion cost": ("PATCH", "pods", "patch"),
    "writing the Event": ("POST", "events", "create"),
}
ROLE = "the Role in namespace {namespace} must allow {verb} on {resource} (rbac.yaml), and a "
ROLE += "RoleBinding there must name this account"
NOT_ALLOWED = {
    "deployments": "check that DEPLOYMENT={name} is the name in the Role: " + ROLE,
    "replicasets": "BUSY_FILTER needs a rule that is new in 0.3.0: " + ROLE,
    "pods": "BUSY_FILTER needs a rule: " + ROLE,
    "events": ROLE,
}
# What an HTTP status means: the reason, the exit code and what to do. One that is not here counts
# as 400 or, from 500 on, as 500.
REFUSALS: Mapping[int, tuple[Reason, int, str]] = {
    400: ("ClusterUnavailable", 2, ""),
    401: ("Forbidden", 2, "the credentials of the scaler are missing or expired: renew them"),
    403: ("Forbidden", 2, ""),
    404: ("DeploymentNotFound", 2, "check DEPLOYMENT and NAMESPACE"),
    408: ("ClusterUnavailable", 1, ""),
    409: ("ClusterUnavailable", 1, ""),
    410: ("ClusterUnavailable", 1, ""),  # a page of a list that was compacted meanwhile
    422: ("Forbidden", 2, ""),  # an admission policy, or a number that the API does not take
    429: ("ClusterUnavailable", 1, ""),
    500: ("ClusterUnavailable", 1, ""),
}


@dataclass(frozen=True)
class Deployment:
    """What one GET of the Deployment says.

    `observed` is whether its controller has seen this generation; `restored` are those of our
    annotations that a rollback brought back; `replicas_owners` the entries of managedFields that
    own spec.replicas.
    """

    uid: str
    resource_version: str
    generation: int
    observed: bool
    replicas: int
    annotations: Mapping[str, str]
    selector: str
    restored: frozenset[str]
    replicas_owners: Sequence[Mapping[str, Any]]


def parse_deployment(answer: Any) -> Deployment:
    """Raises what reading a dict wrongly raises if the response is not what the API has."""
    metadata, spec, status = answer["metadata"], answer["spec"], answer.get("status") or {}
    annotations, managed = metadata.get("annotations") or {}, metadata.get("managedFields") or ()
    generation = expect(int, metadata.get("generation", 0))
    return Deployment(
        uid=str(metadata.get("uid", "")),
        resource_version=expect(str, metadata["resourceVersion"]),
        generation=generation,
        observed=expect(int, status.get("observedGeneration", 0)) >= generation,
        replicas=expect(int, spec.get("replicas", 1)),
        annotations={name: expect(str, annotations[name]) for name in annotations},
        selector=selector_string(spec["selector"]),
        restored=restored(managed, str(metadata.get("creationTimestamp"))),
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


def controller_of(metadata: Any, kind: str) -> str | None:
    """The UID of the controller, if it is of this kind."""
    for owner in metadata.get("ownerReferences") or ():
        if owner.get("controller") and owner["kind"] == kind:
            return expect(str, owner["uid"])
    return None


def parse_replica_set(item: Any, deployment: str) -> ReplicaSet | None:
    """None for one that this Deployment, by UID, does not control."""
    metadata = item["metadata"]
    if controller_of(metadata, "Deployment") != deployment:
        return None
    wanted = expect(int, item["spec"].get("replicas", 1))
    present = expect(int, (item.get("status") or {}).get("replicas", 0))
    return ReplicaSet(expect(str, metadata["uid"]), wanted, present)


# Most of a pod's JSON, and never read: dropped while it is parsed, as a page of 500 pods would take
# three times the memory with it.
UNREAD = frozenset(
    ["containers", "initContainers", "volumes", "containerStatuses", "initContainerStatuses",
     "f:containers", "f:initContainers", "f:volumes", "f:status"]
)  # fmt: skip


def without_unread(found: dict[str, Any]) -> dict[str, Any]:
    if not UNREAD.isdisjoint(found):
        for name in UNREAD & found.keys():
            del found[name]
    return found


def parse_pod(item: Any) -> Pod | None:
    """None for a pod that is ending or has ended, or that no ReplicaSet controls."""
    metadata, status = item["metadata"], item.get("status") or {}
    phase, owner = status.get("phase", ""), controller_of(metadata, "ReplicaSet")
    if owner is None or metadata.get("deletionTimestamp") or phase in ("Succeeded", "Failed"):
        return None
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
    node = item["spec"].get("nodeName") or ""
    rank = {"Pending": 0, "Unknown": 1, "Running": 2}.get(phase, 0)
    cost = (metadata.get("annotations") or {}).get(DELETION_COST, "0")
    setters = [
        entry.get("manager")
        for entry in metadata.get("managedFields") or ()
        if f"f:{DELETION_COST}" in owned(entry, "f:metadata", "f:annotations")
    ]
    addresses = [one.get("ip") for one in status.get("podIPs") or ()]
    addresses += [status.get("podIP"), item["spec"].get("hostname")]
    return Pod(
        name=expect(str, metadata["name"]),
        uid=expect(str, metadata["uid"]),
        version=expect(str, metadata["resourceVersion"]),
        owner=owner,
        node=node,
        rank=(bool(node), rank, conditions.get("Ready") == "True"),
        # The controller takes an unreadable cost for 0.
        cost=int(cost) if re.fullmatch(r"-?[0-9]{1,10}", cost) else 0,
        own_cost=FIELD_MANAGER in setters,
        addresses=tuple(str(address) for address in addresses if address),
    )


@dataclass(frozen=True)
class Api:
    """The kubernetes client, and whose Deployment it is about. It is kept from look to look."""

    client: ApiClient
    namespace: str
    name: str

    def send(
        self,
        doing: str,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str],
        timeout: float,
    ) -> Any:
        """The response, read to its end, whatever its status. It stays plain JSON, which spares the
        import of the client's generated models: more CPU than all the rest of a run.

        Raises a Failure if there is none.
        """
        from kubernetes.client.exceptions import OpenApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        parameters = list((query if method == "GET" else {"fieldManager": FIELD_MANAGER}).items())
        try:
            request = self.client.param_serialize(
                method, path, None, parameters, headers, body, auth_settings=["BearerToken"]
            )
            response = self.client.call_api(*request, _request_timeout=timeout)
            response.read()
        except (HTTPError, OpenApiException, ConfigException, OSError) as error:
            problem = f"the API server did not respond while {doing}: {one_line(error)}"
            raise Failure("ClusterUnavailable", problem) from error
        except ValueError:
            # From http.client; its text quotes the whole header.
            problem = (
                "the credentials contain a character that HTTP headers forbid, such as a newline"
            )
            raise Failure("Forbidden", problem, exit_code=2) from None
        return response


class Cluster:
    """The API server, as far as this scaler may see it: one Deployment, its ReplicaSets, pods and
    events, in one look. Every public method raises a Failure."""

    def __init__(self, api: Api, progress: Progress, log: Log) -> None:
        self._api, self._progress, self._log = api, progress, log

    def read_deployment(self) -> Deployment:
        return self._retried("reading the Deployment", parse_deployment, self._api.name)

    def read_observed_deployment(self) -> Deployment:
        """The Deployment, after a moment for its controller to observe the last change: the status
        that it then writes changes the resourceVersion."""
        deployment = self.read_deployment()
        for seconds in OBSERVE_SECONDS:
            if not deployment.observed and seconds < self._progress.deadline.left() / 2:
                sleep(seconds)
                deployment = self.read_deployment()
        return deployment

    def read_fleet(self, deployment: Deployment) -> Fleet:
        """The Deployment's live pods. Its ReplicaSets are listed first: a pod of one that is
        missing there would not count."""
        query = {"labelSelector": deployment.selector}
        uid = deployment.uid

        def own(item: Any) -> ReplicaSet | None:
            return parse_replica_set(item, uid)

        sets = self._list("listing the ReplicaSets", "ReplicaSetList", own, query)
        query["fieldSelector"] = "status.phase!=Succeeded,status.phase!=Failed"
        live = self._list("listing the pods", "PodList", parse_pod, query)
        return make_fleet(deployment.replicas, deployment.observed, sets, live)

    def _list(
        self,
        doing: str,
        kind: str,
        parse_item: Callable[[Any], T | None],
        query: Mapping[str, str],
    ) -> list[T]:
        """All pages of a list; only what `parse_item` returns is kept of each."""

        def parse(answer: Any) -> tuple[list[T], str]:
            if answer["kind"] != kind:  # or an empty answer would mean that no pod is busy
                raise ValueError(f"kind is {quoted(answer['kind'])}")
            found = [one for item in answer["items"] or () if (one := parse_item(item)) is not None]
            return found, (answer.get("metadata") or {}).get("continue") or ""

        found: list[T] = []
        page = {**query, "limit": str(PAGE)}
        while True:
            more, token = self._retried(doing, parse, **page)
            found += more
            if not token:
                return found
            page["continue"] = token

    def set_deletion_cost(self, pod: Pod, cost: int | None, retry: bool = True) -> Pod | None:
        """The pod after that; None if it is gone. A cost of None removes it.

        It carries the pod's resourceVersion, so that a late request cannot undo another run's.
        """
        annotations = {DELETION_COST: None if cost is None else str(cost)}
        body = {"metadata": {"annotations": annotations, "resourceVersion": pod.version}}
        request = self._retried if retry else self._request
        try:
            request("setting a pod's deletion cost", dict, pod.name, body)
        except Failure as failure:
            if failure.status == 404:
                return None
            raise
        return replace(pod, cost=cost or 0)

    def patch_deployment(self, body: Mapping[str, Any]) -> Deployment:
        """One merge patch, and the Deployment after it. It is not repeated here: if it fails with
        `read_again`, only the Deployment itself can say what became of it."""
        try:
            return self._request("patching the Deployment", parse_deployment, self._api.name, body)
        except Failure as failure:
            failure.read_again |= failure.transient
            raise

    def post_event(self, uid: str, when: str, decision: Decision) -> None:
        """An Event of the kind that the HPA writes, on the Deployment with this UID."""
        name, namespace = self._api.name, self._api.namespace
        about = {"kind": "Deployment", "name": name, "namespace": namespace, "uid": uid}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{name[:200].rstrip('-.')}.{os.urandom(8).hex()}",
                "namespace": namespace,
            },
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
        self._request("writing the Event", dict, body=event)

    def _retried(self, doing: str, parse: Callable[[Any], T], *call: Any, **query: str) -> T:
        """A request that is repeated while that can help."""
        again = self._progress.deadline.retrying("transient")
        return again(lambda: self._request(doing, parse, *call, **query))

    def _request(
        self, doing: str, parse: Callable[[Any], T], name: str = "", body: Any = None, **query: str
    ) -> T:
        """One of the REQUESTS, and its response as `parse` reads it."""
        method, resource, _ = REQUESTS[doing]
        self._progress.enter(doing, "ClusterUnavailable")
        if not self._progress.deadline.left():
            # Not transient: that would mean that the request may have arrived.
            problem = f"no time was left for {doing}"
            raise Failure("ClusterUnavailable", problem, transient=False)
        group = "/apis/apps/v1" if resource in ("deployments", "replicasets") else "/api/v1"
        path = f"{group}/namespaces/{self._api.namespace}/{resource}" + (f"/{name}" if name else "")
        started = time.monotonic()
        timeout = self._progress.deadline.for_call()
        response = self._api.send(doing, method, path, body, query, timeout)
        status = response.status
        took = time.monotonic() - started
        self._log.debug(lambda: f"{method} {path}: {status} in {took:.3f} s")
        if not 200 <= status < 300:
            raise self._refusal(doing, response)
        try:
            drop = without_unread if resource == "pods" else None
            return parse(json.loads(response.data, object_hook=drop))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            found = f"{type(error).__name__}: {one_line(error)}"
            problem = f"the API server sent an unusable response while {doing}: {found}"
            raise Failure("ClusterUnavailable", problem) from error

    def _refusal(self, doing: str, response: Any) -> Failure:
        """The failure that an HTTP status stands for, with what to do about it."""
        status = known = response.status
        _, resource, verb = REQUESTS[doing]
        if status not in REFUSALS or (status == 404 and resource != "deployments"):
            known = 500 if status >= 500 else 400
        reason, exit_code, advice = REFUSALS[known]
        try:
            message = one_line(expect(str, json.loads(response.data)["message"]))
        except (ValueError, TypeError, LookupError, RecursionError):  # perhaps a proxy's page
            message = quoted(response.data.decode(errors="replace"))
        said = f"the API server answered {status} while {doing}: {message}"
        names = {"name": self._api.name, "namespace": self._api.namespace}
        if known == 404:
            said = "there is no Deployment {name} in namespace {namespace}".format(**names)
        # RBAC's words: it may also be an admission policy, a quota or a namespace that ends.
        if known == 403 and " cannot " in message:
            advice = NOT_ALLOWED[resource].format(verb=verb, resource=resource, **names)
        # Seconds. A date is not read: ours and the server's clock may differ.
        pause = response.headers.get("Retry-After") or ""
        retry_after = float(pause) if re.fullmatch(r"\d{1,6}", pause) else 0.0
        # What was read is no longer so: the same request can never succeed.
        outdated = status in (409, 410)
        return Failure(
            reason,
            said,
            advice=advice,
            exit_code=exit_code,
            transient=not outdated,
            status=status,
            retry_after=retry_after,
            read_again=outdated,
        )


def open_cluster(settings: Settings, environ: Mapping[str, str]) -> Api:
    """The cluster that this pod runs in or, outside one, the kubeconfig's, as for kubectl.

    Raises a Failure if there is no usable configuration.
    """
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.config.incluster_config import InClusterConfigLoader
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger
    from yaml import YAMLError

    configuration = Configuration()
    configuration.retries = False  # urllib3's own would outlast the deadline
    configuration.connection_pool_maxsize = CONCURRENT_CALLS
    try:
        if "KUBERNETES_SERVICE_HOST" in environ and not environ.get("KUBECONFIG"):
            token, ca = str(SERVICE_ACCOUNT / "token"), str(SERVICE_ACCOUNT / "ca.crt")
            InClusterConfigLoader(token, ca, environ=dict(environ)).load_and_set(configuration)
            own = (SERVICE_ACCOUNT / "namespace").read_text().strip()
        else:
            paths = (environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
            found = map(os.path.expanduser, paths)
            # kubectl skips an empty file, the client library rejects it.
            filled = (one for one in found if not os.path.isfile(one) or os.path.getsize(one))
            files = KubeConfigMerger(os.pathsep.join(filled))
            if files.config is None:
                raise config.ConfigException("no such file")
            named = (one.get("current-context") for one in files.config_files.values())
            # kubectl takes the first file's, the client library the last one's.
            context = next(filter(None, named), None)
            loader = KubeConfigLoader(files.config, active_context=context, config_base_path=None)
            loader.load_and_set(configuration)
            own = loader.current_context["context"].get("namespace") or "default"
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
    return Api(client, settings.namespace or own, settings.deployment)


# -------------------------------------------------------------------------------------- look

FRESH_SECONDS = 5  # pods are removed only if the queue was read no longer ago than this


class Look:
    """One look at the Deployment and the queue: read, decide, choose victims, set their deletion
    costs, read again, patch.

    `token` is this look's, in the leases that it takes. `pending` are the decisions whose patch may
    or may not have been applied; `deployment` is the Deployment as last read or patched, `state`
    what its annotations said at the start of the attempt. `leased`: this look has the lease, and
    had it when the pods were last listed; `verified`: when, on the monotonic clock and the wall's,
    this attempt began to read the queue again; `costs`: the deletion costs that somebody else had
    set on pods that this look has marked, by UID; `uncleared`: why it left those of an earlier run;
    `took_over`: it has taken over the lease of another run.
    """

    deployment: Deployment
    state: State

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        queue: JobQueue,
        progress: Progress,
        log: Log,
        now: datetime,
    ) -> None:
        self.settings, self.cluster, self.queue = settings, cluster, queue
        self.progress, self.log, self.now = progress, log, now
        self.token = os.urandom(4).hex()
        self.pending: list[Decision] = []
        self.warnings: list[str] = []
        self.began = time.monotonic()
        self.leased = False
        self.verified: tuple[float, datetime] | None = None
        self.costs: dict[str, int] = {}
        self.uncleared = ""
        self.took_over = False

    def take(self) -> Decision:
        """Look, and again from the start if another writer came in between.

        Raises a Failure.
        """
        try:
            # An attempt that begins later would blame the queue for the time that it lacks.
            return self.progress.deadline.retrying("read_again", reserve=True)(self.attempt)
        except Exception:
            if self.progress.current is not None and self.is_own_lease():
                with suppress(Failure):  # or else it expires
                    self.deployment = self.cluster.read_deployment()
                    if self.is_own_lease():
                        self.cluster.patch_deployment(self.body({LEASE: None}))
            raise

    def attempt(self) -> Decision:
        progress, settings = self.progress, self.settings
        self.deployment = deployment = self.cluster.read_deployment()
        progress.current, self.verified = deployment.replicas, None
        for decision in self.pending:
            if was_applied(decision, deployment):
                return self.finish(decision)
        progress.in_doubt, self.leased = bool(self.pending), False
        owners, now = deployment.replicas_owners, self.now
        self.state = parse_state(deployment.annotations, settings, now, deployment.restored)
        self.warnings = list(filter(None, (*self.state.warnings, self.uncleared)))
        if other := other_writer(owners, self.state.last_scale_time):
            self.warnings.append(f"two writers: spec.replicas was last set by {other}; remove one")
        own_zero = {entry.get("manager") for entry in owners} == {FIELD_MANAGER}
        inputs = Inputs(now, deployment.replicas, self.state, own_zero=own_zero)
        try:
            decision = self.gather(inputs)
        except QueueFailure as problem:
            decision = without_queue(settings, inputs, problem)
        return self.apply(decision)

    def gather(self, inputs: Inputs) -> Decision:
        """Decide, and read what that needs, and no more: the queue is not waited for if a pause or
        the range decides, and no job is read unless a scale-down is about to happen."""
        settings, fleet = self.settings, None
        decision = override(settings, inputs)
        if decision is None:
            if settings.busy_filter is not None:
                fleet = self.cluster.read_fleet(self.deployment)
            length, warnings = self.queue.count(None if fleet is None else fleet.names)
            self.warnings += warnings
            self.check_field(length)
            inputs = replace(inputs, queue=length)
            decision = decide(settings, inputs)
        if settings.busy_filter is not None and decision.change < 0:
            fleet = fleet or self.cluster.read_fleet(self.deployment)
            return self.scale_down(inputs, fleet)
        if fleet is not None:
            self.clear_costs(fleet)
        return decision

    def check_field(self, length: QueueLength) -> None:
        """Once per run, while the queue is empty: does any document have the filter's field?"""
        if not length.waiting and not length.busy and "field" not in self.log.once:
            self.log.once.add("field")
            if unknown := self.queue.unknown_field():
                self.log.line("INFO", unknown)

    def scale_down(self, inputs: Inputs, fleet: Fleet) -> Decision:
        """The decision, ready to be applied: if it removes pods, its victims have the lowest
        deletion cost, and a second read of the queue has found them idle."""
        busy = self.queue.busy_pods(fleet.pods)
        last = self.last_lease()
        cost = victim_cost(self.now, fleet.pods, last)
        # An attempt goes on with the marks of the one before, unless a victim has claimed a job.
        claimed = any(pod.cost <= HIGHEST_MARK for pod in fleet.pods if pod.name in busy.names)
        if last and self.is_own_lease() and not (claimed or self.pending):
            cost = last.cost
        decision = self.judge(inputs, fleet, busy, cost)
        # `paused-replicas` does not wait for another run: it takes over that run's lease. Once,
        # or two runs with the same number would do so in turn.
        other = self.lease_of_another()
        if other and decision.change < 0 and (decision.reason != "Paused" or self.took_over):
            because = f", as another run is removing pods until {write_time(other.until)}"
            none = Removable(0, because)
            decision = decide(self.settings, replace(inputs, removable=none, reach=none))
        victims: list[Pod] = []
        if decision.change < 0 and not self.log.output.dry_run:
            count = len(fleet.pods) - (decision.replicas or 0)
            victims = choose_victims(fleet.pods, busy.names, count)
        if not victims:
            self.clear_costs(fleet)
            return decision
        self.took_over = self.took_over or other is not None
        self.take_lease(cost)
        generation = self.deployment.generation
        self.clear_costs(fleet, victims)
        # Those that there is no time for are left to the next look.
        until = time.monotonic() + self.progress.deadline.left() / 2
        done = {pod.name for pod in victims if pod.cost == cost}
        unset = [pod for pod in victims if pod.cost != cost]
        done |= {pod.name for pod in self.set_costs(unset, cost, until=until)}
        victims = [pod for pod in victims if pod.name in done]
        return self.verify(inputs, victims, cost, generation)

    def verify(
        self, inputs: Inputs, victims: Sequence[Pod], cost: int, generation: int
    ) -> Decision:
        """Everything once more, the queue last: a victim that has claimed a job is spared, and one
        pod fewer is removed. `generation` is the Deployment's at the lease."""
        # The Deployment comes first, once its controller has observed the lease: a pod that comes,
        # goes or changes after that changes its status, and so the resourceVersion.
        self.deployment = self.cluster.read_observed_deployment()
        if self.deployment.generation != generation or not self.is_own_lease():
            problem = "the Deployment changed while pods were chosen"
            raise Failure("ClusterUnavailable", problem, transient=False, read_again=True)
        fleet = self.cluster.read_fleet(self.deployment)
        self.leased, self.verified = False, (time.monotonic(), self.log.clock())
        busy = self.queue.busy_pods(fleet.pods)
        chosen = {pod.name for pod in victims}
        marked = [pod for pod in fleet.pods if pod.name in chosen]
        claimed = [pod for pod in marked if pod.name in busy.names]
        spared = {pod.name: pod for pod in self.set_costs(claimed, None)}
        gone = {pod.name for pod in claimed} - spared.keys()
        left = [spared.get(pod.name, pod) for pod in fleet.pods if pod.name not in gone]
        fleet = replace(fleet, pods=tuple(left))
        missing = max(0, inputs.current - len(fleet.pods))
        limit = len(marked) - len(claimed) + missing
        decision = self.judge(inputs, fleet, busy, None, limit)
        if decision.change >= 0:
            self.set_costs([pod for pod in marked if pod not in claimed], None)
        elif decision.reason == "Paused":
            # Pods that became idle go in place of those spared.
            count = len(fleet.pods) - (decision.replicas or 0)
            idle = choose_victims(fleet.pods, busy.names, count)
            until = time.monotonic() + min(self.progress.deadline.left(), FRESH_SECONDS) / 2
            unset = [pod for pod in idle if pod.cost != cost]
            left_over = len(unset) - len(self.set_costs(unset, cost, until=until))
            if left_over and busy.names:
                because = ", as far as there was time to choose idle pods"
                reach = Removable(len(idle) - left_over + missing, because)
                return self.judge(replace(inputs, reach=reach), fleet, busy, None)
        return decision

    def judge(
        self,
        inputs: Inputs,
        fleet: Fleet,
        busy: BusyPods,
        cost: int | None,
        limit: int = INT32_MAX,
    ) -> Decision:
        """Decide with what the busy jobs say; at most `limit` replicas go."""
        self.warnings = list(dict.fromkeys([*self.warnings, *busy.warnings]))
        can = removable(fleet, inputs.current, busy.names, cost)
        if busy.incomplete:
            why = "there are too many busy jobs to read, and not all name their pod plainly"
            can = Removable(0, f", as {why}")
        queue = inputs.queue
        if queue is not None:
            queue = replace(queue, busy=max(queue.busy or 0, busy.jobs))
        can = replace(can, pods=min(can.pods, limit))
        decision = decide(self.settings, replace(inputs, queue=queue, removable=can))
        # The ReplicaSet controller looks at ranks before deletion costs.
        order = sorted(fleet.pods, key=lambda pod: (pod.rank, pod.name in busy.names))
        removed = order[: max(0, len(order) - (decision.replicas or 0))]
        hit = sum(pod.name in busy.names for pod in removed)
        if decision.reason == "Paused" and hit:
            hits = "1 busy pod is" if hit == 1 else f"{hit} busy pods are"
            message = f"{decision.message}; {hits} among those removed"
            decision = replace(decision, message=message)
        return decision

    # One run at a time sets deletion costs and scales down: whoever has written the lease. Safety
    # does not rest on its time. The resourceVersion of each patch lets only the run scale that
    # holds the lease; a late request for a pod meets the pod's resourceVersion or, if nobody has
    # touched that pod since, sets a cost that is higher than those of the runs after it.

    def lease_of_another(self) -> Lease | None:
        """That of a run that may still be at work."""
        lease = self.state.scale_down_lease
        held = lease and lease.token != self.token and lease.until > self.now
        return lease if held else None

    def is_own_lease(self) -> bool:
        return self.deployment.annotations.get(LEASE, "").endswith(f" {self.token}")

    def last_lease(self) -> Lease | None:
        """As it is written, even if it does not count: the next cost has to be lower than its."""
        with suppress(ValueError):
            return read_lease(self.deployment.annotations.get(LEASE, ""))
        return None

    def take_lease(self, cost: int) -> None:
        """Until the end of this look, unless this look has it already. Raises a Failure if anybody
        has written since the Deployment was read."""
        last = self.last_lease()
        # A rescale still in flight must meet another resourceVersion, and so another lease.
        if last and last.cost <= cost and self.is_own_lease() and not self.pending:
            return self.confirm_lease()
        seconds = self.progress.deadline.end - self.began
        until = whole_second(self.now + timedelta(seconds=seconds))
        lease = str(Lease(until, cost, self.token))
        if self.pending and lease == self.deployment.annotations.get(LEASE):
            # It has to differ: somebody has set the lowest cost that there is.
            self.token = os.urandom(4).hex()
            lease = str(Lease(until, cost, self.token))
        self.deployment = self.cluster.patch_deployment(self.body({LEASE: lease}))
        self.leased, self.progress.in_doubt = True, False
        self.pending.clear()

    def confirm_lease(self) -> None:
        """Make sure that the pods were listed under this look's own lease. Raises a Failure if they
        were not.

        `self.deployment` stays as it was read before that: whatever has changed since has to make
        the patch fail.
        """
        there = self.cluster.read_deployment()
        if there.annotations.get(LEASE) != self.deployment.annotations.get(LEASE):
            problem = "another run took the lease over while pods were chosen"
            raise Failure("ClusterUnavailable", problem, transient=False, read_again=True)
        self.leased = True

    def clear_costs(self, fleet: Fleet, victims: Sequence[Pod] = ()) -> None:
        """Remove the deletion costs left by a run that did not get to its patch. Not while a
        ReplicaSet still has pods to remove, which it chooses by them."""
        chosen = {pod.name for pod in victims}
        stale = [pod for pod in fleet.marked if pod.name not in chosen]
        foreign = self.lease_of_another() and not self.leased
        dry_run = self.log.output.dry_run
        if not stale or fleet.removing or foreign or self.uncleared or dry_run:
            return
        if not self.leased:
            self.take_lease(victim_cost(self.now, fleet.pods, self.last_lease()))
        until, problem = time.monotonic() + self.progress.deadline.left() / 2, ""
        try:
            self.set_costs(stale, None, until=until, retry=False)
        except Failure as failure:
            problem = failure.whole if failure.status != 409 else ""
        # They do no harm to what the look is about to do, and the next one tries again.
        if problem or time.monotonic() > until:
            problem = problem or "there was no time"
            self.uncleared = f"deletion costs of an earlier run may be left: {problem}"
            self.warnings.append(self.uncleared)

    def set_costs(
        self,
        pods: Sequence[Pod],
        cost: int | None,
        until: float = math.inf,
        retry: bool = True,
    ) -> list[Pod]:
        """The pods after that, without those that are gone, or that were not reached `until` then,
        on the monotonic clock. Without a cost, each gets back the one that it had before."""
        if pods and not self.leased:
            self.confirm_lease()
        if cost is not None:
            self.costs |= {pod.uid: pod.cost for pod in pods if pod.cost > HIGHEST_MARK}

        def set_cost(pod: Pod) -> Pod | None:
            if time.monotonic() > until:
                return None
            new = (self.costs.get(pod.uid) or None) if cost is None else cost
            return self.cluster.set_deletion_cost(pod, new, retry)

        return [pod for pod in concurrently(set_cost, pods) if pod is not None]

    def body(self, annotations: Mapping[str, str | None]) -> dict[str, Any]:
        """A merge patch that the API server rejects if anybody else wrote in between."""
        version = self.deployment.resource_version
        return {"metadata": {"resourceVersion": version, "annotations": dict(annotations)}}

    def apply(self, decision: Decision) -> Decision:
        """The one place that changes the replicas. Raises a Failure."""
        progress, there = self.progress, self.deployment.annotations
        annotations = {**decision.annotations, **rescale_annotations(decision, self.now)}
        annotations |= dict.fromkeys(self.state.expired)
        if self.is_own_lease() or not self.lease_of_another():
            annotations[LEASE] = None
        annotations = {name: v for name, v in annotations.items() if there.get(name) != v}
        dry = "dry run, nothing is changed: " if self.log.output.dry_run else ""
        removed = "would be removed" if dry else "removed"
        expired = f"the pause has expired, {', '.join(self.state.expired)} {removed}; "
        message = dry + (expired if self.state.expired else "") + decision.message
        warnings = tuple(self.warnings)
        decision = replace(decision, message=message, annotations=annotations, warnings=warnings)
        if dry or not (annotations or decision.change):
            for late in self.pending:
                scale = f"the rescale from {late.current} to {late.replicas} got no response"
                text = f"{scale}, and may still be applied; the next look will check"
                decision = replace(decision, warnings=(*decision.warnings, text))
            return decision
        if decision.change < 0 and (age := self.read_age()) > FRESH_SECONDS:
            problem = f"the busy jobs were read {age:.0f} s ago, too long ago to remove pods"
            advice = (
                f"if each run says so, reading them takes more than {FRESH_SECONDS} s: raise the "
                "CPU request, or return the jobs of lost workers to the queue"
            )
            raise Failure(
                "QueueUnavailable", problem, advice=advice, transient=False, read_again=True
            )
        body = self.body(annotations)
        if decision.change:
            body["spec"] = {"replicas": decision.replicas}
        progress.in_doubt |= bool(decision.change)
        try:
            self.deployment = self.cluster.patch_deployment(body)
        except Failure as failure:
            # With a status below 500 the API server has rejected it.
            arrived = failure.read_again and not 400 <= failure.status < 500
            if decision.change and arrived:
                self.pending.append(decision)
            progress.in_doubt = bool(self.pending)
            raise
        return self.finish(decision)

    def read_age(self) -> float:
        """Seconds since the second read of the queue began, 0 without one. While a whole machine is
        suspended, only the wall clock goes on."""
        if self.verified is None:
            return 0.0
        ticked, passed = time.monotonic() - self.verified[0], self.log.clock() - self.verified[1]
        return max(ticked, passed.total_seconds())

    def finish(self, decision: Decision) -> Decision:
        """What remains once the patch is known to have been applied: the Event, as the HPA writes
        one."""
        self.progress.in_doubt = False
        if not decision.change:
            return decision
        self.progress.done = decision
        try:
            self.cluster.post_event(self.deployment.uid, write_time(self.now), decision)
        except Failure as failure:
            self.log.line("WARNING", f"no Event was written: {failure.whole}")
        return decision


def was_applied(decision: Decision, deployment: Deployment) -> bool:
    """Whether the Deployment carries the patch of a decision."""
    there = deployment.annotations
    return deployment.replicas == decision.replicas and all(
        there.get(name) == value for name, value in decision.annotations.items()
    )


# ------------------------------------------------------------------------------------ report

RECORD_BYTES = 4095  # the kubelet keeps less than 4,096
DEFAULT_TERMINATION_LOG = "/dev/termination-log"


@dataclass
class Report:
    """What a run has reported: its looks, its log lines, its result record.

    `started` is on the monotonic clock, in seconds. `progress` is that of the present look,
    `resting` is true between two looks. Whoever reports holds `lock`: the main thread and the
    watchdog may both want to.
    """

    log: Log
    started: float
    progress: Progress
    polling: bool = False
    looks: int = 0
    last: Decision | None = None
    last_rescale: Decision | None = None
    resting: bool = False
    exit_code: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, decision: Decision) -> None:
        """Note how a look ended, and log its line if it has something new to say."""
        rescale, before = decision.change != 0 and not self.log.output.dry_run, self.last
        self.looks, self.last = self.looks + 1, decision
        self.last_rescale = decision if rescale else self.last_rescale
        if before and not rescale and essence(before) == essence(decision):
            return
        for warning in decision.warnings:
            self.log.line("WARNING", warning)
        message = f" {decision.reason}: {full_message(decision)}"
        severity = {0: "INFO", 1: "WARNING", INTERRUPTED: "INFO"}.get(decision.exit_code, "ERROR")
        self.log.write(severity, message, self.record(decision))

    def record(self, decision: Decision) -> dict[str, Any]:
        """The result record of a decision."""
        queue, change, dry_run = decision.queue, decision.change, self.log.output.dry_run
        record = {
            "time": write_time(self.log.clock()),
            "namespace": self.log.namespace,
            "deployment": self.log.deployment,
            "waiting": queue.waiting if queue else None,
            "waitingCapped": bool(queue and queue.capped),
            "busy": queue.busy if queue else None,
            "current": decision.current,
            "desired": decision.desired,
            "replicas": decision.current if dry_run else decision.replicas,
            "action": "scale-up" if change > 0 else "scale-down" if change < 0 else "none",
            "reason": decision.reason,
            "message": scrub(full_message(decision)),
            "dryRun": dry_run,
            "durationSeconds": round(time.monotonic() - self.started, 3),
        }
        if self.log.waiting_since:
            oldest = queue.oldest_seconds if queue else None
            record["oldestWaitingSeconds"] = None if oldest is None else round(oldest)
        return {**record, "looks": self.looks} if self.polling or self.looks > 1 else record

    def end(self, why: str = "") -> int:
        """Write the result record: the last look's if that failed, else that of the last that
        scaled, else the last one's. Returns the exit code."""
        assert self.last is not None, "a run has a look"
        told = self.last if self.last.exit_code else self.last_rescale or self.last
        record = self.record(replace(told, message=told.message + why))
        path = Path(self.log.output.termination_log)
        try:
            if str(path) != DEFAULT_TERMINATION_LOG or path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_record(record))
        except OSError as error:
            self.log.line("WARNING", f"the result record was not written: {error}")
        return self.last.exit_code


def essence(decision: Decision) -> Decision:
    """Without what differs from look to look while nothing happens. Of a failure, the cause may
    change."""
    queue = decision.queue and replace(decision.queue, oldest_seconds=None)
    cause = re.sub(r"\d+", "", decision.message) if decision.exit_code else ""
    return replace(decision, queue=queue, message=cause, annotations={}, wait=None)


def full_message(decision: Decision) -> str:
    """What happened, what the scaler did about it, and what to do."""
    return "; ".join(filter(None, (decision.message, decision.advice)))


def encode_record(record: dict[str, Any]) -> bytes:
    """JSON of no more than RECORD_BYTES; the message is truncated."""
    while True:
        data = json.dumps(record, ensure_ascii=False).encode(errors="replace")
        message = record["message"]
        if len(data) <= RECORD_BYTES or not message:
            return data
        record = {**record, "message": message[: len(message) * 3 // 4]}


# -------------------------------------------------------------------------------------- main


def main(
    argv: Sequence[str],
    environ: Mapping[str, str],
    clock: Clock,
    pause: Callable[[float], object] = sleep,
) -> int:
    """One run as a process of its own: a signal, or the end of its time, ends it in order.
    Returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # A run of one look is over before a garbage collection could free anything worth its time.
    gc.disable()
    return execute(argv, environ, clock, pause, watch)


def execute(
    argv: Sequence[str],
    environ: Mapping[str, str],
    clock: Clock,
    pause: Callable[[float], object] = sleep,
    supervise: Callable[[Report, int], None] | None = None,
) -> int:
    """One run, without signals, timers or an exit of its own. Returns the exit code.

    `pause` waits for the given number of seconds between two looks. `supervise` is called in a
    thread of its own with the run's budget in seconds, once the settings are read and before any
    waiting begins.
    """
    if not {"--help", "-h", "--version"}.isdisjoint(argv):
        with suppress(OSError):
            print(f"queue-scaler {__version__}" if "--version" in argv else usage(), flush=True)
        return 0
    if not logging.getLogger().handlers:
        # Otherwise Python prints what libraries log: a login helper's output, for one.
        logging.getLogger().addHandler(logging.NullHandler())
    started = time.monotonic()
    environ = {**environ, "DRY_RUN": "true"} if "--dry-run" in argv else environ
    # As they were set, right or wrong.
    names = [environ.get(variable) for variable in ("NAMESPACE", "DEPLOYMENT")]
    namespace, deployment = (name and one_line(name, 253) for name in names)
    log = Log(read_output(environ), clock, namespace, deployment)
    report = Report(log, started, Progress(Deadline(math.inf, 0, math.inf)))

    def start() -> None:
        unknown = [quoted(argument) for argument in argv if argument != "--dry-run"]
        if unknown:
            problem = f"unknown argument {unknown[0]}: expected --dry-run, --help, --version"
            raise Failure("InvalidSettings", problem, exit_code=2)
        settings = read_settings(environ)
        log.waiting_since = settings.waiting_since_field is not None
        if supervise:
            budget = (report, settings.timeout_seconds)
            threading.Thread(target=supervise, args=budget, daemon=True).start()
        report.progress.enter("loading the Kubernetes client", "ClusterUnavailable")
        api = open_cluster(settings, environ)
        log.namespace = api.namespace
        poll(settings, api, Firestore(settings, environ), report, pause)

    for warning in misspelled(environ):
        log.line("WARNING", warning)
    decision = guarded(report, start)
    with report.lock:
        if decision:
            report.tell(decision)
        report.exit_code = report.end()
    return report.exit_code


def guarded(report: Report, action: Callable[[], T]) -> T | Decision:
    """What an action returns or, if it fails, the decision to leave the replicas alone."""
    progress = report.progress
    try:
        return action()
    except Failure as failure:
        decision = report.progress.abort(str(failure), failure.reason, failure.exit_code)
        return replace(decision, advice=failure.advice) if not report.progress.done else decision
    except Exception as error:
        # A bug of ours, or a case that a library's docs do not name: it must not cost the line
        # and the record, nor the looks that follow.
        report.log.line("ERROR", traceback.format_exc())
        why = f"internal error while {progress.stage}: {type(error).__name__}: {one_line(error)}"
        advice = "this is a bug of queue-scaler: report it with the lines above"
        return replace(report.progress.abort(why), exit_code=1, advice=advice)


def poll(
    settings: Settings,
    api: Api,
    firestore: Firestore,
    report: Report,
    pause: Callable[[float], object],
) -> None:
    """One look, and one more when a delay ends soon; or, with POLLING_INTERVAL_SECONDS, one after
    another, each due at a fixed time from the start. One that is late is left out."""
    interval, total = settings.polling_interval_seconds, settings.timeout_seconds
    report.polling = interval is not None
    # The clients give up a little before the watchdog would, as they can say more.
    run_end, margin = report.started + total, min(1.0, total / 10)
    delay_end: datetime | None = None
    while True:
        began = time.monotonic()
        progress = Progress(look_deadline(run_end, margin, interval))
        report.progress, report.resting = progress, False
        now, log = report.log.clock(), report.log
        # A look that waited for a delay counts from its end. If its start were rounded up, each
        # cooldown in a row would end a second later after the minute, until a run misses it.
        if delay_end and delay_end <= now < delay_end + timedelta(seconds=1):
            now = delay_end
        queue = JobQueue(settings, firestore, progress, now, log)
        look = Look(settings, Cluster(api, progress, log), queue, progress, log, now)
        decision = guarded(report, look.take)
        late = progress.deadline.overslept()
        if late and decision.exit_code:  # what failed may only have been late
            decision = progress.abort(suspended(late), "Interrupted", INTERRUPTED)
        with report.lock:
            report.tell(decision)
            report.resting = True
        ended = time.monotonic()
        due = next_look(report, interval, ended, decision.wait, now)
        delay_end = None if decision.wait is None else now + timedelta(seconds=decision.wait)
        # A look that could only begin would report that its time is up.
        if due is None or due + min(ended - began, 1.0) > run_end - margin:
            return
        gc.enable()
        pause(max(0.0, due - time.monotonic()))
        if time.monotonic() > run_end - margin:  # the process was suspended meanwhile
            return


def next_look(
    report: Report, interval: int | None, ended: float, wait: float | None, now: datetime
) -> float | None:
    """When the next look is due, on the monotonic clock, after one that ended then and began at
    `now`."""
    dues = []
    if interval is not None:
        dues.append(report.started + interval * math.ceil((ended - report.started) / interval))
    if wait is not None and (interval is not None or report.looks == 1):
        left = wait - (report.log.clock() - now).total_seconds()
        if left <= DELAY_SECONDS:
            # The two clocks may differ by a little, and nothing happens before its time.
            dues.append(ended + max(0.0, left) + 0.02)
    return min(dues, default=None)


def watch(report: Report, budget: int) -> None:
    """End the run on SIGTERM, on SIGINT, and when its time is up, whatever the main thread is
    waiting for: no timeout of a client covers an answer that drips in, or a name server."""
    until = report.started + budget
    number = next_signal(until)
    late = Deadline(until, 0, until).overslept()
    if late and not number:
        time.sleep(0.5)  # the main thread may have got what it was waiting for
    # The lock is not released: the main thread has nothing more to say. It may hang in its line.
    exit_code = 128 + number if number else 1
    if report.lock.acquire(timeout=1):
        why = f"out of time (TIMEOUT_SECONDS={budget})"
        reason: Reason | None = None
        if number or late:
            reason = "Interrupted"
            why = f"ended by {signal.Signals(number).name}" if number else suspended(late)
        if report.exit_code is not None:
            exit_code = report.exit_code
        elif report.resting:
            last = report.end(f"; {why}")
            exit_code = exit_code if number else last
        else:
            progress = report.progress
            code = INTERRUPTED if reason else 1
            why += f" while {progress.stage}" if number or not late else ""
            decision = progress.abort(why, reason, code)
            report.tell(decision)
            report.end()
            exit_code = exit_code if number else decision.exit_code
    leave(exit_code)


def next_signal(until: float) -> int | None:
    """The number of a signal that ends the run, None if its time is up. After the process was
    suspended past that, `sigtimedwait` returns something, but no signal (observed)."""
    while (left := until - time.monotonic()) > 0:
        received = signal.sigtimedwait(SIGNALS, left)
        if received and time.monotonic() < until:
            return received.si_signo
    return next((number for number in SIGNALS if number in signal.sigpending()), None)


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
    rows = [(name, item.metadata["shown"], item.metadata["meaning"]) for name, item in
            VARIABLES.items()]  # fmt: skip
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

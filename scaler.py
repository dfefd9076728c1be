#!/usr/bin/env python3
"""queue-scaler: keeps the pods of one Kubernetes Deployment in step with a Firestore job queue.

A CronJob starts this script every minute. It reads the length of the queue and what the last
runs left in the Deployment's annotations, decides, sets `spec.replicas`, says why, and exits:

    environment ──▶ Settings ───────────────┐
    Deployment ───▶ replicas, annotations ──┤
    Firestore ────▶ waiting, busy ──────────┼──▶ decide() ──▶ apply ──▶ report ──▶ exit code
    clock ────────▶ now ────────────────────┘    (pure)

Every setting is an environment variable; `scaler.py --help` lists them. Exit codes: 0, the run did
its work; 1, the queue or the cluster did not answer and nothing was shrunk; 2, a person has to
change something first.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

    from google.cloud.firestore import Client
    from kubernetes.client import ApiClient
    from tenacity import RetryCallState, Retrying

__version__ = "0.1.0"

# fmt: off
Reason = Literal[
    "ScaledUp", "ScaledDown", "AtTarget", "ScaleUpCooldown", "ScaleDownCooldown",
    "ScaleUpStabilized", "ScaleDownStabilized", "ScaleUpDisabled", "ScaleDownDisabled",
    "WorkersBusy", "Paused", "ScalingDisabled", "TooFewReplicas", "TooManyReplicas", "Fallback",
    "QueueUnavailable", "ClusterUnavailable", "InvalidSettings", "DeploymentNotFound", "Forbidden",
]
# fmt: on
Direction = Literal["up", "down"]
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
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"

LOG = logging.getLogger("queue-scaler")


class Failure(Exception):
    """Why a run ends without the change it wanted: a reason, a sentence for people, an exit code.

    `transient` marks what can get better by itself and is tried again within the budget, not
    before `retry_after` seconds have passed.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        exit_code: int = 1,
        transient: bool = False,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.exit_code = exit_code
        self.transient = transient
        self.retry_after = retry_after


class QueueFailure(Failure):
    """The queue could not be read."""


class ClusterFailure(Failure):
    """The API server did not do what was asked; `status` is its HTTP status, 0 for none."""

    status = 0


class Interfered(ClusterFailure):
    """The Deployment has to be read again before anything else is done: it changed since it was
    read (409), or nobody knows whether our patch changed it."""

    @property
    def may_have_landed(self) -> bool:
        """An API server that says 4xx did nothing; a 5xx, or no answer at all, can be either."""
        return not 400 <= self.status < 500


# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Step:
    """The most pods that one scale may add or remove: a count of pods, or a percentage."""

    value: int
    percent: bool

    def __str__(self) -> str:
        return f"{self.value}%" if self.percent else str(self.value)


@dataclass(frozen=True)
class Filter:
    """One condition that a job's document has to meet, in the words of a Firestore query."""

    field: str
    op: str
    value: Any


OPERATORS = {
    **{op: op for op in ("==", "!=", "<", "<=", ">", ">=", "in", "not-in")},
    # The web and the Python clients spell these two differently; people copy from both.
    **{op: op.replace("-", "_") for op in ("array-contains", "array-contains-any")},
    **{op: op for op in ("array_contains", "array_contains_any")},
}
LIST_OPERATORS = {"in": 30, "not-in": 10, "array_contains_any": 30}


def quoted(value: object) -> str:
    """A value as an error shows it: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def text(raw: str) -> str:
    if not raw.strip():
        raise ValueError("expected a name, not an empty one")
    return raw.strip()


def object_name(raw: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", raw):
        raise ValueError("expected a Kubernetes name: lower-case letters, digits, '-' and '.'")
    return raw


def whole(least: int, most: int, unit: str) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"\s*[0-9]{1,10}\s*", raw) or not least <= int(raw) <= most:
            raise ValueError(f"expected a whole number of {unit} from {least} to {most}")
        return int(raw)

    return parse


INT32_MAX = 2**31 - 1  # what Kubernetes takes for replicas, and Firestore for a limit
replica_count = whole(0, INT32_MAX, "pods")
positive = whole(1, INT32_MAX, "pods or jobs")
seconds = whole(0, 31_536_000, "seconds")


def flag(raw: str) -> bool:
    if raw.strip().lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return raw.strip().lower() == "true"


def step(raw: str) -> Step:
    match = re.fullmatch(r"\s*([0-9]{1,9})(%?)\s*", raw)
    if not match:
        raise ValueError("expected a number of pods such as 2, or a percentage such as 50%")
    return Step(int(match[1]), match[2] == "%")


def collection(raw: str) -> str:
    segments = raw.strip().strip("/").split("/")
    if not all(segments):
        raise ValueError("expected a collection path such as jobs, with no empty segment")
    if len(segments) % 2 == 0:
        raise ValueError(
            f"expected a collection path such as jobs or tenants/acme/jobs (an odd number of "
            f"segments); {len(segments)} segments name a document"
        )
    return "/".join(segments)


def field_path(raw: str) -> str:
    if not all(part.strip() for part in raw.split(".")):
        raise ValueError("expected the name of a field, such as assignedPodId or worker.pod")
    return raw


def choice(*accepted: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        for word in accepted:
            if raw.strip().lower() == word.lower():
                return word
        raise ValueError(f"expected one of {', '.join(accepted)}")

    return parse


def filters(raw: str) -> tuple[Filter, ...]:
    form = 'expected a JSON list of [field, op, value], such as [["status", "==", "waiting"]]'
    try:
        triples = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"{form}; this is not JSON") from None
    if not isinstance(triples, list):
        raise ValueError(form)
    return tuple(one_filter(triple, form) for triple in triples)


def one_filter(triple: object, form: str) -> Filter:
    if not (isinstance(triple, list) and len(triple) == 3):
        raise ValueError(f"{form}; {quoted(triple)} is not such a triple")
    name, op, value = triple
    if not (isinstance(name, str) and all(name.split("."))):
        raise ValueError(f"{form}; {quoted(name)} is not a field path")
    if not (isinstance(op, str) and op in OPERATORS):
        raise ValueError(
            f"{form}; {quoted(op)} is not one of the operators ==, !=, <, <=, >, >=, in, not-in, "
            "array-contains, array-contains-any"
        )
    op = OPERATORS[op]
    most = LIST_OPERATORS.get(op)
    if most and not (isinstance(value, list) and 1 <= len(value) <= most):
        raise ValueError(f"{form}; {op} takes a list of 1 to {most} values, not {quoted(value)}")
    if op not in ("==", "!=") and (value is None or value != value):
        raise ValueError(f"{form}; null goes with == and != only, not with {op}")
    return Filter(name, op, value)


def setting(parse: Callable[[str], Any], default: str | None, meaning: str, shown: str = "") -> Any:
    """A field of Settings, read from the variable of the same name in upper case.

    `default` is written as the variable would be, None where there is none; `shown` says for
    people what holds then.
    """
    return field(
        metadata={
            "default": default,
            "parse": parse,
            "meaning": meaning,
            "shown": default if default is not None else shown,
        }
    )


REQUIRED = "required"


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Its fields, in order, are the table of `--help`."""

    # fmt: off
    deployment: str = setting(object_name, None, "name of the Deployment to scale", REQUIRED)
    namespace: str | None = setting(
        object_name, None, "its namespace",
        "the pod's own; outside a cluster, the kubeconfig context's")
    firestore_project: str | None = setting(
        text, None, "Google Cloud project", "from the credentials")
    firestore_database: str = setting(text, "(default)", "database id")
    queue_collection: str = setting(
        collection, None,
        "collection path, such as jobs or tenants/acme/jobs, one document a job", REQUIRED)
    queue_collection_group: bool = setting(
        flag, "false", "true: count every collection of that id, wherever it lies")
    waiting_filter: tuple[Filter, ...] = setting(
        filters, '[["status", "==", "waiting"]]',
        "JSON list of Firestore filters [field, op, value], all of which a waiting job meets; "
        "[] counts every document")
    busy_filter: tuple[Filter, ...] | None = setting(
        filters, None, "the same for a job that a pod is working on", "unset: not busy-aware")
    busy_pod_field: str = setting(
        field_path, "assignedPodId", "field of a job's document that holds the name of its pod")
    min_replicas: int = setting(
        replica_count, "1", "lower end of the range, in pods; 0 scales to zero")
    max_replicas: int = setting(positive, "3", "upper end of the range, in pods")
    jobs_per_pod: int = setting(positive, "1", "target jobs a pod, waiting and busy together")
    scale_up_cooldown_seconds: int = setting(
        seconds, "120", "least time from a scale-up to the next scale-up")
    scale_down_cooldown_seconds: int = setting(
        seconds, "300", "least time from any scale to a scale-down")
    scale_up_stabilization_seconds: int = setting(
        seconds, "0", "window as in the HPA's behavior.scaleUp")
    scale_down_stabilization_seconds: int = setting(
        seconds, "300", "window as in the HPA's behavior.scaleDown")
    scale_up_step: Step | None = setting(
        step, None, "most pods added in one scale, as 2 or 50%; 0 switches scale-up off",
        "unset: no limit")
    scale_down_step: Step | None = setting(
        step, None, "most pods removed in one scale, as 2 or 50%; 0 switches scale-down off",
        "unset: no limit")
    fallback_replicas: int | None = setting(
        replica_count, None, "floor held when the queue stays unreadable; it only ever adds pods",
        "unset: hold")
    fallback_after_seconds: int = setting(seconds, "180", "how long unreadable before that")
    timeout_seconds: int = setting(
        whole(1, 3600, "seconds"), "45", "budget of the whole run, retries included")
    dry_run: bool = setting(
        flag, "false", "decide and report, change nothing (--dry-run does the same)")
    log_level: str = setting(
        choice("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: str = setting(
        choice("text", "json"), "text",
        "json: one JSON object a line, with severity and message as Cloud Logging reads them")
    termination_log: str = setting(
        text, "/dev/termination-log",
        "where the result record goes; the default is written only where it exists (in a pod), "
        "a path that was set is created")
    # fmt: on

    @property
    def longest_cooldown_seconds(self) -> int:
        return max(self.scale_up_cooldown_seconds, self.scale_down_cooldown_seconds)

    @property
    def count_limit(self) -> int:
        """The most jobs worth counting: a billed read covers 1,000 index entries, and more than
        fill the range change nothing. Firestore takes a limit as an int32."""
        return min(max(1000, self.max_replicas * self.jobs_per_pod), INT32_MAX)


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
        if raw is None and required:
            problems.append(f"{variable} is not set: expected the {item.metadata['meaning']}")
        elif raw is None or (raw == "" and default is None and not required):
            values[item.name] = None
        else:
            try:
                values[item.name] = item.metadata["parse"](raw)
            except ValueError as error:
                problems.append(f"{variable}={quoted(raw)}: {error}")
    problems += contradictions(values)
    if problems:
        raise Failure("InvalidSettings", "; ".join(problems), exit_code=2)
    return Settings(**values)


def contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """The mistakes that show only when settings are held against each other.

    `values` lacks those that could not be parsed.
    """
    lowest, highest = values.get("min_replicas"), values.get("max_replicas")
    if lowest is not None and highest is not None and lowest > highest:
        yield (f"MIN_REPLICAS='{lowest}': expected no more than MAX_REPLICAS, which is '{highest}'")
    fallback = values.get("fallback_replicas")
    if fallback is not None and highest is not None and fallback > highest:
        yield (
            f"FALLBACK_REPLICAS='{fallback}': expected no more than MAX_REPLICAS, "
            f"which is '{highest}'"
        )
    path = values.get("queue_collection")
    if values.get("queue_collection_group") and path and "/" in path:
        yield (
            f"QUEUE_COLLECTION={quoted(path)}: expected the bare id of the collections, such as "
            f"{path.rsplit('/', 1)[1]}, where QUEUE_COLLECTION_GROUP is true"
        )
    if any(condition.op == "not-in" for condition in values.get("busy_filter") or ()):
        yield (
            "BUSY_FILTER: expected no not-in, which Firestore cannot combine with the in over "
            "the pods' names; say which values are busy instead"
        )


def settings_table() -> str:
    """The table that `--help` prints, one variable a line."""
    rows = [(f.name.upper(), f.metadata["shown"], f.metadata["meaning"]) for f in fields(Settings)]
    return "\n".join(f"  {name}\n      {meaning} [{shown}]" for name, shown, meaning in rows)


# ---------------------------------------------------------------------------------- decision


@dataclass(frozen=True)
class Queue:
    """What was read of the queue, in jobs. `busy` is None where nobody asked."""

    waiting: int
    capped: bool = False
    busy: int | None = None

    def __str__(self) -> str:
        waiting = f"{self.waiting} or more" if self.capped else str(self.waiting)
        jobs = "job" if waiting == "1" else "jobs"
        return f"{waiting} {jobs} waiting" + ("" if self.busy is None else f", {self.busy} busy")


@dataclass(frozen=True)
class Entry:
    """A recommendation of the past: when, in Unix seconds, and how many pods."""

    at: int
    replicas: int


@dataclass(frozen=True)
class Memory:
    """What the Deployment's annotations say. `warnings` names each value that cannot be read."""

    last_scale_time: datetime | None = None
    last_direction: Direction | None = None
    history: tuple[Entry, ...] = ()
    failing_since: datetime | None = None
    paused: bool = False
    paused_replicas: int | None = None
    paused_scale_in: bool = False
    paused_scale_out: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observed:
    """All that a decision rests on.

    `keep` is the least number of replicas that costs no busy pod, None where it was not read.
    """

    now: datetime
    replicas: int
    memory: Memory = Memory()
    queue: Queue | None = None
    keep: int | None = None


@dataclass(frozen=True)
class Decision:
    """How many replicas the Deployment gets, and why.

    `desired` is the recommendation within the range, None where the queue was not read.
    `annotations` are those to write; None removes one, and those not named stay as they are.
    """

    replicas: int
    reason: Reason
    message: str
    desired: int | None = None
    annotations: Mapping[str, str | None] = field(default_factory=dict)


def pods(number: int) -> str:
    return "1 pod" if number == 1 else f"{number} pods"


def read_time(value: str) -> datetime:
    """A time as a person types it: RFC 3339 with any offset and fraction, or Unix seconds.

    One without an offset counts as UTC. Raises ValueError.
    """
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return datetime.fromtimestamp(float(value), UTC)
        when = datetime.fromisoformat(value.strip().upper())
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("not a time such as 2026-01-01T00:00:00Z or 1767225600") from None


def write_time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_history(value: str) -> tuple[Entry, ...]:
    """The inverse of `write_history`. Raises ValueError."""
    pairs = [re.fullmatch(r"(\d{1,12}):(\d{1,10})", word) for word in value.split()]
    entries = [Entry(int(pair[1]), int(pair[2])) for pair in pairs if pair]
    if len(entries) < len(pairs):
        raise ValueError("not a history such as '1767225600:3 1767225660:1', so it starts afresh")
    return tuple(entries)


def write_history(entries: Iterable[Entry]) -> str | None:
    return " ".join(f"{entry.at}:{entry.replicas}" for entry in entries) or None


def recall(annotations: Mapping[str, str], settings: Settings, now: datetime) -> Memory:
    """Read our annotations. A value that cannot be read is warned about and counts as absent,
    but for a pause: whoever wrote one wanted to pause (KEDA reads it so, too)."""
    warnings: list[str] = []

    def read(name: str, parse: Callable[[str], T]) -> T | None:
        if name not in annotations:
            return None
        try:
            return parse(annotations[name])
        except ValueError as error:
            warnings.append(f"{name}={quoted(annotations[name])} is {error}")
            return None

    def past(value: str) -> datetime:
        when = read_time(value)
        if (when - now).total_seconds() > settings.longest_cooldown_seconds:
            raise ValueError("further ahead than the longest cooldown, so it counts as absent")
        return when

    def pause(name: str) -> bool:
        word = annotations.get(name, "false").strip().lower()
        if word not in ("true", "t", "1", "false", "f", "0"):
            warnings.append(f"{name}={quoted(annotations[name])} is not true or false: it holds")
        return word not in ("false", "f", "0")

    ordered = read(PAUSED_REPLICAS, replica_count)
    return Memory(
        last_scale_time=read(LAST_SCALE_TIME, past),
        last_direction=read_direction(annotations.get(LAST_SCALE, "")),
        history=read(RECOMMENDATIONS, read_history) or (),
        failing_since=read(FAILING_SINCE, past),
        paused=pause(PAUSED) or (PAUSED_REPLICAS in annotations and ordered is None),
        paused_replicas=ordered,
        paused_scale_in=pause(PAUSED_SCALE_IN),
        paused_scale_out=pause(PAUSED_SCALE_OUT),
        warnings=tuple(warnings),
    )


def read_direction(last_scale: str) -> Direction | None:
    directions: dict[str, Direction] = {"up": "up", "down": "down"}
    return directions.get(last_scale.strip().partition(" ")[0])


def decide(settings: Settings, seen: Observed) -> Decision:
    """The rules of the scaler, in their order. Pure: no I/O, no clock."""
    return overrule(settings, seen) or follow_queue(settings, seen)


def overrule(settings: Settings, seen: Observed) -> Decision | None:
    """Rules 1 to 3, which need no queue: a person's pause, a workload that was switched off, the
    range. None where the queue decides."""
    memory, current = seen.memory, seen.replicas
    lowest, highest = settings.min_replicas, settings.max_replicas
    if memory.paused:
        return Decision(current, "Paused", f"paused by annotation; stays at {pods(current)}")
    if memory.paused_replicas is not None:
        order = f"{PAUSED_REPLICAS} orders {pods(memory.paused_replicas)}"
        done = scaled(current, memory.paused_replicas)
        return Decision(memory.paused_replicas, "Paused", f"{order}; {done}")
    if current == 0 and lowest > 0:
        message = f"somebody set 0 replicas although MIN_REPLICAS={lowest}: switched off until "
        return Decision(0, "ScalingDisabled", message + "somebody scales it to 1 or more")
    if current < lowest:
        return into_range(seen, lowest, "TooFewReplicas", f"MIN_REPLICAS={lowest}")
    if current > highest:
        return into_range(seen, highest, "TooManyReplicas", f"MAX_REPLICAS={highest}")
    return None


def into_range(seen: Observed, bound: int, reason: Reason, limit: str) -> Decision:
    """Rule 3: back into the range at once, as the HPA does it; busy pods stay protected."""
    current, target = seen.replicas, spare_busy(seen, bound)
    why = f"{pods(current)} where {limit}"
    if switched_off(seen, bound):
        return Decision(current, *disabled(current, bound, why))
    if target == current:
        return Decision(current, *workers_busy(current, why))
    return Decision(target, reason, f"{why}; {scaled(current, target)}")


def follow_queue(settings: Settings, seen: Observed) -> Decision:
    """Rules 4 to 8, and what the stabilization windows have to remember of them."""
    assert seen.queue is not None, "rules 4 to 8 need the queue"
    desired = recommend(settings, seen.queue)
    if switched_off(seen, desired):
        history: list[Entry] = []
        why = ask(settings, seen.queue, desired)
        target, (reason, why) = seen.replicas, disabled(seen.replicas, desired, why)
    else:
        history = remember(settings, seen, desired)
        target, reason, why = follow(settings, seen, desired, history)
    kept = None if at_rest(settings, target, desired, history) else write_history(history)
    return Decision(target, reason, why, desired, {RECOMMENDATIONS: kept, FAILING_SINCE: None})


def follow(
    settings: Settings, seen: Observed, desired: int, history: Sequence[Entry]
) -> tuple[int, Reason, str]:
    """Rules 5 to 8: windows, then steps, then busy pods, then cooldowns. The first that leaves
    nothing to change gives the reason."""
    current = seen.replicas
    why = ask(settings, seen.queue, desired)
    if desired == current:
        return current, "AtTarget", f"{why}; {scaled(current, current)}"
    stable = stabilize(settings, seen, desired, history)
    if stable == current:
        return current, *stabilized(settings, seen, desired, history, why)
    target = limit_step(settings, current, stable)
    if target == current:
        return current, *disabled(current, desired, why)
    target = spare_busy(seen, target)
    if target == current:
        return current, *workers_busy(current, why)
    wait = cooldown_left(settings, seen, target)
    if wait > 0:
        return current, *cooling(settings, seen, target, wait, why)
    return (
        target,
        "ScaledUp" if target > current else "ScaledDown",
        f"{why}; {scaled(current, target)}",
    )


def recommend(settings: Settings, queue: Queue) -> int:
    """Rule 4: enough pods for the jobs waiting and busy, within the range."""
    wanted = math.ceil((queue.waiting + (queue.busy or 0)) / settings.jobs_per_pod)
    return min(max(wanted, settings.min_replicas), settings.max_replicas)


def ask(settings: Settings, queue: Queue | None, desired: int) -> str:
    """What the queue asks for, as the beginning of a sentence."""
    bound = {
        settings.max_replicas: ", the maximum",
        settings.min_replicas: ", the minimum",
    }
    return f"{queue}: {pods(desired)} wanted{bound.get(desired, '')}"


HISTORY_ENTRIES = 200


def remember(settings: Settings, seen: Observed, desired: int) -> list[Entry]:
    """The history with today's recommendation, without the entries that can no longer matter.

    Without a history the recommendation up to now was the current number, as in the HPA
    controller's `recordInitialRecommendation`. An entry from a clock ahead of ours counts as of
    now, so that it cannot hold for longer than its window.
    """
    now = int(seen.now.timestamp())
    past = seen.memory.history or (Entry(now, seen.replicas),)
    entries = [Entry(min(entry.at, now), entry.replicas) for entry in past] + [Entry(now, desired)]
    entries.sort(key=lambda entry: (entry.at, entry.replicas))
    highest = turning_points(entries, now, settings.scale_down_stabilization_seconds, 1)
    lowest = turning_points(entries, now, settings.scale_up_stabilization_seconds, -1)
    return sorted({*highest, *lowest}, key=lambda entry: (entry.at, entry.replicas))


def turning_points(entries: Sequence[Entry], now: int, window: int, sign: int) -> list[Entry]:
    """The entries inside a window that can still be its highest (sign 1) or lowest (sign -1) at
    some later time: those that no newer entry equals or exceeds.

    More than HISTORY_ENTRIES of them are thinned out to one in each of as many equal slices of
    the window, at the slice's end: the number then holds up to one slice longer, never shorter.
    """
    kept: list[Entry] = []
    for entry in reversed(entries):
        if entry.at > now - window and (
            not kept or sign * (entry.replicas - kept[-1].replicas) > 0
        ):
            kept.append(entry)
    if len(kept) > HISTORY_ENTRIES:
        slice_seconds = math.ceil(window / HISTORY_ENTRIES)
        ends = {math.ceil(entry.at / slice_seconds): entry.replicas for entry in kept}
        kept = [Entry(end * slice_seconds, replicas) for end, replicas in ends.items()]
    return kept


def at_rest(settings: Settings, replicas: int, desired: int, history: Sequence[Entry]) -> bool:
    """Whether the windows have nothing to remember: starting afresh from the current number could
    only make them hold from one run later."""
    numbers = [desired, *(entry.replicas for entry in history)]
    no_scale_down = settings.scale_down_stabilization_seconds == 0 or min(numbers) >= replicas
    no_scale_up = settings.scale_up_stabilization_seconds == 0 or max(numbers) <= replicas
    return no_scale_down and no_scale_up


def stabilize(settings: Settings, seen: Observed, desired: int, history: Sequence[Entry]) -> int:
    """Rule 5: the lowest recommendation of the scale-up window, the highest of the scale-down
    window, as the HPA controller's `stabilizeRecommendationWithBehaviors` has it: an entry
    exactly as old as its window lies outside."""
    now, current = int(seen.now.timestamp()), seen.replicas
    if desired > current:
        window = settings.scale_up_stabilization_seconds
        lowest = min([desired, *(e.replicas for e in history if e.at > now - window)])
        return max(lowest, current)
    window = settings.scale_down_stabilization_seconds
    highest = max([desired, *(e.replicas for e in history if e.at > now - window)])
    return min(highest, current)


def limit_step(settings: Settings, current: int, target: int) -> int:
    """Rule 6: at most one step towards the target, and at least one pod of it. The percentages
    are rounded in floating point because the HPA controller's are."""
    limit = settings.scale_up_step if target > current else settings.scale_down_step
    if limit is None:
        return target
    if limit.value == 0:
        return current
    if target > current:
        most = (
            math.ceil(current * (1 + limit.value / 100)) if limit.percent else current + limit.value
        )
        return min(target, max(most, current + 1))
    least = int(current * (1 - limit.value / 100)) if limit.percent else current - limit.value
    return max(target, min(least, current - 1))


def spare_busy(seen: Observed, target: int) -> int:
    """Rule 7: a scale-down leaves the busy pods."""
    return target if seen.keep is None else max(target, min(seen.keep, seen.replicas))


def cooldown_left(settings: Settings, seen: Observed, target: int) -> int:
    """Rule 8: seconds until a scale to the target may happen. A scale-up waits after a scale-up,
    a scale-down after any scale; if the direction of the last one is unknown, both wait."""
    last = seen.memory.last_scale_time
    if last is None or (target > seen.replicas and seen.memory.last_direction == "down"):
        return 0
    cooldown = cooldown_seconds(settings, seen, target)
    return math.ceil(cooldown - (seen.now - last).total_seconds())


def cooldown_seconds(settings: Settings, seen: Observed, target: int) -> int:
    up = target > seen.replicas
    return settings.scale_up_cooldown_seconds if up else settings.scale_down_cooldown_seconds


def switched_off(seen: Observed, target: int) -> bool:
    if target > seen.replicas:
        return seen.memory.paused_scale_out
    return target < seen.replicas and seen.memory.paused_scale_in


def scaled(current: int, target: int) -> str:
    if target == current:
        return f"stays at {pods(current)}"
    return f"scaled {'up' if target > current else 'down'} from {current} to {pods(target)}"


def disabled(current: int, target: int, why: str) -> tuple[Reason, str]:
    if target > current:
        return "ScaleUpDisabled", f"{why}; stays at {pods(current)}, as scale-up is switched off"
    return "ScaleDownDisabled", f"{why}; stays at {pods(current)}, as scale-down is switched off"


def workers_busy(current: int, why: str) -> tuple[Reason, str]:
    return "WorkersBusy", f"{why}; stays at {pods(current)}, as removing one would cost a busy one"


def stabilized(
    settings: Settings, seen: Observed, desired: int, history: Sequence[Entry], why: str
) -> tuple[Reason, str]:
    """The reason and the sentence of rule 5: which window holds the number, and for how long."""
    now, current = int(seen.now.timestamp()), seen.replicas
    if desired > current:
        window = settings.scale_up_stabilization_seconds
        holding = [e.at for e in history if e.replicas <= current and e.at > now - window]
        reason: Reason = "ScaleUpStabilized"
        variable = "SCALE_UP_STABILIZATION_SECONDS"
    else:
        window = settings.scale_down_stabilization_seconds
        holding = [e.at for e in history if e.replicas >= current and e.at > now - window]
        reason, variable = "ScaleDownStabilized", "SCALE_DOWN_STABILIZATION_SECONDS"
    left = max(holding) + window - now
    return reason, f"{why}; stays at {pods(current)} for {left} s more ({variable}={window})"


def cooling(
    settings: Settings, seen: Observed, target: int, wait: int, why: str
) -> tuple[Reason, str]:
    """The reason and the sentence of rule 8."""
    up = target > seen.replicas
    variable = "SCALE_UP_COOLDOWN_SECONDS" if up else "SCALE_DOWN_COOLDOWN_SECONDS"
    cooldown = cooldown_seconds(settings, seen, target)
    message = (
        f"{why}; stays at {pods(seen.replicas)} for {wait} s more ({variable}={cooldown} "
        f"since {write_time(seen.memory.last_scale_time or seen.now)})"
    )
    return "ScaleUpCooldown" if up else "ScaleDownCooldown", message


def without_queue(settings: Settings, seen: Observed, problem: QueueFailure) -> Decision:
    """What an unreadable queue leads to: the replicas stay, or after a while go up to the
    fallback. They never go down."""
    current, fallback = seen.replicas, settings.fallback_replicas
    if fallback is None:
        return Decision(current, problem.reason, f"{problem}; stays at {pods(current)}")
    since = seen.memory.failing_since or seen.now
    stamp = {} if seen.memory.failing_since else {FAILING_SINCE: write_time(since)}
    left = math.ceil(settings.fallback_after_seconds - (seen.now - since).total_seconds())
    if left > 0:
        message = f"{problem}; stays at {pods(current)}, and falls back to {fallback} in {left} s"
        return Decision(current, problem.reason, message, annotations=stamp)
    if fallback > current and seen.memory.paused_scale_out:
        return Decision(current, *disabled(current, fallback, str(problem)), annotations=stamp)
    done = scaled(current, max(current, fallback))
    message = f"{problem}; falls back to FALLBACK_REPLICAS={fallback}: {done}"
    return Decision(max(current, fallback), "Fallback", message, annotations=stamp)


# --------------------------------------------------------------------------- budget, retries


@dataclass
class Progress:
    """How far a run has come: what is told of it if it has to end in the middle.

    `in_doubt` is true while a patch may or may not have reached the Deployment; `outcome` is set
    as soon as the Deployment is known to be scaled, whatever fails after that.
    """

    started: float
    stage: str = "reading the settings"
    stage_reason: Reason = "ClusterUnavailable"
    namespace: str | None = None
    replicas: int | None = None
    in_doubt: bool = False
    outcome: Outcome | None = None

    def enter(self, stage: str, reason: Reason) -> None:
        self.stage, self.stage_reason = stage, reason


@dataclass(frozen=True)
class Budget:
    """Time that a run, or a part of it, may still take.

    `deadline` is on the monotonic clock; one call gets `call_seconds` of it at the most, so that
    one that is never answered can be tried again.
    """

    deadline: float
    call_seconds: float

    def left(self) -> float:
        """Seconds until the deadline. Never 0, which the clients would read as no limit."""
        return max(0.05, self.deadline - time.monotonic())

    def for_call(self) -> float:
        return min(self.call_seconds, self.left())

    def share(self, part: float) -> Budget:
        return replace(self, deadline=time.monotonic() + part * self.left())


def retrying(budget: Budget, again: Callable[[BaseException], bool]) -> Retrying:
    """Tries again with growing, jittered pauses, or the server's Retry-After where that is
    longer, as long as the next try still begins within the budget."""
    from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

    backoff = wait_random_exponential(multiplier=0.2, max=5)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(backoff(state), error.retry_after if isinstance(error, Failure) else 0.0)

    return Retrying(
        retry=retry_if_exception(again),
        wait=pause,
        stop=stop_before_delay(budget.left()),
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    return isinstance(error, Failure) and error.transient


def is_interference(error: BaseException) -> bool:
    return isinstance(error, Interfered)


def brief(error: object) -> str:
    """An error of a library in one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 1200 else line[:1197] + "..."


# ------------------------------------------------------------------------------------- queue

TRANSIENT_CODES = frozenset(
    ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "CANCELLED"]
)
# What to do where nothing gets better by itself.
ADVICE = {
    "UNAUTHENTICATED": "check GOOGLE_APPLICATION_CREDENTIALS or Workload Identity",
    "PERMISSION_DENIED": "grant the scaler's Google account the IAM role roles/datastore.viewer",
    "NOT_FOUND": "check FIRESTORE_PROJECT and FIRESTORE_DATABASE",
    "INVALID_ARGUMENT": "check QUEUE_COLLECTION, WAITING_FILTER, BUSY_FILTER and BUSY_POD_FIELD",
    "FAILED_PRECONDITION": "if an index is missing, create it with the link above",
}
IN_VALUES = 30
WAITING = "counting waiting jobs"


def queue_failure(doing: str, error: Exception) -> QueueFailure:
    """The failure that an error of the Firestore client stands for."""
    code = getattr(getattr(error, "grpc_status_code", None), "name", type(error).__name__)
    message = f"Firestore failed while {doing}: {code}: {brief(error)}"
    if code in ADVICE:
        denied = code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        reason: Reason = "Forbidden" if denied else "QueueUnavailable"
        return QueueFailure(reason, f"{message}; {ADVICE[code]}", exit_code=2)
    return QueueFailure("QueueUnavailable", message, transient=code in TRANSIENT_CODES)


class JobQueue:
    """The Firestore collection that holds the jobs."""

    def __init__(self, settings: Settings, client: Client, budget: Budget, progress: Progress):
        self._settings, self._client = settings, client
        self._budget, self._progress = budget, progress
        self._begun: Future[int] | None = None

    def begin(self) -> None:
        """Begin to count the waiting jobs, for the first `read`, in a thread of its own."""
        from concurrent.futures import ThreadPoolExecutor

        self._begun = ThreadPoolExecutor(1).submit(self._waiting)

    def read(self, pod_names: Sequence[str] | None) -> Queue:
        """Count the waiting jobs and, given the live pods' names, their busy jobs.

        Raises QueueFailure.
        """
        self._progress.enter(WAITING, "QueueUnavailable")
        begun, self._begun = self._begun, None
        waiting = begun.result() if begun else self._waiting()
        capped = waiting >= self._settings.count_limit
        if pod_names is None:
            return Queue(waiting, capped)
        doing, batches = "counting busy jobs", self._busy_filters(pod_names)
        self._progress.enter(doing, "QueueUnavailable")
        return Queue(waiting, capped, sum(self._ask(doing, self._count, b) for b in batches))

    def busy_pods(self, pod_names: Sequence[str]) -> set[str]:
        """Which of these pods hold a busy job. Raises QueueFailure."""
        doing, batches = "reading which pods are busy", self._busy_filters(pod_names)
        self._progress.enter(doing, "QueueUnavailable")
        return {name for batch in batches for name in self._ask(doing, self._pods_of, batch)}

    def _busy_filters(self, pod_names: Sequence[str]) -> Iterator[list[Filter]]:
        """The filters for as many pods as Firestore takes in an `in`: 30, shared with the lists
        in BUSY_FILTER, as the limit is on the product of them all."""
        conditions = self._settings.busy_filter or ()
        lists = [len(f.value) for f in conditions if f.op in ("in", "array_contains_any")]
        batch = max(1, IN_VALUES // math.prod(lists))
        for start in range(0, len(pod_names), batch):
            names = list(pod_names[start : start + batch])
            yield [*conditions, Filter(self._settings.busy_pod_field, "in", names)]

    def _where(self, conditions: Iterable[Filter]) -> Any:
        from google.cloud.firestore import FieldFilter

        by_group = self._settings.queue_collection_group
        start = self._client.collection_group if by_group else self._client.collection
        query: Any = start(self._settings.queue_collection)
        for one in conditions:
            name = api_field_path(one.field)
            query = query.where(filter=FieldFilter(name, one.op, one.value))
        return query

    def _waiting(self) -> int:
        return self._ask(WAITING, self._count, self._settings.waiting_filter)

    def _count(self, conditions: Sequence[Filter], timeout: float) -> int:
        query = self._where(conditions).limit(self._settings.count_limit).count(alias="jobs")
        results = [row for rows in query.get(retry=never(), timeout=timeout) for row in rows]
        # The client gives a count of zero as 0.0.
        counts = [int(row.value) for row in results if row.value >= 0]
        if len(counts) != 1:
            raise LookupError("no usable count")
        return counts[0]

    def _pods_of(self, conditions: Sequence[Filter], timeout: float) -> set[str]:
        field = api_field_path(self._settings.busy_pod_field)
        query = self._where(conditions).select([field])
        return {str(job.get(field)) for job in query.stream(retry=never(), timeout=timeout)}

    def _ask(
        self,
        doing: str,
        question: Callable[[Sequence[Filter], float], T],
        conditions: Sequence[Filter],
    ) -> T:
        """Put a question, with retries: what it is about, and a timeout in seconds."""
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        def once() -> T:
            started = time.monotonic()
            try:
                answer = question(conditions, self._budget.for_call())
            except (GoogleAPIError, GoogleAuthError) as error:
                LOG.debug("%s failed after %.3f s", doing, time.monotonic() - started)
                raise queue_failure(doing, error) from error
            except (ValueError, TypeError) as error:
                # A number of more than 64 bits in a filter, say: the client cannot encode it.
                problem = f"the query cannot be sent: {brief(error)}; {ADVICE['INVALID_ARGUMENT']}"
                raise QueueFailure("QueueUnavailable", problem, exit_code=2) from error
            except LookupError as error:
                problem = f"Firestore gave {brief(error)} while {doing}"
                raise QueueFailure("QueueUnavailable", problem) from error
            LOG.debug("%s took %.3f s: %s", doing, time.monotonic() - started, answer)
            return answer

        # The rest is for the cluster, which has to be told of a fallback.
        return retrying(self._budget.share(0.7), is_transient)(once)


def api_field_path(name: str) -> str:
    """A field's path as the API takes it, with quotes where a part of it needs them. One that
    has quotes already is left as it is."""
    from google.cloud.firestore import Client

    return name if "`" in name else str(Client.field_path(*name.split(".")))


def never() -> Any:
    """The Firestore client's retries, switched off: tenacity's are the ones with a deadline.

    Not None, which its streams take for an object when an answer breaks off.
    """
    from google.api_core.retry import Retry, if_exception_type

    return Retry(predicate=if_exception_type())


def open_queue(settings: Settings, budget: Budget, progress: Progress) -> JobQueue:
    """Raises QueueFailure where there are no usable Google credentials."""
    progress.enter("loading the Firestore client", "QueueUnavailable")
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.firestore import Client

    try:
        client = Client(settings.firestore_project, database=settings.firestore_database)
    except (GoogleAuthError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # Without the library's own text, which quotes what it was given: at times a private key.
        raise QueueFailure(
            "Forbidden",
            "no usable Google credentials or project for Firestore: looked for "
            "GOOGLE_APPLICATION_CREDENTIALS (the path of a file), gcloud's login, Workload "
            f"Identity, FIRESTORE_PROJECT ({type(error).__name__})",
            exit_code=2,
        ) from error
    return JobQueue(settings, client, budget, progress)


# ----------------------------------------------------------------------------------- cluster

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
BUSY_COST = INT32_MAX
PAGE = 500


@dataclass(frozen=True)
class Deployment:
    """What one GET of the Deployment tells."""

    uid: str
    resource_version: str
    replicas: int
    annotations: Mapping[str, str]
    selector: str
    rival: str | None


@dataclass(frozen=True)
class Pod:
    """A live pod. `standing` orders pods as the ReplicaSet controller does before it looks at
    deletion costs: those that sort first are removed first."""

    name: str
    owner: str | None
    standing: tuple[bool, int, bool]
    deletion_cost: int


def parse_deployment(answer: Mapping[str, Any]) -> Deployment:
    metadata, spec = answer["metadata"], answer["spec"]
    replicas = spec.get("replicas")
    return Deployment(
        uid=metadata.get("uid", ""),
        resource_version=metadata["resourceVersion"],
        replicas=1 if replicas is None else int(replicas),
        annotations=strings(metadata.get("annotations") or {}),
        selector=selector_string(spec.get("selector") or {}),
        rival=rival(metadata.get("managedFields") or []),
    )


def strings(values: Mapping[str, str]) -> dict[str, str]:
    """The values, if they are what the API allows; else TypeError."""
    if not all(isinstance(value, str) for value in values.values()):
        raise TypeError("annotations that are not strings")
    return dict(values)


def selector_string(selector: Mapping[str, Any]) -> str:
    """A label selector in the form that a list request takes."""
    words = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for one in selector.get("matchExpressions") or []:
        key, values = one["key"], ",".join(one.get("values") or [])
        forms = {
            "In": f"{key} in ({values})",
            "NotIn": f"{key} notin ({values})",
            "Exists": key,
            "DoesNotExist": f"!{key}",
        }
        words.append(forms[one["operator"]])
    return ",".join(words)


def rival(managed_fields: Sequence[Mapping[str, Any]]) -> str | None:
    """Who set `spec.replicas` last, if it was neither this scaler nor a person's kubectl."""
    owners = [
        entry
        for entry in managed_fields
        if "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
    ]
    if not owners:
        return None
    last = max(owners, key=lambda entry: entry.get("time") or "")
    manager = str(last.get("manager"))
    if manager in (FIELD_MANAGER, "kubectl") or manager.startswith("kubectl-"):
        return None
    through = f" through the {last['subresource']} subresource" if last.get("subresource") else ""
    return f"{manager}{through} at {last.get('time')}"


def parse_pod(item: Mapping[str, Any]) -> Pod | None:
    """None for a pod that the ReplicaSet controller does not count either: one that is ending or
    has ended, or that another controller's labels resemble."""
    metadata, status = item["metadata"], item.get("status") or {}
    phase = status.get("phase")
    if metadata.get("deletionTimestamp") or phase in ("Succeeded", "Failed"):
        return None
    owners = [one for one in metadata.get("ownerReferences") or [] if one.get("controller")]
    if owners and owners[0].get("kind") != "ReplicaSet":
        return None
    conditions = status.get("conditions") or []
    return Pod(
        name=metadata["name"],
        owner=owners[0].get("uid") if owners else None,
        standing=(
            bool((item.get("spec") or {}).get("nodeName")),
            {"Pending": 0, "Unknown": 1, "Running": 2}.get(str(phase), 0),
            any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions),
        ),
        deletion_cost=read_cost((metadata.get("annotations") or {}).get(DELETION_COST, "0")),
    )


def parse_pods(answer: Mapping[str, Any]) -> list[Pod | None]:
    return [parse_pod(item) for item in answer.get("items") or []]


def read_cost(value: str) -> int:
    """The controller takes an unreadable cost for 0; -1 has it written anew."""
    return int(value) if re.fullmatch(r"-?[0-9]{1,10}", value) else -1


def least_replicas(live: Sequence[Pod], busy: set[str]) -> int:
    """The least number of replicas at which the controllers remove idle pods only, once each busy
    pod has the highest deletion cost.

    The ReplicaSet controller takes pods that are unassigned, pending or not ready before it
    compares deletion costs, so an idle pod is a safe victim only if it comes before the first
    busy one in the whole order. During a rollout the Deployment controller shares a scale-in
    between the ReplicaSets in proportion to their sizes, and no mark can steer it: nothing is
    removed then.
    """
    if not any(pod.name in busy for pod in live):
        return 0
    if len({pod.owner for pod in live}) > 1:
        return INT32_MAX
    first_busy = min((pod.standing, BUSY_COST) for pod in live if pod.name in busy)
    idle = [pod for pod in live if pod.name not in busy]
    return len(live) - sum((pod.standing, pod.deletion_cost) < first_busy for pod in idle)


def wanted_cost(pod: Pod, busy: set[str]) -> int:
    return BUSY_COST if pod.name in busy else 0


class Cluster:
    """The API server, as far as this scaler may see it: one Deployment, its pods, its events.

    Every method raises ClusterFailure.
    """

    def __init__(
        self, client: ApiClient, namespace: str, name: str, budget: Budget, progress: Progress
    ):
        self.namespace, self.budget = namespace, budget
        self._client, self._name, self._progress = client, name, progress

    def read_deployment(self) -> Deployment:
        def once() -> Deployment:
            doing = "reading the Deployment"
            answer = self._call(doing, "GET", "deployments", self._name)
            return understood(doing, parse_deployment, answer, "Deployment")

        return self._retry(once)

    def live_pods(self, selector: str) -> list[Pod]:
        if not selector:
            # It would select every pod of the namespace; the API allows no such Deployment.
            problem = "the Deployment came without a selector"
            raise ClusterFailure("ClusterUnavailable", problem)

        def once() -> list[Pod]:
            doing, live = "listing the pods", []
            query = {"labelSelector": selector, "limit": str(PAGE)}
            while True:
                answer = self._call(doing, "GET", "pods", query=query)
                page = understood(doing, parse_pods, answer, "PodList")
                live += [pod for pod in page if pod]
                token = (answer.get("metadata") or {}).get("continue")
                if not token:
                    # A bare pod with the same labels is somebody's own.
                    return [pod for pod in live if pod.owner] or live
                query["continue"] = token

        return self._retry(once)

    def mark(self, pod: Pod, cost: int) -> bool:
        """Set a pod's deletion cost. False where the pod is gone."""
        body = {"metadata": {"annotations": {DELETION_COST: str(cost)}}}
        try:
            self._retry(lambda: self._call("marking pods", "PATCH", "pods", pod.name, body))
        except ClusterFailure as failure:
            if failure.status == 404:
                return False
            raise
        return True

    def patch_deployment(self, body: Mapping[str, Any]) -> Deployment:
        """One merge patch, and the Deployment after it. It is not repeated: Interfered means that
        the Deployment has to be read again to know what became of it."""
        doing = "patching the Deployment"
        try:
            answer = self._call(doing, "PATCH", "deployments", self._name, body)
            return understood(doing, parse_deployment, answer, "Deployment")
        except ClusterFailure as failure:
            if not failure.transient:
                raise
            again = Interfered(failure.reason, str(failure), retry_after=failure.retry_after)
            again.status = failure.status
            raise again from failure

    def post_event(self, event: Mapping[str, Any]) -> None:
        self._call("writing the Event", "POST", "events", body=event)

    def _retry(self, once: Callable[[], T]) -> T:
        return retrying(self.budget, is_transient)(once)

    def _call(
        self,
        doing: str,
        method: str,
        resource: str,
        name: str = "",
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Any:
        """One request with plain JSON, which spares the import of the client's generated models
        (more CPU than all the rest of a run)."""
        from kubernetes.client.exceptions import OpenApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        self._progress.enter(doing, "ClusterUnavailable")
        group = "/apis/apps/v1" if resource == "deployments" else "/api/v1"
        path = f"{group}/namespaces/{self.namespace}/{resource}" + (f"/{name}" if name else "")
        parameters = dict(query or {}) if method == "GET" else {"fieldManager": FIELD_MANAGER}
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        started = time.monotonic()
        try:
            request = self._client.param_serialize(
                method,
                path,
                query_params=list(parameters.items()),
                header_params={"Accept": "application/json", "Content-Type": kind},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._client.call_api(*request, _request_timeout=self.budget.for_call())
            text = response.read()
        except (HTTPError, OpenApiException, ConfigException, OSError) as error:
            LOG.debug("%s %s failed after %.3f s", method, path, time.monotonic() - started)
            raise ClusterFailure(
                "ClusterUnavailable",
                f"the API server did not answer while {doing}: {brief(error)}",
                transient=True,
            ) from error
        except ValueError:
            # Its text, http.client's, quotes the whole header.
            problem = "the credentials hold a character that no HTTP header can, such as a line end"
            raise ClusterFailure("Forbidden", problem, exit_code=2) from None
        LOG.debug("%s %s: %d in %.3f s", method, path, response.status, time.monotonic() - started)
        if not 200 <= response.status < 300:
            raise self._refusal(doing, method, resource, response)
        return understood(doing, json.loads, text)

    def _refusal(self, doing: str, method: str, resource: str, response: Any) -> ClusterFailure:
        """The failure that an HTTP status stands for, with what to do about it."""
        status = response.status
        message = f"the API server answered {status} while {doing}: {status_message(response.data)}"
        if status in (408, 410, 429) or status >= 500:
            pause = retry_after(response.headers)
            failure = ClusterFailure("ClusterUnavailable", message, 1, True, pause)
        elif status == 404 and resource == "deployments":
            message = f"there is no Deployment {self._name} in namespace {self.namespace}"
            advice = "; check DEPLOYMENT and NAMESPACE"
            failure = ClusterFailure("DeploymentNotFound", message + advice, 2)
        elif status == 401:
            advice = "; the credentials of the scaler are missing or expired"
            failure = ClusterFailure("Forbidden", message + advice, 2)
        elif status == 403:
            read = "get" if resource == "deployments" else "list"
            verb = {"PATCH": "patch", "POST": "create"}.get(method, read)
            advice = (
                f"; the Role in namespace {self.namespace} has to allow {verb} on {resource} "
                "(rbac.yaml), if no admission policy refused it (guardrails.yaml)"
            )
            failure = ClusterFailure("Forbidden", message + advice, 2)
        elif status == 409:
            failure = Interfered("ClusterUnavailable", message)
        else:
            reason: Reason = "Forbidden" if status == 422 else "ClusterUnavailable"
            failure = ClusterFailure(reason, message, 2)
        failure.status = status
        return failure


def understood(doing: str, parse: Callable[[Any], T], answer: Any, kind: str | None = None) -> T:
    """What an answer means; one that is not what was asked for is a transient failure (a proxy's
    error page, an answer cut short)."""
    try:
        if kind and answer.get("kind") != kind:
            raise ValueError(f"kind {quoted(answer.get('kind'))} instead of {kind}")
        return parse(answer)
    except (
        ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise ClusterFailure(
            "ClusterUnavailable",
            f"the API server's answer makes no sense while {doing}: {type(error).__name__}",
            transient=True,
        ) from error


def status_message(text: bytes) -> str:
    """The sentence of a Status object, or the beginning of whatever came instead."""
    try:
        return brief(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return quoted(text.decode(errors="replace"))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds; 0 where the header is absent or a date."""
    value = headers.get("Retry-After") or ""
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def open_cluster(
    settings: Settings, environ: Mapping[str, str], budget: Budget, progress: Progress
) -> Cluster:
    """The cluster that this pod runs in or, outside one, the kubeconfig's, as for kubectl.

    Raises ClusterFailure where there is no usable configuration.
    """
    progress.enter("loading the Kubernetes client", "ClusterUnavailable")
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from yaml import YAMLError

    configuration = Configuration()
    configuration.retries = False  # urllib3's own would outlast the budget
    try:
        if "KUBERNETES_SERVICE_HOST" in environ and not environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
            own = (SERVICE_ACCOUNT / "namespace").read_text().strip()
        else:
            config.load_kube_config(client_configuration=configuration, persist_config=False)
            own = config.list_kube_config_contexts()[1]["context"].get("namespace") or "default"
    except (
        config.ConfigException, YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError,
    ) as error:  # fmt: skip
        said = brief(error) if isinstance(error, config.ConfigException | OSError) else "damaged"
        raise ClusterFailure(
            "ClusterUnavailable",
            "no usable cluster configuration: looked for a service account "
            f"(KUBERNETES_SERVICE_HOST and {SERVICE_ACCOUNT}), KUBECONFIG and ~/.kube/config: "
            f"{type(error).__name__}: {said}",
            exit_code=2,
        ) from error
    client = ApiClient(configuration)
    client.user_agent = f"queue-scaler/{__version__}"
    progress.namespace = settings.namespace or own
    return Cluster(client, progress.namespace, settings.deployment, budget, progress)


# --------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Outcome:
    """How a run ended; with the names and the times added, the result record."""

    reason: Reason
    message: str
    exit_code: int = 0
    waiting: int | None = None
    waiting_capped: bool = False
    busy: int | None = None
    current: int | None = None
    desired: int | None = None
    replicas: int | None = None
    action: Literal["scale-up", "scale-down", "none"] = "none"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """The two outside worlds of a run, its settings, and the time. The queue is opened when it is
    first asked for."""

    settings: Settings
    cluster: Cluster
    queue: Callable[[], JobQueue]
    now: Callable[[], datetime]
    progress: Progress


@dataclass(frozen=True)
class Sent:
    """A decision on its way to the Deployment, with what it rests on."""

    decision: Decision
    seen: Observed
    annotations: Mapping[str, str | None]
    exit_code: int
    warnings: tuple[str, ...]

    @property
    def scales(self) -> bool:
        return self.decision.replicas != self.seen.replicas

    def landed(self, deployment: Deployment) -> bool:
        """Whether the Deployment carries this patch."""
        return deployment.replicas == self.decision.replicas and all(
            deployment.annotations.get(name) == value for name, value in self.annotations.items()
        )

    def outcome(self, replicas: int, dry_run: bool = False) -> Outcome:
        """How the run ends, with the number of replicas that the Deployment has after it."""
        seen, decision, queue = self.seen, self.decision, self.seen.queue
        change = decision.replicas - seen.replicas
        return Outcome(
            reason=decision.reason,
            message=("dry run, nothing is changed: " if dry_run else "") + decision.message,
            exit_code=self.exit_code,
            waiting=queue.waiting if queue else None,
            waiting_capped=bool(queue and queue.capped),
            busy=queue.busy if queue else None,
            current=seen.replicas,
            desired=decision.desired,
            replicas=replicas,
            action="scale-up" if change > 0 else "scale-down" if change < 0 else "none",
            warnings=self.warnings,
        )


def run(world: World) -> Outcome:
    """Read, decide, apply; again from the start where another writer came in between.

    Raises Failure.
    """
    unsettled: list[Sent] = []
    # An attempt that begins later would blame the queue for the time that it lacks.
    budget = world.cluster.budget.share(0.8)
    return retrying(budget, is_interference)(lambda: attempt(world, unsettled))


def attempt(world: World, unsettled: list[Sent]) -> Outcome:
    settings = world.settings
    deployment = world.cluster.read_deployment()
    world.progress.replicas, world.progress.in_doubt = deployment.replicas, False
    for sent in unsettled:
        if sent.landed(deployment):
            return finish(world, deployment, sent)
    now = world.now()
    seen = Observed(now, deployment.replicas, recall(deployment.annotations, settings, now))
    exit_code = 0
    try:
        seen, decision = observe(world, deployment, seen)
    except QueueFailure as problem:
        decision, exit_code = without_queue(settings, seen, problem), problem.exit_code
    warnings = seen.memory.warnings
    if deployment.rival:
        warnings += (f"two masters: spec.replicas was last set by {deployment.rival}; keep one",)
    written = annotations_to_write(deployment, seen, decision)
    sent = Sent(decision, seen, written, exit_code, warnings)
    return apply(world, deployment, sent, unsettled)


def observe(world: World, deployment: Deployment, seen: Observed) -> tuple[Observed, Decision]:
    """Read what the decision needs, and no more: the queue is not waited for where a person or the
    range decides, and no document is read unless a scale-down is about to happen.

    Raises QueueFailure, ClusterFailure.
    """
    settings, live = world.settings, None
    decision = overrule(settings, seen)
    if decision is None:
        if settings.busy_filter is not None:
            live = world.cluster.live_pods(deployment.selector)
        names = None if live is None else [pod.name for pod in live]
        seen = replace(seen, queue=world.queue().read(names))
        decision = decide(settings, seen)
    if decision.replicas >= seen.replicas or settings.busy_filter is None:
        return seen, decision
    if live is None:
        live = world.cluster.live_pods(deployment.selector)
    return protect_busy(world, live, seen)


def protect_busy(world: World, live: Sequence[Pod], seen: Observed) -> tuple[Observed, Decision]:
    """Mark the live pods so that a scale-down takes idle ones, and decide once more with what a
    second look, after the marking, says of them: a job claimed in between protects its pod."""

    def look(live: Sequence[Pod]) -> tuple[set[str], Observed, Decision]:
        busy = world.queue().busy_pods([pod.name for pod in live])
        now_seen = replace(seen, keep=least_replicas(live, busy))
        return busy, now_seen, decide(world.settings, now_seen)

    busy, now_seen, decision = look([replace(pod, deletion_cost=0) for pod in live])
    if decision.replicas >= seen.replicas or world.settings.dry_run:
        return now_seen, decision
    before = {pod.name: pod.deletion_cost for pod in live}
    live = mark_pods(world.cluster, live, busy)
    # A pod that finished since it was marked keeps its mark, and so its place, until the next run.
    busy, now_seen, decision = look(live)
    mend = [pod for pod in live if pod.name in busy and pod.deletion_cost != BUSY_COST]
    marked = sum(pod.deletion_cost != before[pod.name] for pod in live)
    if marked + len(mend) > len(live):
        # More than one mark a pod: too much is going on. The next run has fewer to make.
        now_seen = replace(now_seen, keep=INT32_MAX)
        decision = decide(world.settings, now_seen)
    if decision.replicas < seen.replicas:
        # A person's order is carried out whatever it costs, so that each mark has to be right.
        mark_pods(world.cluster, live if decision.reason == "Paused" else mend, busy)
    return now_seen, decision


def mark_pods(cluster: Cluster, pods: Iterable[Pod], busy: set[str]) -> list[Pod]:
    """Give pods the deletion cost they should have, where they have another. The pods after
    that, without those that somebody deleted meanwhile."""
    costs = [(pod, wanted_cost(pod, busy)) for pod in pods]
    return [
        replace(pod, deletion_cost=cost)
        for pod, cost in costs
        if pod.deletion_cost == cost or cluster.mark(pod, cost)
    ]


def annotations_to_write(
    deployment: Deployment, seen: Observed, decision: Decision
) -> dict[str, str | None]:
    """The annotations that have to change for a decision to be on record."""
    wanted = dict(decision.annotations)
    if decision.replicas != seen.replicas:
        verb = "up" if decision.replicas > seen.replicas else "down"
        wanted[LAST_SCALE_TIME] = write_time(seen.now)
        wanted[LAST_SCALE] = f"{verb} {seen.replicas}->{decision.replicas}"
    return {
        name: value for name, value in wanted.items() if deployment.annotations.get(name) != value
    }


def apply(world: World, deployment: Deployment, sent: Sent, unsettled: list[Sent]) -> Outcome:
    """The one place that changes the Deployment. `resourceVersion` as read makes the API server
    refuse the patch if anybody else wrote in between."""
    body: dict[str, Any] = {"metadata": {"resourceVersion": deployment.resource_version}}
    if sent.annotations:
        body["metadata"]["annotations"] = sent.annotations
    if sent.scales:
        body["spec"] = {"replicas": sent.decision.replicas}
    if world.settings.dry_run or not (sent.annotations or sent.scales):
        return sent.outcome(deployment.replicas, world.settings.dry_run)
    world.progress.in_doubt = True
    try:
        after = world.cluster.patch_deployment(body)
    except ClusterFailure as failure:
        world.progress.in_doubt = isinstance(failure, Interfered) and failure.may_have_landed
        if world.progress.in_doubt and sent.scales:
            unsettled.append(sent)
        raise
    return finish(world, after, sent)


def finish(world: World, deployment: Deployment, sent: Sent) -> Outcome:
    """What remains once the patch is known to have landed: the Event, as the HPA writes one."""
    outcome = sent.outcome(deployment.replicas)
    if sent.scales:
        world.progress.outcome = outcome
        try:
            world.cluster.post_event(event(world, deployment, sent))
        except ClusterFailure as failure:
            LOG.warning("no Event was written: %s", failure)
    return outcome


def event(world: World, deployment: Deployment, sent: Sent) -> dict[str, Any]:
    name, namespace = world.settings.deployment, world.cluster.namespace
    when = write_time(sent.seen.now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name[:200]}.{os.urandom(8).hex()}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": name,
            "namespace": namespace,
            "uid": deployment.uid,
        },
        "type": "Normal",
        "reason": "SuccessfulRescale",
        "message": scrub(f"New size: {sent.decision.replicas}; {sent.decision.message}")[:1024],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": FIELD_MANAGER,
        "firstTimestamp": when,
        "lastTimestamp": when,
        "count": 1,
    }


# ---------------------------------------------------------------------------- report and main

WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
RECORD_BYTES = 4095
DEFAULT_TERMINATION_LOG = "/dev/termination-log"


SECRETS = re.compile(
    r"(?is)\bbearer\s+[^\s\"',;]+|-----BEGIN.*?(?:-----END[^-]*-----|\Z)|\beyJ[\w-]+\.[\w.-]+"
)


def scrub(text: str) -> str:
    """Without tokens and keys, which errors of libraries and answers of proxies may quote."""
    return SECRETS.sub("[removed]", text)


class LineFormatter(logging.Formatter):
    """One line an entry: for people, or as a JSON object in the terms of Cloud Logging."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = write_time(datetime.fromtimestamp(record.created, UTC))
        message = scrub(f"AutoScaler {record.getMessage()}")
        if not self._as_json:
            return f"{when} {record.levelname} {message}"
        extra: Mapping[str, Any] = getattr(record, "record", {})
        entry = {"time": when, **extra, "severity": record.levelname, "message": message}
        return json.dumps(entry, ensure_ascii=False)


def set_up_logging(environ: Mapping[str, str]) -> None:
    """A level or format that is not accepted is reported with the other settings, by a logger
    that has the defaults."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter(environ.get("LOG_FORMAT", "").strip().lower() == "json"))
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    # Else Python prints what libraries log: a login helper's output, for one.
    logging.getLogger().addHandler(logging.NullHandler())
    level = environ.get("LOG_LEVEL", "").strip().upper()
    LOG.setLevel(level if level in ("DEBUG", "WARNING", "ERROR") else "INFO")


@dataclass(frozen=True)
class Reporter:
    """Writes how a run ended, once, whichever thread gets there first."""

    environ: Mapping[str, str]
    now: Callable[[], datetime]
    progress: Progress
    dry_run: bool
    taken: threading.Lock = field(default_factory=threading.Lock)

    def end(self, outcome: Outcome) -> int:
        """Log the line, write the result record, and give the exit code."""
        if not self.taken.acquire(blocking=False):
            time.sleep(2)
            return outcome.exit_code
        record = self.record(outcome)
        for warning in outcome.warnings:
            LOG.warning("%s", warning)
        level = {0: logging.INFO, 1: logging.WARNING}.get(outcome.exit_code, logging.ERROR)
        target = "/".join(filter(None, (record["namespace"], record["deployment"])))
        line = f"{target} {outcome.reason}: {outcome.message}".strip()
        LOG.log(level, "%s", line, extra={"record": record})
        self.write_termination_log(record)
        return outcome.exit_code

    def record(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "time": write_time(self.now()),
            "namespace": self.progress.namespace or self.name("NAMESPACE"),
            "deployment": self.name("DEPLOYMENT"),
            "waiting": outcome.waiting,
            "waitingCapped": outcome.waiting_capped,
            "busy": outcome.busy,
            "current": outcome.current,
            "desired": outcome.desired,
            "replicas": outcome.replicas,
            "action": outcome.action,
            "reason": outcome.reason,
            "message": scrub(outcome.message),
            "dryRun": self.dry_run,
            "durationSeconds": round(time.monotonic() - self.progress.started, 3),
        }

    def name(self, variable: str) -> str | None:
        """A name as it was set, right or wrong, in a form that fits into a line."""
        value = self.environ.get(variable)
        if value is None:
            return None
        return scrub(" ".join(value[:253].encode(errors="replace").decode().split()))

    def write_termination_log(self, record: dict[str, Any]) -> None:
        path = Path(self.environ.get("TERMINATION_LOG") or DEFAULT_TERMINATION_LOG)
        if str(path) == DEFAULT_TERMINATION_LOG and not path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_record(record))
        except OSError as error:
            LOG.warning("the result record was not written: %s", error)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """JSON of less than the 4,096 bytes that the kubelet keeps; the message gives way."""
    message = str(record["message"])
    while True:
        data = json.dumps({**record, "message": message}, ensure_ascii=False).encode(
            errors="replace"
        )
        if len(data) <= RECORD_BYTES or not message:
            return data
        message = message[: len(message) * 3 // 4]


def watch(reporter: Reporter, settings: Settings) -> None:
    """End the run on SIGTERM, on SIGINT, and when its time is up, whatever the main thread is
    waiting for: no timeout of a client covers an answer that drips in, or a name server."""
    signum = signal.sigwait(WATCHED)
    progress = reporter.progress
    out_of_time = signum == signal.SIGALRM
    why = (
        f"out of time (TIMEOUT_SECONDS={settings.timeout_seconds})"
        if out_of_time
        else f"ended by {signal.Signals(signum).name}"
    )
    reason = f"{why} while {progress.stage}"
    outcome = progress.outcome or broken_off(progress, progress.stage_reason, reason, 1)
    exit_code = outcome.exit_code if out_of_time else 128 + signum
    leave(reporter.end(replace(outcome, exit_code=exit_code)))


def broken_off(progress: Progress, reason: Reason, why: str, exit_code: int) -> Outcome:
    """The outcome of a run that ends without a decision, or before it was carried out."""
    replicas = progress.replicas
    if progress.in_doubt:
        why += "; whether the patch arrived is not known, the next run will see"
        return Outcome(reason, why, exit_code, current=replicas)
    if replicas is not None:
        why += f"; {scaled(replicas, replicas)}"
    return Outcome(reason, why, exit_code, current=replicas, replicas=replicas)


def main(argv: Sequence[str], environ: Mapping[str, str], clock: Callable[[], datetime]) -> int:
    """One run. Returns the exit code."""
    # A run is over before a garbage collection could free anything worth its time.
    gc.disable()
    if "--help" in argv or "-h" in argv:
        print(USAGE.format(settings=settings_table()))
        return 0
    if "--version" in argv:
        print(f"queue-scaler {__version__}")
        return 0
    environ = {**environ, "DRY_RUN": "true"} if "--dry-run" in argv else environ
    set_up_logging(environ)
    dry_run = environ.get("DRY_RUN", "").strip().lower() == "true"
    progress, begun = Progress(time.monotonic()), clock()

    def now() -> datetime:
        """The beginning of the run plus whole seconds since: most runs have one time only, and
        do not miss the end of a cooldown by how long an import takes."""
        return begun + timedelta(seconds=max(0, int((clock() - begun).total_seconds())))

    reporter = Reporter(environ, now, progress, dry_run)
    unknown = [argument for argument in argv if argument != "--dry-run"]
    try:
        if unknown:
            problem = (
                f"unknown argument {quoted(unknown[0])}: expected --dry-run, --help, --version"
            )
            raise Failure("InvalidSettings", problem, exit_code=2)
        outcome = supervised(read_settings(environ), environ, reporter)
    except Failure as failure:
        outcome = broken_off(progress, failure.reason, str(failure), failure.exit_code)
    except Exception as error:
        LOG.error("%s", traceback.format_exc())
        why = f"internal error while {progress.stage}: {type(error).__name__}: {brief(error)}"
        outcome = progress.outcome or broken_off(progress, progress.stage_reason, why, 1)
        outcome = replace(outcome, exit_code=1)
    return reporter.end(outcome)


def supervised(settings: Settings, environ: Mapping[str, str], reporter: Reporter) -> Outcome:
    """A run under the eyes of the watchdog, which has the signals to itself."""
    progress = reporter.progress
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout_seconds)
    threading.Thread(target=watch, args=(reporter, settings), daemon=True).start()
    # The clients give up a little before the watchdog would, as they can say more.
    total = settings.timeout_seconds
    budget = Budget(progress.started + total - min(1.0, total / 10), min(10.0, total / 3))
    # The waiting jobs are counted while the Kubernetes client loads, which takes as long; imports
    # would let another thread have its turn only every 5 ms. What fails here fails again, and is
    # reported, if the queue is asked for.
    sys.setswitchinterval(0.0005)
    queue = cache(lambda: open_queue(settings, budget, progress))
    with suppress(QueueFailure):
        queue().begin()
    cluster = open_cluster(settings, environ, budget, progress)
    return run(World(settings, cluster, queue, reporter.now, progress))


def leave(exit_code: int) -> NoReturn:
    """Exit without tearing down the interpreter and gRPC, which is a fifth of a run's CPU; all
    that has to be written has been."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def utc_now() -> datetime:
    return datetime.now(UTC)


USAGE = """\
usage: scaler.py [--dry-run] [--help] [--version]

Sets the replicas of one Kubernetes Deployment by the length of a Firestore job queue, once.

Environment variables, with their defaults:
{settings}

FIRESTORE_EMULATOR_HOST and GOOGLE_APPLICATION_CREDENTIALS work as in every Google client. Inside a
cluster the service account is used, outside one KUBECONFIG or ~/.kube/config.

Annotations on the Deployment that a person sets:
  queue-scaler/paused=true              decide nothing, change nothing
  queue-scaler/paused-replicas=N        hold exactly N pods
  queue-scaler/paused-scale-in=true     never scale down
  queue-scaler/paused-scale-out=true    never scale up

Exit codes: 0, the run did its work; 1, the queue or the cluster did not answer, nothing was shrunk
and the next run tries again; 2, a person has to change something first.
"""

if __name__ == "__main__":
    leave(main(sys.argv[1:], os.environ, utc_now))

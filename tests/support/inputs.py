"""What a decision rests on, made up in one line, for the tests of the pure rules."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import scaler
from scaler import ANNOTATION, Inputs, QueueLength, Removable, State
from tests.support.world import START

SETTINGS = scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"})
CALM = replace(SETTINGS, scale_down_stabilization_seconds=0)  # no windows


def remembered(annotations: dict[str, str]) -> State:
    """What the scaler reads from annotations, named without their prefix and with underscores."""
    full = {ANNOTATION + name.replace("_", "-"): value for name, value in annotations.items()}
    return scaler.parse_state(full, SETTINGS, START)


def observed(
    replicas: int,
    waiting: int = 0,
    busy: int | None = None,
    removable: int | None = None,
    because: str = "",
    own_zero: bool = False,
    reach: int | None = None,
    **annotations: str,
) -> Inputs:
    """At START: so many replicas, jobs and annotations, and how many of the pods can go."""
    can = None if removable is None else Removable(removable, because)
    state, queue = remembered(annotations), QueueLength(waiting, busy=busy)
    order = None if reach is None else Removable(reach, ", as far as there was time")
    return Inputs(START, replicas, state, queue, can, own_zero, order)


def ago(seconds: float, direction: str = "up") -> dict[str, Any]:
    """A rescale so long ago."""
    when = scaler.write_time(START - timedelta(seconds=seconds))
    return {"last_scale_time": when, "last_scale": f"{direction} 1->2"}


def failing(seconds: float) -> dict[str, Any]:
    """A queue that has been unreadable for so long."""
    return {"queue_failing_since": scaler.write_time(START - timedelta(seconds=seconds))}


def history(*entries: tuple[int, int]) -> str:
    """Recommendations: how many seconds ago, and how many pods."""
    return " ".join(f"{int(START.timestamp()) - age}:{pods}" for age, pods in entries)

"""How a run of scaler.py is made and taken: all that the machine of every order of events knows of
its interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import scaler
from tests.support.inprocess import Exchange, firestore_client, kubernetes_client
from tests.support.world import BUSY, PROJECT, START


@dataclass
class Time:
    """The wall clock and the monotonic one of everything in the machine. `observe`: what the
    Deployment controller does while a run waits for it."""

    passed: float = 0.0
    observe: Callable[[], None] = lambda: None

    def clock(self) -> datetime:
        return START + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return 1000 + self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += max(0.0, seconds)

    def wait_for_controller(self, seconds: float) -> None:
        self.sleep(seconds)
        self.observe()


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    reason: str
    message: str
    replicas: int | None


SETTINGS = {
    "QUEUE_COLLECTION": "jobs",
    "FIRESTORE_PROJECT": PROJECT,
    "BUSY_FILTER": BUSY,
    "MIN_REPLICAS": "1",
    "MAX_REPLICAS": "6",
    "SCALE_UP_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}


class Looker:
    """Takes one run after another, each over the connections of whoever takes it."""

    def __init__(self, exchange: Exchange) -> None:
        self._kubernetes = kubernetes_client(exchange)
        self._firestore = firestore_client(PROJECT, exchange)

    def take(self, deployment: str, time: Time, more: Mapping[str, str]) -> Outcome:
        """One run of the real script from its settings on, with `more` settings."""
        environ = {**SETTINGS, "DEPLOYMENT": deployment, "TERMINATION_LOG": "/dev/null", **more}
        settings = scaler.read_settings(environ)
        opening: Future[Any] = Future()
        opening.set_result(self._firestore)
        firestore = scaler.Firestore(settings, environ)
        firestore._opening = opening
        log = scaler.Log(scaler.read_output(environ), time.clock, "default", deployment)
        progress = scaler.Progress(scaler.Deadline(math.inf, 0, math.inf))
        report = scaler.Report(log, time.monotonic(), progress)
        api = scaler.Api(self._kubernetes, "default", deployment)
        scaler.poll(settings, api, firestore, report, time.sleep)
        assert report.last, "a run has a look"
        last = report.last
        return Outcome(last.exit_code, last.reason, last.message, last.replicas)


@contextmanager
def simulated(time: Time) -> Iterator[None]:
    """Everything in scaler.py and in its retries goes by this time; what it does several at a time
    is done one after another, so that each call is a step of its own; nothing is printed."""

    def in_turn(action: Callable[[Any], Any], items: Any) -> list[Any]:
        return [action(item) for item in items]

    clock = SimpleNamespace(monotonic=time.monotonic, time=time.monotonic, sleep=time.sleep)
    with ExitStack() as stack:
        for target, value in (
            ("scaler.time", clock),
            ("scaler.concurrently", in_turn),
            ("scaler.sleep", time.wait_for_controller),
            ("scaler.print", lambda *_, **__: None),
            ("tenacity.time", clock),
            ("tenacity.nap.time", clock),
            ("tenacity.wait.random", SimpleNamespace(uniform=lambda low, high: high)),
        ):
            stack.enter_context(mock.patch(target, value, create=target == "scaler.print"))
        yield

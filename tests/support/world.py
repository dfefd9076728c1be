"""A Deployment, a queue, and `scaler.py` run between them.

By default a run is `scaler.execute` in the test's own process, with the same clients over HTTP and
gRPC, which takes milliseconds; with `process` it is a process, as the CronJob would start it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import scaler
from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes

REPOSITORY = Path(__file__).parent.parent.parent
PROJECT = "demo-queue-scaler"
BUSY = '[["status", "==", "processing"]]'
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Run:
    """What one run of the scaler left: `record` is its termination message."""

    exit_code: int
    stdout: str
    stderr: str
    record: dict[str, Any]
    seconds: float

    @property
    def reason(self) -> str:
        return str(self.record.get("reason"))

    def __str__(self) -> str:
        return f"exit code {self.exit_code}\n{self.stdout}{self.stderr}"


@dataclass
class World:
    """One cluster and one queue. `firestore` is another host and port to find the queue at: a
    proxy's, or the emulator's.

    `now` is the scaler's clock, moved by `pass_time`; None leaves the real one.
    """

    cluster: FakeKubernetes
    queue: FakeFirestore
    name: str = "worker"
    now: datetime | None = None
    settings: dict[str, str] = field(default_factory=dict)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))
    process: bool = False
    firestore: str = ""

    def environment(self, **settings: str) -> dict[str, str]:
        """What the container's environment would be, and nothing of this process's own."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "KUBECONFIG": str(self.cluster.write_kubeconfig(self.directory / "kubeconfig")),
            "FIRESTORE_EMULATOR_HOST": self.firestore or self.queue.host,
            "FIRESTORE_PROJECT": PROJECT,
            "DEPLOYMENT": self.name,
            "QUEUE_COLLECTION": "jobs",
            **self.settings,
            **settings,
        }

    def command(self, *arguments: str) -> list[str]:
        if self.now is None:
            return [sys.executable, str(REPOSITORY / "scaler.py"), *arguments]
        return [sys.executable, "-m", "tests.support.clock", self.now.isoformat(), *arguments]

    def start(
        self, *arguments: str, log: Path, environ: Mapping[str, str] | None = None, **settings: str
    ) -> subprocess.Popen[str]:
        """A run that the caller waits for, its result record going to `log`."""
        environ = self.environment(**settings) if environ is None else environ
        return subprocess.Popen(
            self.command(*arguments),
            env={**environ, "TERMINATION_LOG": str(log)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **settings: str) -> Run:
        """One run, to its end; `settings` are more variables for this run only."""
        return self.run_with(self.environment(**settings), *arguments)

    def run_with(self, environ: Mapping[str, str], *arguments: str) -> Run:
        """One run with exactly this environment."""
        log = self.directory / "termination-log"
        log.unlink(missing_ok=True)
        begun = time.monotonic()
        if self.process:
            process = self.start(*arguments, log=log, environ=environ)
            stdout, stderr = process.communicate(timeout=120)
            exit_code = process.returncode
        else:
            stdout, stderr, exit_code = self._execute(arguments, environ, log)
        seconds = time.monotonic() - begun
        record = json.loads(log.read_text()) if log.exists() else {}
        return Run(exit_code, stdout, stderr, record, seconds)

    def _execute(
        self, arguments: Sequence[str], environ: Mapping[str, str], log: Path
    ) -> tuple[str, str, int]:
        """Standard output and error, and the exit code. Google's client reads this process's own
        environment, which is the run's for its time."""
        environ = {**environ, "TERMINATION_LOG": str(log)}

        def clock() -> datetime:
            return self.now or datetime.now(UTC)

        pause = self.pass_time if self.now else time.sleep

        out, err = io.StringIO(), io.StringIO()
        own = mock.patch.dict(os.environ, environ, clear=True)
        with own, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_code = scaler.execute(arguments, environ, clock, pause)
        return out.getvalue(), err.getvalue(), exit_code

    def pass_time(self, seconds: float = 60) -> None:
        assert self.now, "the clock of this world is the real one"
        self.now += timedelta(seconds=seconds)

    @property
    def replicas(self) -> int | None:
        return self.cluster.replicas(self.name)

    @property
    def annotations(self) -> dict[str, str]:
        """The scaler's own annotations, without their prefix."""
        return {
            name.removeprefix("queue-scaler/"): value
            for name, value in self.cluster.annotations(self.name).items()
            if name.startswith("queue-scaler/")
        }

    @property
    def resource_version(self) -> str:
        return str(self.cluster.deployment(self.name)["metadata"]["resourceVersion"])

"""What only a process has: signals, exit codes, files to write to, a login that hangs."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes.client import ApiClient

from scaler import ANNOTATION
from tests.support.kubernetes import Match, hang
from tests.support.world import REPOSITORY, World

pytestmark = pytest.mark.slow

READ = Match("get", "deployments")


@pytest.fixture
def process(world: World) -> World:
    world.process, world.now = True, None
    return world


@pytest.fixture
def unwritable() -> Iterator[int]:
    found = os.open("/dev/full", os.O_WRONLY)
    yield found
    os.close(found)


def start(world: World, stdout: int | None, **settings: str) -> subprocess.Popen[bytes]:
    environ = world.environment(TERMINATION_LOG=str(world.directory / "log"), **settings)
    return subprocess.Popen(world.command(), env=environ, stdout=stdout, stderr=subprocess.PIPE)


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("kind", ["full", "closed pipe"])
def test_a_line_that_cannot_be_written_is_lost(kind: str, process: World, unwritable: int) -> None:
    stdout = unwritable if kind == "full" else closed_pipe()
    process.queue.fill(2)
    assert start(process, stdout).wait(30) == 0
    assert process.replicas == 2
    assert start(process, stdout, MAX_REPLICAS="none").wait(30) == 2


def test_sigterm_ends_a_run_that_cannot_write_its_line(process: World, unwritable: int) -> None:
    arrived = threading.Event()
    process.cluster.hook(READ, lambda _: arrived.set())
    process.cluster.fault(READ, hang(), times=None)
    run = start(process, unwritable)
    assert arrived.wait(30)
    begun = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(10) == 128 + signal.SIGTERM and time.monotonic() - begun < 6


def test_a_signal_before_the_imports_is_not_lost(process: World) -> None:
    """It comes with the first import of the script, as from a kubelet in a hurry."""
    (process.directory / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Early:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'logging':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Early())\n"
    )
    run = process.run(PYTHONPATH=str(process.directory))
    assert run.exit_code == 128 + signal.SIGTERM, run
    assert "ended by SIGTERM" in run.record["message"] and process.replicas == 1, run


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A metadata server that accepts and never responds."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_override_waits_for_no_metadata_server(process: World, silent_server: str) -> None:
    environ = process.environment(GCE_METADATA_HOST=silent_server, TIMEOUT_SECONDS="10")
    del environ["FIRESTORE_EMULATOR_HOST"]
    process.cluster.annotate("worker", **{ANNOTATION + "paused-replicas": "2"})
    run = process.run_with(environ)
    assert (run.exit_code, run.reason, process.replicas) == (0, "Paused", 2), run
    assert run.seconds < 6, run
    process.cluster.annotate("worker", **{ANNOTATION + "paused-replicas": None})
    run = process.run_with(environ)
    assert run.exit_code in (1, 2) and process.replicas == 2 and run.seconds < 11, run
    assert run.record["current"] == 2, "the Deployment came first"


def test_a_path_that_was_set_is_created(world: World, tmp_path: Path) -> None:
    log = tmp_path / "not" / "there" / "yet"
    world.start(log=log, MIN_REPLICAS="none").communicate()
    assert json.loads(log.read_text())["reason"] == "InvalidSettings"


def test_the_default_is_written_only_where_it_exists(world: World) -> None:
    default = Path("/dev/termination-log")
    existed = default.exists()
    assert world.start(log=default, MIN_REPLICAS="none").wait() == 2
    assert default.exists() is existed


def test_a_record_that_cannot_be_written_is_a_warning(world: World) -> None:
    process = world.start(log=world.directory)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert "WARNING AutoScaler default/worker: the result record was not written" in stdout


def test_help_into_a_full_disk_is_no_crash(process: World, unwritable: int) -> None:
    run = subprocess.run(
        [*process.command(), "--help"], env=process.environment(), stdout=unwritable, check=False
    )
    assert run.returncode == 0


def test_the_clients_inner_functions_are_still_those_that_the_script_calls() -> None:
    """The script spares the generated models by two functions that the client does not promise."""
    serialize = inspect.signature(ApiClient.param_serialize).parameters
    needed = {"method", "resource_path", "query_params", "header_params", "body", "auth_settings"}
    word = "kubernetes changed: see Cluster._request, and the lower bound in requirements.in"
    assert needed <= serialize.keys(), word
    assert "_request_timeout" in inspect.signature(ApiClient.call_api).parameters, word
    assert "kubernetes>=" in (REPOSITORY / "requirements.in").read_text()

"""Fixtures: the two fakes, the official emulator, and the worlds made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tenacity
from google.cloud.firestore import Client
from hypothesis import settings

import scaler
from tests.support.emulator import EmulatedQueue, Emulator, emulator_or_reason
from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes
from tests.support.needs import lacking
from tests.support.situations import every_run
from tests.support.world import PROJECT, START, Run, World

Queue = FakeFirestore | EmulatedQueue

# A busy machine is no reason for a property to fail.
settings.register_profile("unhurried", settings.default, deadline=None)
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the emulator is slow: it starts a Java process."""
    for item in items:
        if "emulator" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    """A Kubernetes API with a Deployment "worker" of one pod."""
    with FakeKubernetes(seed=1) as cluster:
        cluster.add_deployment("worker", replicas=1)
        yield cluster


@pytest.fixture
def queue() -> Iterator[FakeFirestore]:
    with FakeFirestore(project=PROJECT) as queue:
        yield queue


@pytest.fixture
def world(cluster: FakeKubernetes, queue: FakeFirestore, tmp_path: Path) -> World:
    """The two fakes, and a clock that stands still until a test moves it."""
    return World(cluster, queue, now=START, directory=tmp_path)


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again, for tests of what a failure says."""

    def once(self: scaler.Deadline, flag: str, reserve: bool = False) -> tenacity.Retrying:
        return tenacity.Retrying(stop=tenacity.stop_after_attempt(1), reraise=True)

    monkeypatch.setattr(scaler.Deadline, "retrying", once)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A run in each situation that the pages describe, with JSON lines."""
    return every_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def emulator() -> Emulator:
    """The official Firestore emulator, empty. Without one the test is skipped, but in CI fails."""
    found = emulator_or_reason()
    if isinstance(found, str):
        lacking(found)
    found.clear(PROJECT)
    return found


@pytest.fixture
def emulated(world: World, emulator: Emulator) -> World:
    """The same world with the official emulator as its queue."""
    world.firestore = emulator.host
    return world


@pytest.fixture
def jobs(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The official client, on the emulator."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", emulator.host)
    return Client(project=PROJECT)


@pytest.fixture(params=["fake", pytest.param("emulator", marks=pytest.mark.slow)])
def any_queue(request: pytest.FixtureRequest) -> Queue:
    """Once the fake, once the official emulator, both empty."""
    if request.param == "fake":
        fake: FakeFirestore = request.getfixturevalue("queue")
        return fake
    client: Client = request.getfixturevalue("jobs")
    return EmulatedQueue(request.getfixturevalue("emulator").host, client)

"""How long things take, seen from outside of a run: `python -m tools.waits WHAT NUMBER ...`

reaction INTERVAL BURSTS  a run that looks every INTERVAL seconds, and a job that comes at any
                          moment of it, BURSTS times: the longest time from a job to the patch
gap INTERVAL TIMEOUT      two polling runs, one minute apart, each with TIMEOUT_SECONDS: the longest
                          time between two looks, whichever run takes them
cooldowns NUMBER          so many scale-ups in a row at the default cooldown of two minutes, with
                          runs that start 0 to 9 s after the minute: how many took a third run

Prints the figure, in seconds. All servers are fakes, and no pod has to start.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.world import PROJECT, START, World


@contextmanager
def world(**settings: str) -> Iterator[World]:
    """A Deployment of one pod, and a job for it."""
    with (
        FakeKubernetes(seed=1) as cluster,
        FakeFirestore(project=PROJECT) as queue,
        tempfile.TemporaryDirectory() as name,
    ):
        cluster.add_deployment("worker", replicas=1)
        queue.fill(1)
        yield World(cluster, queue, settings=settings, directory=Path(name))


def reaction(interval: int, bursts: int) -> float:
    chance, worst = random.Random(1), 0.0
    settings = {
        "POLLING_INTERVAL_SECONDS": str(interval),
        "TIMEOUT_SECONDS": "600",
        "SCALE_UP_COOLDOWN_SECONDS": "0",
        "MAX_REPLICAS": str(bursts + 1),
    }
    with world(**settings) as here:
        run = here.start(log=here.directory / "log")
        while not here.cluster.requests:
            time.sleep(0.01)
        for burst in range(bursts):
            time.sleep(chance.uniform(0, interval))
            here.queue.put(f"jobs/burst-{burst}", {"status": "waiting"})
            committed = time.monotonic()
            while len(here.cluster.scales) <= burst:
                time.sleep(0.005)
            worst = max(worst, time.monotonic() - committed)
        run.terminate()
        run.communicate()
    return worst


def gap(interval: int, timeout: int) -> float:
    looks: list[float] = []
    settings = {"POLLING_INTERVAL_SECONDS": str(interval), "TIMEOUT_SECONDS": str(timeout)}
    with world(**settings) as here:
        read = Match("get", "deployments")
        here.cluster.hook(read, lambda _: looks.append(time.monotonic()), times=None)
        first = here.start(log=here.directory / "first")
        time.sleep(60)
        second = here.start(log=here.directory / "second")
        first.communicate()
        time.sleep(2 * interval)
        second.send_signal(signal.SIGTERM)
        second.communicate()
    return max(later - earlier for earlier, later in pairwise(looks))


def cooldowns(number: int) -> int:
    chance, most = random.Random(1), number + 1
    with world(SCALE_UP_STEP="1", MAX_REPLICAS=str(most)) as here:
        here.queue.fill(most)
        minutes: list[int] = []
        for minute in range(4 * number):
            here.now = START + timedelta(minutes=minute, seconds=chance.uniform(0, 9))
            here.run()
            minutes += [minute] * (len(here.cluster.scales) - len(minutes))
    assert len(minutes) == number, minutes
    return sum(later - earlier > 2 for earlier, later in pairwise(minutes))


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    measures: dict[str, Callable[..., float]] = {
        "reaction": reaction,
        "gap": gap,
        "cooldowns": cooldowns,
    }
    print(f"{measures[what](*map(int, numbers)):.3f}")

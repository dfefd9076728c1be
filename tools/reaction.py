"""How long a job waits for the patch that answers it: `python -m tools.reaction INTERVAL BURSTS`.

A run that looks every INTERVAL seconds, and a job that comes at any moment of it, BURSTS times.
Prints the longest time, in seconds, from a job's commit to the patch.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes
from tests.support.world import PROJECT, World


def main(interval: str, bursts: int) -> int:
    chance, worst = random.Random(1), 0.0
    settings = {
        "POLLING_INTERVAL_SECONDS": interval,
        "TIMEOUT_SECONDS": "600",
        "SCALE_UP_COOLDOWN_SECONDS": "0",
        "MAX_REPLICAS": str(bursts + 1),
    }
    with (
        FakeKubernetes() as cluster,
        FakeFirestore(project=PROJECT) as queue,
        tempfile.TemporaryDirectory() as name,
    ):
        cluster.add_deployment("worker", replicas=1)
        queue.fill(1)
        world = World(cluster, queue, settings=settings, directory=Path(name))
        run = world.start(log=Path(name) / "log")
        while not cluster.requests:
            time.sleep(0.01)
        for burst in range(bursts):
            time.sleep(chance.uniform(0, float(interval)))
            queue.put(f"jobs/burst-{burst}", {"status": "waiting"})
            committed = time.monotonic()
            while len(cluster.scales) <= burst:
                time.sleep(0.005)
            worst = max(worst, time.monotonic() - committed)
        run.terminate()
        run.communicate()
    print(f"{worst:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

"""Ten pods, five of them busy, scaled to five by real Kubernetes controllers: how many die at work?

    KUBECONFIG=... python -m tests.e2e.busy_experiment [trials]

Each trial makes a Deployment in a namespace of its own, plays scheduler and kubelet (random nodes,
random ages), and runs scaler.py, once busy-aware and once as a plain change of `replicas`. Meant
for a control plane without nodes, whose pods nobody else would start; the queue is a fake.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory
from typing import Any

from kubernetes import config
from kubernetes.client import ApiClient, CoreV1Api, V1Namespace, V1ObjectMeta

from tests.fakes.firestore import FakeFirestore
from tests.world import BUSY, PROJECT, REPOSITORY

PODS, AT_WORK = 10, 5
APPS, CORE = "/apis/apps/v1", "/api/v1"
NODES = ("node-a", "node-b", "node-c", "node-d")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {seconds} s: {what}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Namespace:
    """A namespace of the cluster, spoken to in plain JSON."""

    name: str
    api: ApiClient = field(default_factory=ApiClient)

    def ask(self, method: str, group: str, what: str, body: object = None) -> Any:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = self.api.param_serialize(
            method,
            f"{group}/namespaces/{self.name}{what}",
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self.api.call_api(*request)
        text = response.read()
        if not 200 <= response.status < 300:
            raise RuntimeError(f"{method} {what}: {response.status}: {text.decode()}")
        return json.loads(text)

    def create(self, deployment: str) -> None:
        labels = {"app": deployment}
        spec = {
            "replicas": PODS,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "main", "image": "worker:1"}]},
            },
        }
        self.ask("POST", APPS, "/deployments", {"metadata": {"name": deployment}, "spec": spec})
        wait_until(lambda: len(self.live(deployment)) == PODS, "all pods are made")

    def live(self, deployment: str) -> list[str]:
        """The names of the pods that are not terminating."""
        found = self.ask("GET", CORE, f"/pods?labelSelector=app%3D{deployment}")["items"]
        metadata = [pod["metadata"] for pod in found]
        return sorted(meta["name"] for meta in metadata if "deletionTimestamp" not in meta)

    def start(self, deployment: str, pods: list[str], chance: random.Random) -> None:
        """Bind the pods to nodes and make them ready, since when is left to chance."""
        for pod in pods:
            node = {"kind": "Node", "name": chance.choice(NODES)}
            binding = {"metadata": {"name": pod}, "target": node}
            self.ask("POST", CORE, f"/pods/{pod}/binding", binding)
            status = running(datetime.now(UTC) - timedelta(minutes=chance.randrange(2000)))
            self.ask("PATCH", CORE, f"/pods/{pod}/status", {"status": status})

        def ready() -> bool:
            found = self.ask("GET", APPS, f"/deployments/{deployment}")
            return bool(found["status"].get("readyReplicas") == PODS)

        wait_until(ready, "all pods are ready")

    def delete(self, deployment: str) -> None:
        self.ask("DELETE", APPS, f"/deployments/{deployment}")
        self.ask("DELETE", CORE, "/pods", {"gracePeriodSeconds": 0})


def running(since: datetime) -> dict[str, Any]:
    """What a kubelet writes into the status of a pod that is ready since then."""
    moment = since.strftime("%Y-%m-%dT%H:%M:%SZ")
    container = {"name": "main", "ready": True, "restartCount": 0, "image": "", "imageID": ""}
    return {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": moment}],
        "containerStatuses": [container],
    }


@contextmanager
def namespace() -> Iterator[Namespace]:
    found = Namespace(f"busy-experiment-{secrets.token_hex(3)}")
    CoreV1Api().create_namespace(V1Namespace(metadata=V1ObjectMeta(name=found.name)))
    try:
        yield found
    finally:
        CoreV1Api().delete_namespace(found.name)


def trial(space: Namespace, queue: FakeFirestore, seed: int, marking: bool) -> int:
    """How many of the busy pods were killed. The patterns depend on nothing but the seed."""
    chance = random.Random(seed)
    deployment = f"worker-{seed}-{'marked' if marking else 'plain'}"
    space.create(deployment)
    pods = space.live(deployment)
    space.start(deployment, pods, chance)
    busy = chance.sample(pods, AT_WORK)
    queue.clear()
    for pod in busy:
        queue.put(f"jobs/{pod}", {"status": "processing", "assignedPodId": pod})
    scale(space.name, deployment, queue.host, marking)
    wait_until(lambda: len(space.live(deployment)) == AT_WORK, "five pods are left")
    killed = set(busy) - set(space.live(deployment))
    space.delete(deployment)
    return len(killed)


def scale(namespace: str, deployment: str, firestore: str, marking: bool) -> None:
    """Run the scaler to five pods; a plain one counts the jobs at work as jobs waiting."""
    with TemporaryDirectory() as directory:
        environment: dict[str, Any] = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "KUBECONFIG": os.environ.get("KUBECONFIG", ""),
            "FIRESTORE_EMULATOR_HOST": firestore,
            "FIRESTORE_PROJECT": PROJECT,
            "NAMESPACE": namespace,
            "DEPLOYMENT": deployment,
            "QUEUE_COLLECTION": "jobs",
            "MAX_REPLICAS": str(PODS),
            "SCALE_DOWN_STABILIZATION_SECONDS": "0",
            "TERMINATION_LOG": str(Path(directory) / "log"),
            **({"BUSY_FILTER": BUSY} if marking else {"WAITING_FILTER": BUSY}),
        }
        command = [sys.executable, str(REPOSITORY / "scaler.py")]
        done = run(command, env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode or "ScaledDown" not in done.stdout:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")


def main(trials: int) -> int:
    config.load_kube_config()
    killed = {True: 0, False: 0}
    with namespace() as space, FakeFirestore(project=PROJECT) as queue:
        for seed in range(trials):
            for marking in killed:
                killed[marking] += trial(space, queue, seed, marking)
    for marking, number in killed.items():
        word = "with" if marking else "without"
        print(f"{word} marking: {number} of {trials * AT_WORK} busy pods killed")
    return 1 if killed[True] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12))

"""The manifests at work on a real cluster, checked with kubectl alone: see README.md here.

python -m tests.e2e [--image IMAGE] [--emulator HOST:PORT] [--documents HOST:PORT]
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.e2e.forbidden import check_rights
from tests.e2e.kubectl import (
    REPOSITORY,
    Checks,
    KubectlError,
    eventually,
    guardrails,
    kubectl,
    read,
    scratch_namespaces,
)

NAME = "eventstorming-generator"
PROJECT = "demo-queue-scaler-e2e"
EMULATOR = Path(__file__).parent / "firestore-emulator.yaml"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
WAIT_FOR_EVER = "import signal; signal.sigwait([signal.SIGTERM])"
SEND = """\
import sys, urllib.request
method, url, body = sys.argv[1:]
headers = {"Authorization": "Bearer owner", "Content-Type": "application/json"}
data = body.encode() or None
urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20)
"""


def idle_pod(image: str) -> dict[str, Any]:
    """A pod that does nothing, of the one image that the cluster is known to have."""
    container = {
        "name": "main",
        "image": image,
        "command": ["python", "-c", WAIT_FOR_EVER],
        "securityContext": RESTRICTED,
    }
    return {"containers": [container], "terminationGracePeriodSeconds": 1}


@dataclass(frozen=True)
class Queue:
    """The emulator's documents, written through its REST API: from here, where `local` names an
    address of it, else from a pod inside the cluster."""

    namespace: str
    emulator: str
    local: str | None

    def put(self, job: str, **fields: str) -> None:
        values = {name: {"stringValue": value} for name, value in fields.items()}
        path = f"v1/projects/{PROJECT}/databases/(default)/documents/jobs/{job}"
        self._send("PATCH", path, json.dumps({"fields": values}))

    def clear(self) -> None:
        self._send("DELETE", f"emulator/v1/projects/{PROJECT}/databases/(default)/documents", "")

    def _send(self, method: str, path: str, body: str) -> None:
        url = f"http://{self.local or self.emulator}/{path}"
        if self.local is None:
            within = ("exec", "-n", self.namespace, "writer", "--", "python", "-c", SEND)
            kubectl(*within, method, url, body)
            return
        headers = {"Authorization": "Bearer owner", "Content-Type": "application/json"}
        request = urllib.request.Request(url, body.encode() or None, headers, method=method)
        urllib.request.urlopen(request, timeout=20).close()


@dataclass
class Site:
    """One installation of the manifests, in a namespace of its own."""

    namespace: str
    queue: Queue
    runs: list[dict[str, Any]] = field(default_factory=list)

    def kubectl(self, *arguments: str) -> str:
        return kubectl("-n", self.namespace, *arguments)

    def read(self, *arguments: str) -> Any:
        return read("-n", self.namespace, *arguments)

    def run(self) -> dict[str, Any]:
        """One run by hand, to its end. Its result record, from the pod's termination message."""
        job = f"manual-{secrets.token_hex(3)}"
        self.kubectl("create", "job", "--from=cronjob/queue-scaler", job)
        record = eventually(lambda: self.result(job), 90, f"the end of job {job}")
        self.runs.append(record)
        return record

    def result(self, job: str) -> dict[str, Any] | None:
        for pod in self.read("pods", "-l", f"batch.kubernetes.io/job-name={job}")["items"]:
            for status in pod["status"].get("containerStatuses") or []:
                ended = (status.get("state") or {}).get("terminated")
                if ended:
                    return dict(json.loads(ended.get("message") or "{}"))
        return None

    def expect(self, *reasons: str) -> dict[str, Any]:
        record = self.run()
        assert record.get("reason") in reasons, f"expected {' or '.join(reasons)}, got {record}"
        return record

    def deployment(self) -> Any:
        return self.read("deployment", NAME)

    def replicas(self) -> int:
        return int(self.deployment()["spec"]["replicas"])

    def annotate(self, word: str) -> None:
        """queue-scaler/WORD, such as `paused=true`, or `paused-` to remove it."""
        self.kubectl("annotate", "--overwrite", "deployment", NAME, f"queue-scaler/{word}")

    def worker_pods(self) -> list[str]:
        """The Deployment's live pods, the newest last."""
        options = ("-l", f"app={NAME}", "--sort-by=.metadata.creationTimestamp")
        found = self.read("pods", *options)["items"]
        live = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        return [str(pod["metadata"]["name"]) for pod in live]


def overlay(namespace: str, image: str, emulator: str) -> str:
    """The manifests as kustomize makes them for this namespace, image and queue."""
    name, tag, digest = split_image(image)
    # The windows are off, so that nobody has to wait; the cooldowns are what is checked.
    more = {
        "FIRESTORE_EMULATOR_HOST": emulator,
        "FIRESTORE_PROJECT": PROJECT,
        "SCALE_DOWN_STABILIZATION_SECONDS": "0",
    }
    env = "/spec/jobTemplate/spec/template/spec/containers/0/env/-"
    patch = [
        {"op": "add", "path": env, "value": {"name": variable, "value": value}}
        for variable, value in more.items()
    ]
    chosen = {"name": "queue-scaler", "newName": name, "newTag": tag, "digest": digest}
    kustomization = {
        "resources": ["../base"],
        "namespace": namespace,
        "images": [{key: value for key, value in chosen.items() if value}],
        "patches": [{"target": {"kind": "CronJob"}, "patch": json.dumps(patch)}],
    }
    with tempfile.TemporaryDirectory() as directory:
        base, over = Path(directory, "base"), Path(directory, "overlay")
        base.mkdir()
        over.mkdir()
        for manifest in ("kustomization.yaml", "cronjob.yaml", "rbac.yaml"):
            shutil.copy(REPOSITORY / manifest, base)
        (over / "kustomization.yaml").write_text(json.dumps(kustomization))
        return kubectl("kustomize", str(over))


def split_image(image: str) -> tuple[str, str, str]:
    """Name, tag and digest, the latter two empty where there is none."""
    name, _, digest = image.partition("@")
    host, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return host + slash + last, tag, digest


@contextmanager
def site(image: str, emulator: str | None, documents: str | None) -> Iterator[Site]:
    """The manifests installed, with a Deployment of one pod to scale and an empty queue."""
    with scratch_namespaces("", "-queue") as (namespace, beside), guardrails():
        # The strictest standard, where the scaler is: its pods have to be admitted.
        level = "pod-security.kubernetes.io/enforce=restricted"
        kubectl("label", "namespace", namespace, level)
        if emulator is None:
            kubectl("-n", beside, "apply", "-f", str(EMULATOR))
            kubectl("-n", beside, "rollout", "status", "deployment/firestore", "--timeout=180s")
            emulator = f"firestore.{beside}.svc:8080"
        labels = {"app": NAME}
        worker = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME, "namespace": namespace},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": idle_pod(image)},
            },
        }
        writer = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "writer", "namespace": namespace},
            "spec": idle_pod(image),
        }
        both = {"apiVersion": "v1", "kind": "List", "items": [worker, writer]}
        kubectl("apply", "-f", "-", stdin=json.dumps(worker if documents else both))
        here = Site(namespace, Queue(namespace, emulator, documents))
        here.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=180s")
        if not documents:
            here.kubectl("wait", "--for=condition=Ready", "pod/writer", "--timeout=180s")
        here.queue.clear()
        kubectl("apply", "-f", "-", stdin=overlay(namespace, image, emulator))
        try:
            yield here
        finally:
            here.queue.clear()


def check_site(checks: Checks, here: Site) -> None:
    """In this order, as one thing leads to the next."""
    steps = [
        ("a run comes by the schedule, on a namespace of the restricted standard", scheduled),
        ("a run by hand: kubectl create job --from=cronjob/queue-scaler", by_hand),
        ("logs: kubectl logs -l app=queue-scaler | grep AutoScaler", logs),
        ("scale-up: 5 waiting jobs make 3 pods", scale_up),
        ("event: kubectl describe deployment shows it", event),
        ("a second run writes nothing", nothing_to_do),
        ("cooldown: the empty queue changes nothing yet", cooldown),
        ("pause: queue-scaler/paused=true", pause),
        ("resume: queue-scaler/paused-", resume),
        ("cooldown reset by annotation: a scale-down, and the busy pod stays", scale_down),
        ("history: the README's table", history),
        ("guardrails: kubectl set image --as the scaler is refused", refusal),
    ]
    for name, step in steps:
        checks.that(name, partial(step, here))


def scheduled(here: Site) -> str:
    def ended() -> str:
        """What a run says that nobody started by hand: none has been yet."""
        jobs = [job["metadata"]["name"] for job in here.read("jobs")["items"]]
        return str(next((r["message"] for r in map(here.result, jobs) if r), ""))

    try:
        return eventually(ended, 150, "a run by the schedule")
    finally:
        # From here on runs come by hand, so that each check knows which run it looks at.
        here.kubectl("patch", "cronjob", "queue-scaler", "-p", '{"spec": {"suspend": true}}')


def by_hand(here: Site) -> str:
    return str(here.expect("AtTarget")["message"])


def logs(here: Site) -> str:
    lines = here.kubectl("logs", "-l", "app=queue-scaler").splitlines()
    found = [line for line in lines if "AutoScaler" in line]
    assert found, f"no line with AutoScaler in {lines}"
    return found[-1]


def scale_up(here: Site) -> str:
    for number in range(5):
        here.queue.put(f"waiting-{number}", status="waiting")
    record = here.expect("ScaledUp")
    assert here.replicas() == 3, f"{here.replicas()} replicas"
    return str(record["message"])


def event(here: Site) -> str:
    told = here.kubectl("describe", "deployment", NAME)
    found = re.search(r"SuccessfulRescale.*New size: 3.*", told)
    assert found, told
    return " ".join(found[0].split())


def nothing_to_do(here: Site) -> str:
    before = here.deployment()
    record = here.expect("AtTarget")
    after = here.deployment()
    assert before["metadata"]["generation"] == after["metadata"]["generation"]
    assert before["metadata"]["annotations"] == after["metadata"]["annotations"]
    return str(record["message"])


def cooldown(here: Site) -> str:
    here.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=120s")
    here.queue.clear()
    # The newest is the one that a scale-down would take first.
    here.queue.put("busy", status="processing", assignedPodId=here.worker_pods()[-1])
    return str(here.expect("ScaleDownCooldown")["message"])


def pause(here: Site) -> str:
    here.annotate("paused=true")
    return str(here.expect("Paused")["message"])


def resume(here: Site) -> str:
    here.annotate("paused-")
    return str(here.expect("ScaleDownCooldown")["message"])


def scale_down(here: Site) -> str:
    busy = here.worker_pods()[-1]
    here.annotate("last-scale-time-")
    record = here.expect("ScaledDown")
    eventually(lambda: len(here.worker_pods()) == 1, 60, "one pod")
    assert here.worker_pods() == [busy], f"{busy} was busy, {here.worker_pods()} is left"
    return str(record["message"])


def history(here: Site) -> str:
    page = (REPOSITORY / "docs/operations.md").read_text()
    command = re.search(r"kubectl (get pods -l app=queue-scaler.*)-o jsonpath='(.*?)'", page)
    assert command, "docs/operations.md has no such command"
    rows = here.kubectl(*command[1].split(), "-o", f"jsonpath={command[2]}").splitlines()
    told = [run["message"] for run in here.runs]
    missing = [message for message in told if not any(message in row for row in rows)]
    assert not missing, f"{missing} not in {rows}"
    return f"{len(rows)} runs"


def refusal(here: Site) -> str:
    account = f"--as=system:serviceaccount:{here.namespace}:queue-scaler"
    try:
        here.kubectl("set", "image", "deployment", NAME, "*=example.com/evil", account)
    except KubectlError as error:
        assert "ValidatingAdmissionPolicy" in str(error), error
        return str(error).rsplit("denied request: ", 1)[-1]
    raise AssertionError("it was allowed")


OPTIONS = {
    "--image": "the scaler's image, as the cluster can have it; without one only the account's "
    "rights are checked, which needs no pods",
    "--emulator": "HOST:PORT of a Firestore emulator as seen from the cluster; without one it is "
    "installed there",
    "--documents": "HOST:PORT of the same emulator as seen from here; without one a pod writes "
    "the documents",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e")
    for option, meaning in OPTIONS.items():
        parser.add_argument(option, help=meaning)
    options = parser.parse_args()
    checks = Checks()
    check_rights(checks)
    if options.image is None:
        print("note  no --image: the checks that need pods are left out")
        return checks.end()
    with site(options.image, options.emulator, options.documents) as here:
        check_site(checks, here)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

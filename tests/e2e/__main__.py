"""The manifests at work on a real cluster, checked with kubectl alone: see README.md here.

python -m tests.e2e [--image IMAGE] [--emulator HOST:PORT] [--documents HOST:PORT]
python -m tests.e2e --guardrails-only
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.forbidden import NAME, check_guardrails, check_rights
from tests.e2e.kubectl import (
    GUARDRAILS,
    REPOSITORY,
    Checks,
    eventually,
    kubectl,
    live_pods,
    read,
    scratch,
)

PROJECT = "demo-queue-scaler-e2e"
DOCUMENTS = f"projects/{PROJECT}/databases/(default)/documents"
PLAYGROUND = REPOSITORY / "examples/playground"
# Both ends of a Job, in kubectl 1.28 and later: it has no condition before.
ENDED = "--for=jsonpath={.status.conditions}"
RESTRICTED = {
    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True,
    "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
WAIT_FOR_EVER = "import signal; signal.sigwait([signal.SIGTERM])"
SEND = """\
import sys, urllib.request
method, url, body = sys.argv[1:]
headers = {"Authorization": "Bearer owner", "Content-Type": "application/json"}
data = body.encode() or None
urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20)
"""


@dataclass
class Site:
    """One installation of the manifests, in a namespace of its own, and its queue: an emulator's
    documents, written through its REST API by the Python here, or in one of the pods."""

    namespace: str
    beside: str  # a second namespace, without a standard
    image: str
    emulator: str  # HOST:PORT for pods
    documents: str  # HOST:PORT for `python`
    python: list[str]
    records: list[dict[str, Any]] = field(default_factory=list)

    def put(self, job: str, **fields: str) -> None:
        values = {name: {"stringValue": value} for name, value in fields.items()}
        self._send("PATCH", f"v1/{DOCUMENTS}/jobs/{job}", json.dumps({"fields": values}))

    def clear(self) -> None:
        self._send("DELETE", f"emulator/v1/{DOCUMENTS}", "")

    def _send(self, method: str, path: str, body: str) -> None:
        call = [*self.python, "-c", SEND, method, f"http://{self.documents}/{path}", body]
        subprocess.run(call, check=True, timeout=180)

    def kubectl(self, *arguments: str) -> str:
        return kubectl("-n", self.namespace, *arguments)

    def read(self, *arguments: str) -> Any:
        return read("-n", self.namespace, *arguments)

    def result(self, selector: str) -> dict[str, Any]:
        """The result record of the selected pod, from its termination message. None yet: empty."""
        message = "{.items[*].status.containerStatuses[*].state.terminated.message}"
        found = self.kubectl("get", "pods", "-l", selector, "-o", f"jsonpath={message}")
        return dict(json.loads(found or "{}"))

    def expect(self, reason: str) -> str:
        """A manual run, to its end. The message of its result record."""
        job = f"manual-{secrets.token_hex(3)}"
        self.kubectl("create", "job", "--from=cronjob/queue-scaler", job)
        self.kubectl("wait", f"job/{job}", ENDED, "--timeout=90s")
        record = self.result(f"batch.kubernetes.io/job-name={job}")
        self.records.append(record)
        assert record["reason"] == reason, f"expected {reason}, got {record}"
        return str(record["message"])


Patches = list[dict[str, Any]]


def kustomize(base: Path, namespace: str, patches: Patches) -> str:
    with tempfile.TemporaryDirectory() as directory:
        kustomization = {
            "resources": [os.path.relpath(base, os.path.realpath(directory))],
            "namespace": namespace,
            "patches": patches,
        }
        Path(directory, "kustomization.yaml").write_text(json.dumps(kustomization))
        return kubectl("kustomize", directory)


def use_image(kind: str, pod: str, image: str) -> dict[str, Any]:
    """A patch. `pod` is the path of the pod's spec."""
    operation = {"op": "replace", "path": f"{pod}/containers/0/image", "value": image}
    return {"target": {"kind": kind, "name": f"{NAME}|jobs|queue-scaler"},
            "patch": json.dumps([operation])}  # fmt: skip


CRONJOBS_POD, POD = "/spec/jobTemplate/spec/template/spec", "/spec/template/spec"


def scaler(namespace: str, image: str, emulator: str) -> str:
    """The base, for this namespace, image and queue."""
    # The windows are off, so that nobody has to wait; the cooldowns are what is checked.
    more = {
        "FIRESTORE_EMULATOR_HOST": emulator,
        "FIRESTORE_PROJECT": PROJECT,
        "SCALE_DOWN_STABILIZATION_SECONDS": "0",
    }
    variables = [
        {
            "op": "add",
            "path": f"{CRONJOBS_POD}/containers/0/env/-",
            "value": {"name": n, "value": v},
        }
        for n, v in more.items()
    ]
    patches: Patches = [{"target": {"kind": "CronJob"}, "patch": json.dumps(variables)}]
    return kustomize(REPOSITORY, namespace, [*patches, use_image("CronJob", CRONJOBS_POD, image)])


def playground(namespace: str, image: str, emulator: str) -> str:
    """examples/playground, for this namespace and image, but with an emulator that is there."""
    queue = {"FIRESTORE_EMULATOR_HOST": emulator, "FIRESTORE_PROJECT": PROJECT}
    changes = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "queue"}, "data": queue},
        {"apiVersion": "apps/v1", "kind": "Deployment", **removed("firestore")},
        {"apiVersion": "v1", "kind": "Service", **removed("firestore")},
        {"apiVersion": "v1", "kind": "Namespace", **removed("queue-scaler-playground")},
    ]
    patches: Patches = [{"patch": json.dumps(each)} for each in changes]
    images = [use_image(kind, POD, image) for kind in ("Deployment", "Job")]
    images.append(use_image("CronJob", CRONJOBS_POD, image))
    return kustomize(PLAYGROUND, namespace, [*patches, *images])


def removed(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "$patch": "delete"}


def worker(image: str) -> dict[str, Any]:
    """The Deployment to scale: of the one image that the cluster is known to have, whose pods do
    nothing by themselves."""
    command = ["python", "-c", WAIT_FOR_EVER]
    container = {"name": "main", "image": image, "command": command, "securityContext": RESTRICTED}
    pod = {"containers": [container], "terminationGracePeriodSeconds": 1}
    labels = {"app": NAME}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME}, "spec": spec}


@contextmanager
def site(image: str, emulator: str | None, documents: str | None) -> Iterator[Site]:
    """The manifests installed, with a Deployment of one pod to scale and an empty queue."""
    with scratch() as (namespace, beside):
        # The strictest standard, where the scaler is: its pods have to be admitted.
        kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        if emulator is None:
            kubectl("-n", beside, "apply", "-f", str(PLAYGROUND / "firestore.yaml"))
            kubectl("-n", beside, "rollout", "status", "deployment/firestore", "--timeout=180s")
            emulator = f"firestore.{beside}.svc:8080"
        inside = ["kubectl", "exec", "-n", namespace, f"deployment/{NAME}", "--", "python"]
        python = [sys.executable] if documents else inside
        here = Site(namespace, beside, image, emulator, documents or emulator, python)
        kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(worker(image)))
        here.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=180s")
        here.clear()
        kubectl("apply", "-f", "-", stdin=scaler(namespace, image, emulator))
        try:
            yield here
        finally:
            here.clear()


def tour(checks: Checks, here: Site) -> None:
    """In this order: each check depends on the ones before."""
    with checks.that("a second apply of the same files: unchanged"):
        manifests = scaler(here.namespace, here.image, here.emulator)
        lines = kubectl("apply", "-f", "-", stdin=manifests).splitlines()
        lines += kubectl("apply", "--dry-run=server", "-f", GUARDRAILS).splitlines()
        assert len(lines) == 8 and all(" unchanged" in line for line in lines), lines

    with checks.that("a run by the schedule, in a namespace of the restricted standard") as say:
        record = eventually(lambda: here.result("app=queue-scaler"), 150, "a run by the schedule")
        say(str(record["message"]))
    # From here on runs come by hand, so that each check knows which run it looks at.
    here.kubectl("patch", "cronjob", "queue-scaler", "-p", '{"spec": {"suspend": true}}')

    with checks.that("a run by hand: kubectl create job --from=cronjob/queue-scaler") as say:
        say(here.expect("AtTarget"))

    with checks.that("logs: kubectl logs -l app=queue-scaler | grep AutoScaler") as say:
        lines = here.kubectl("logs", "-l", "app=queue-scaler").splitlines()
        found = [line for line in lines if "AutoScaler" in line]
        assert found, f"no line with AutoScaler in {lines}"
        say(found[-1])

    with checks.that("scale-up: 5 waiting jobs make 3 pods") as say:
        for number in range(5):
            here.put(f"waiting-{number}", status="waiting")
        say(here.expect("ScaledUp"))
        assert here.read("deployment", NAME)["spec"]["replicas"] == 3

    with checks.that("event: kubectl describe deployment shows it") as say:
        told = here.kubectl("describe", "deployment", NAME)
        event = re.search(r"SuccessfulRescale.*New size: 3.*", told)
        assert event, told
        say(" ".join(event[0].split()))

    with checks.that("a second run writes nothing") as say:
        before = here.read("deployment", NAME)["metadata"]
        say(here.expect("AtTarget"))
        after = here.read("deployment", NAME)["metadata"]
        for unchanged in ("generation", "annotations"):
            assert before[unchanged] == after[unchanged], f"{before} became {after}"

    with checks.that("cooldown: the empty queue changes nothing yet") as say:
        here.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=120s")
        here.clear()
        # The newest is the one that a scale-down would take first.
        here.put("busy", status="processing", assignedPodId=live_pods(here.namespace, NAME)[-1])
        say(here.expect("ScaleDownCooldown"))

    for word, reason in (("paused=true", "Paused"), ("paused-", "ScaleDownCooldown")):
        with checks.that(f"pause and resume: queue-scaler/{word}") as say:
            here.kubectl("annotate", "deployment", NAME, f"queue-scaler/{word}")
            say(here.expect(reason))

    with checks.that("cooldown reset by annotation: a scale-down, and the busy pod stays") as say:
        busy = live_pods(here.namespace, NAME)[-1]
        here.kubectl("annotate", "deployment", NAME, "queue-scaler/last-scale-time-")
        say(here.expect("ScaledDown"))
        eventually(lambda: len(live_pods(here.namespace, NAME)) == 1, 60, "one pod")
        left = live_pods(here.namespace, NAME)
        assert left == [busy], f"{busy} was busy, {left} is left"

    with checks.that("polling: one run looks every 2 seconds for 9") as say:
        often = ("POLLING_INTERVAL_SECONDS=2", "TIMEOUT_SECONDS=9")
        here.kubectl("set", "env", "cronjob/queue-scaler", *often)
        here.expect("AtTarget")
        looks = here.records[-1]["looks"]
        assert 3 <= looks <= 5, f"{looks} looks"
        say(f"{looks} looks")

    with checks.that("a run that fails at once: kubectl wait does not sit out its timeout") as say:
        here.kubectl("set", "env", "cronjob/queue-scaler", "JOBS_PER_POD=0")
        began = time.monotonic()
        message = here.expect("InvalidSettings")
        elapsed = time.monotonic() - began
        assert elapsed < 45, f"{elapsed:.0f} s"
        say(f"{elapsed:.0f} s: {message}")

    with checks.that("history: the table of docs/operations.md") as say:
        page = (REPOSITORY / "docs/operations.md").read_text()
        command = re.search(r"kubectl (get pods -l app=queue-scaler.*)-o jsonpath='(.*?)'", page)
        assert command, "docs/operations.md has no such command"
        rows = here.kubectl(*command[1].split(), "-o", f"jsonpath={command[2]}").splitlines()
        messages = [record["message"] for record in here.records]
        missing = [message for message in messages if not any(message in row for row in rows)]
        assert not missing, f"{missing} not in {rows}"
        say(f"{len(rows)} runs")


def play(checks: Checks, here: Site) -> None:
    def replicas() -> int:
        return int(read("deployment", NAME, "-n", here.beside)["spec"]["replicas"])

    def seconds_until(pods: int) -> float:
        eventually(lambda: replicas() == pods, 150, f"{pods} pods")
        return time.monotonic() - began

    with checks.that("examples/playground: the pods follow a burst of jobs, up and down") as say:
        here.clear()
        manifests = playground(here.beside, here.image, here.emulator)
        kubectl("apply", "-f", "-", stdin=manifests)
        began = time.monotonic()
        say(f"5 pods after {seconds_until(5):.0f} s, 1 pod after {seconds_until(1):.0f} s")
        lines = kubectl("apply", "-f", "-", stdin=manifests).splitlines()
        assert all(line.endswith(" unchanged") for line in lines), lines
        kubectl("delete", "-f", "-", stdin=manifests)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e", description="see README.md here")
    for option in ("--image", "--emulator", "--documents"):
        parser.add_argument(option)
    parser.add_argument("--guardrails-only", action="store_true")
    options = vars(parser.parse_args())
    checks = Checks()
    if options.pop("guardrails_only"):
        if check_guardrails(checks):
            check_rights(checks)
        return checks.end()
    check_rights(checks)
    if options["image"]:
        with site(**options) as here:
            tour(checks, here)
            play(checks, here)
    else:
        print("note  no --image: the checks that need pods are left out")
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

"""The manifests at work on a real cluster, checked with kubectl alone: see README.md here.

python -m tests.e2e [--image IMAGE] [--emulator HOST:PORT] [--documents HOST:PORT]
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
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


def idle_pod(image: str) -> dict[str, Any]:
    """A pod that does nothing, of the one image that the cluster is known to have."""
    command = ["python", "-c", WAIT_FOR_EVER]
    container = {"name": "main", "image": image, "command": command, "securityContext": RESTRICTED}
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
        call = ["-c", SEND, method, f"http://{self.local or self.emulator}/{path}", body]
        if self.local:
            subprocess.run([sys.executable, *call], check=True)
        else:
            kubectl("exec", "-n", self.namespace, "writer", "--", "python", *call)


@dataclass
class Site:
    """One installation of the manifests, in a namespace of its own."""

    namespace: str
    queue: Queue
    records: list[dict[str, Any]] = field(default_factory=list)

    def kubectl(self, *arguments: str) -> str:
        return kubectl("-n", self.namespace, *arguments)

    def read(self, *arguments: str) -> Any:
        return read("-n", self.namespace, *arguments)

    def result(self, job: str) -> dict[str, Any] | None:
        """A run's result record, from its pod's termination message."""
        for pod in self.read("pods", "-l", f"batch.kubernetes.io/job-name={job}")["items"]:
            for status in pod["status"].get("containerStatuses") or []:
                ended = (status.get("state") or {}).get("terminated")
                if ended:
                    return dict(json.loads(ended.get("message") or "{}"))
        return None

    def expect(self, reason: str) -> str:
        """One run by hand, to its end. The message of its result record."""
        job = f"manual-{secrets.token_hex(3)}"
        self.kubectl("create", "job", "--from=cronjob/queue-scaler", job)
        record = eventually(lambda: self.result(job), 90, f"the end of job {job}")
        self.records.append(record)
        assert record["reason"] == reason, f"expected {reason}, got {record}"
        return str(record["message"])

    def deployment(self) -> Any:
        return self.read("deployment", NAME)

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
    # The windows are off, so that nobody has to wait; the cooldowns are what is checked.
    more = {
        "FIRESTORE_EMULATOR_HOST": emulator,
        "FIRESTORE_PROJECT": PROJECT,
        "SCALE_DOWN_STABILIZATION_SECONDS": "0",
    }
    container = "/spec/jobTemplate/spec/template/spec/containers/0"
    patch: list[Any] = [{"op": "replace", "path": f"{container}/image", "value": image}]
    patch += [
        {"op": "add", "path": f"{container}/env/-", "value": {"name": name, "value": value}}
        for name, value in more.items()
    ]
    kustomization = {
        "resources": ["../base"],
        "namespace": namespace,
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
        labels, idle = {"app": NAME}, idle_pod(image)
        template = {"metadata": {"labels": labels}, "spec": idle}
        selected = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
        worker = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME},
                  "spec": selected}  # fmt: skip
        writer = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "writer"}, "spec": idle}
        items = [worker] if documents else [worker, writer]
        both = {"apiVersion": "v1", "kind": "List", "items": items}
        kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(both))
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


def scheduled(here: Site) -> str:
    """a run comes by the schedule, on a namespace of the restricted standard"""

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
    """a run by hand: kubectl create job --from=cronjob/queue-scaler"""
    return here.expect("AtTarget")


def logs(here: Site) -> str:
    """logs: kubectl logs -l app=queue-scaler | grep AutoScaler"""
    lines = here.kubectl("logs", "-l", "app=queue-scaler").splitlines()
    found = [line for line in lines if "AutoScaler" in line]
    assert found, f"no line with AutoScaler in {lines}"
    return found[-1]


def scale_up(here: Site) -> str:
    """scale-up: 5 waiting jobs make 3 pods"""
    for number in range(5):
        here.queue.put(f"waiting-{number}", status="waiting")
    message = here.expect("ScaledUp")
    assert here.deployment()["spec"]["replicas"] == 3, message
    return message


def event(here: Site) -> str:
    """event: kubectl describe deployment shows it"""
    told = here.kubectl("describe", "deployment", NAME)
    found = re.search(r"SuccessfulRescale.*New size: 3.*", told)
    assert found, told
    return " ".join(found[0].split())


def nothing_to_do(here: Site) -> str:
    """a second run writes nothing"""
    before = here.deployment()["metadata"]
    message = here.expect("AtTarget")
    after = here.deployment()["metadata"]
    for unchanged in ("generation", "annotations"):
        assert before[unchanged] == after[unchanged]
    return message


def cooldown(here: Site) -> str:
    """cooldown: the empty queue changes nothing yet"""
    here.kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=120s")
    here.queue.clear()
    # The newest is the one that a scale-down would take first.
    here.queue.put("busy", status="processing", assignedPodId=here.worker_pods()[-1])
    return here.expect("ScaleDownCooldown")


def pause(here: Site) -> str:
    """pause: queue-scaler/paused=true"""
    here.annotate("paused=true")
    return here.expect("Paused")


def resume(here: Site) -> str:
    """resume: queue-scaler/paused-"""
    here.annotate("paused-")
    return here.expect("ScaleDownCooldown")


def scale_down(here: Site) -> str:
    """cooldown reset by annotation: a scale-down, and the busy pod stays"""
    busy = here.worker_pods()[-1]
    here.annotate("last-scale-time-")
    message = here.expect("ScaledDown")
    eventually(lambda: len(here.worker_pods()) == 1, 60, "one pod")
    assert here.worker_pods() == [busy], f"{busy} was busy, {here.worker_pods()} is left"
    return message


def history(here: Site) -> str:
    """history: the table of docs/operations.md"""
    page = (REPOSITORY / "docs/operations.md").read_text()
    command = re.search(r"kubectl (get pods -l app=queue-scaler.*)-o jsonpath='(.*?)'", page)
    assert command, "docs/operations.md has no such command"
    rows = here.kubectl(*command[1].split(), "-o", f"jsonpath={command[2]}").splitlines()
    told = [record["message"] for record in here.records]
    missing = [message for message in told if not any(message in row for row in rows)]
    assert not missing, f"{missing} not in {rows}"
    return f"{len(rows)} runs"


def polling(here: Site) -> str:
    """polling: one run looks every 2 seconds for 9"""
    often = ("POLLING_INTERVAL_SECONDS=2", "TIMEOUT_SECONDS=9")
    here.kubectl("set", "env", "cronjob/queue-scaler", *often)
    here.expect("AtTarget")
    looks = here.records[-1]["looks"]
    assert 3 <= looks <= 5, f"{looks} looks"
    return f"{looks} looks"


def refusal(here: Site) -> str:
    """guardrails: kubectl set image --as the scaler is refused"""
    account = f"--as=system:serviceaccount:{here.namespace}:queue-scaler"
    try:
        here.kubectl("set", "image", "deployment", NAME, "*=example.com/evil", account)
    except KubectlError as error:
        assert "ValidatingAdmissionPolicy" in str(error), error
        return str(error).rsplit("denied request: ", 1)[-1]
    raise AssertionError("it was allowed")


# In this order, as one thing leads to the next.
STEPS = [scheduled, by_hand, logs, scale_up, event, nothing_to_do, cooldown, pause, resume,
         scale_down, polling, history, refusal]  # fmt: skip


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
        for step in STEPS:
            checks.that(str(step.__doc__), partial(step, here))
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

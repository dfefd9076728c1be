"""A worker for queue-scaler to scale: copy it, and put your own work into `work`.

A job's document names the pod that works on it, which is how a scale-down knows to leave it alone.
"""

import logging
import os
import random
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from google.cloud import firestore
from google.cloud.firestore import FieldFilter

# A pod's host name is its own name; with hostNetwork it is the node's: set POD_NAME there.
POD = os.environ.get("POD_NAME") or os.environ["HOSTNAME"]

# A pod that is killed past its grace period, or whose node is lost, cannot give its job back: the
# document says "processing" for ever, and nobody waits for it. So a claim is a lease, which any
# other worker takes back when it has run out. Let it be longer than the longest job takes.
LEASE = timedelta(seconds=int(os.environ.get("LEASE_SECONDS", "7200")))


def work(job: dict[str, Any]) -> None:
    time.sleep(job.get("seconds", 30))


def attempt(job: dict[str, Any]) -> str:
    """Work, and tell how it went: a job left as processing would keep its pod for ever."""
    try:
        work(job)
        return "done"
    except Exception:
        logging.exception("failed: %s", job)
        return "failed"


@firestore.transactional
def claim(transaction: firestore.Transaction, job: firestore.DocumentReference) -> bool:
    """Of two workers that want the same job Firestore lets one commit; the other looks again."""
    if job.get(["status"], transaction=transaction).to_dict() != {"status": "waiting"}:
        return False
    lease = {"leaseUntil": datetime.now(UTC) + LEASE}
    transaction.update(job, {"status": "processing", "assignedPodId": POD, **lease})
    return True


@firestore.transactional
def give_back(transaction: firestore.Transaction, job: firestore.DocumentReference) -> None:
    """Of several workers that see a lease run out, or with its owner finishing, one commits."""
    lease = (job.get(["leaseUntil"], transaction=transaction).to_dict() or {}).get("leaseUntil")
    if lease and lease < datetime.now(UTC):
        transaction.update(job, {"status": "waiting", "leaseUntil": None})


def main() -> None:
    told_to_stop: list[int] = []
    # Kubernetes waits for terminationGracePeriodSeconds: let it be longer than the longest job.
    signal.signal(signal.SIGTERM, lambda number, _: told_to_stop.append(number))
    client = firestore.Client(os.environ.get("FIRESTORE_PROJECT"))
    jobs = client.collection("jobs")
    waiting = jobs.where(filter=FieldFilter("status", "==", "waiting")).limit(10)
    mine = jobs.where(filter=FieldFilter("assignedPodId", "==", POD))

    # A container that died starts again in the same pod, and no longer knows what it held.
    for held in mine.where(filter=FieldFilter("status", "==", "processing")).stream():
        held.reference.update({"status": "waiting", "leaseUntil": None})

    while not told_to_stop:
        overdue = jobs.where(filter=FieldFilter("leaseUntil", "<", datetime.now(UTC))).limit(10)
        for lost in overdue.stream():
            give_back(client.transaction(), lost.reference)
        found = list(waiting.stream())
        job = random.choice(found) if found else None  # the first would be everybody's choice
        if job is None:
            time.sleep(1)
        elif not told_to_stop and claim(client.transaction(), job.reference):
            job.reference.update({"status": attempt(job.to_dict() or {}), "leaseUntil": None})


if __name__ == "__main__":
    main()

"""A worker for queue-scaler to scale: copy it, and put your own work into `work`.

A job's document names the pod that works on it, which is how a scale-down knows to leave it alone.
"""

import logging
import os
import random
import signal
import time
from typing import Any

from google.cloud import firestore
from google.cloud.firestore import FieldFilter

# A pod's host name is its own name; with hostNetwork it is the node's: set POD_NAME there.
POD = os.environ.get("POD_NAME") or os.environ["HOSTNAME"]


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
    transaction.update(job, {"status": "processing", "assignedPodId": POD})
    return True


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
        held.reference.update({"status": "waiting"})

    while not told_to_stop:
        found = list(waiting.stream())
        job = random.choice(found) if found else None  # the first would be everybody's choice
        if job is None:
            time.sleep(1)
        elif not told_to_stop and claim(client.transaction(), job.reference):
            job.reference.update({"status": attempt(job.to_dict() or {})})


if __name__ == "__main__":
    main()

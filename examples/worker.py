"""A worker for queue-scaler to scale, by the protocol in docs/busy-workers.md.
Copy it, and put your own work into `work`. Its only package is google-cloud-firestore."""

import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from threading import Event, Thread
from typing import Any

Job = dict[str, Any]
holding = stopping = False


def on_sigterm(*_: object) -> None:
    global stopping
    stopping = True
    if not holding:
        os._exit(0)


# Before the slow imports: a container's process 1 ignores SIGTERM until it has a handler.
signal.signal(signal.SIGTERM, on_sigterm)

from google.api_core.exceptions import FailedPrecondition, GoogleAPIError  # noqa: E402
from google.cloud.firestore import And, Client, DocumentReference, FieldFilter  # noqa: E402


def work(job: Job) -> None:
    """Your work. A job can come twice; one that raises an exception comes MAX_ATTEMPTS times."""
    time.sleep(job.get("seconds", 30))


POD = os.environ.get("POD_NAME") or sys.exit("POD_NAME is not set: see examples/worker.yaml")
LEASE = timedelta(seconds=float(os.environ.get("LEASE_SECONDS", "300")))
MAX_ATTEMPTS = int(os.environ.get("MAX_ATTEMPTS", "3"))
MAX_PAUSE_SECONDS = float(os.environ.get("MAX_PAUSE_SECONDS", "30"))


# The four transactions: the fields to write to a job as it is now, or None to leave it alone.
def claim(job: Job) -> Job | None:
    now, status, until = datetime.now(UTC), job.get("status"), job.get("leaseUntil")
    lost = status == "processing" and isinstance(until, datetime) and until < now
    attempts = job["attempts"] if isinstance(job.get("attempts"), int) else 0
    if stopping or not (status == "waiting" or lost or is_own(job)):
        return None
    if attempts >= MAX_ATTEMPTS:
        return {"status": "failed", "leaseUntil": None}
    lease = {"assignedPodId": POD, "leaseUntil": now + LEASE}
    return {"status": "processing", "attempts": attempts + 1, **lease}


def renew(job: Job) -> Job | None:
    return {"leaseUntil": datetime.now(UTC) + LEASE} if is_own(job) else None


def finish(job: Job) -> Job | None:
    return {"status": "done", "leaseUntil": None} if is_own(job) else None


def give_back(job: Job) -> Job | None:
    status = "waiting" if job.get("attempts", 0) < MAX_ATTEMPTS else "failed"
    return {"status": status, "leaseUntil": None} if is_own(job) else None


def is_own(job: Job) -> bool:
    return (job.get("status"), job.get("assignedPodId")) == ("processing", POD)


def change(client: Client, job: DocumentReference, step: Callable[[Job], Job | None]) -> Job:
    """The job after one of the four, {} if it was left alone. No lock makes other workers wait."""
    written: Job | None = None
    while True:
        fields = (read := job.get()).to_dict() or {}
        if written and written.items() <= fields.items():  # it was written: the response was lost
            return fields
        if (written := step(fields)) is None:
            return {}
        with suppress(FailedPrecondition):  # changed since it was read: read again
            job.update(written, client.write_option(last_update_time=read.update_time))
            return {**fields, **written}


def keep_lease(client: Client, job: DocumentReference, ended: Event) -> None:
    while not ended.wait(LEASE.total_seconds() / 3):
        try:
            if not change(client, job, renew):
                return logging.warning("%s: lease lost, another worker may have it", job.path)
        except GoogleAPIError as error:
            logging.warning("%s: lease not renewed: %s", job.path, error)


def take(client: Client, job: DocumentReference) -> bool:
    """Claim a job and see it through; False if another worker was faster."""
    began, step, failure, ended = time.monotonic(), finish, None, Event()
    fields = change(client, job, claim)
    if fields.get("status") == "processing":
        renewal = Thread(target=keep_lease, args=(client, job, ended), daemon=True)
        renewal.start()
        try:
            work(fields)
        except Exception as error:
            step, failure = give_back, error
        ended.set()
        renewal.join()
    while fields.get("status") == "processing":
        try:
            fields = change(client, job, step) or {"status": "lost, not written"}
        except GoogleAPIError as error:
            logging.warning("%s: its end is not written yet: %s", job.path, error)
            time.sleep(random.uniform(1, 5))
    if fields:
        end = f"{job.path}: {fields['status']} after {time.monotonic() - began:.1f} s"
        logging.log(logging.ERROR if failure else logging.INFO, end, exc_info=failure)
    return bool(fields)


def main() -> None:
    global holding
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    db = Client(os.environ.get("FIRESTORE_PROJECT"), database=os.environ.get("FIRESTORE_DATABASE"))
    jobs = db.collection(os.environ.get("QUEUE_COLLECTION", "jobs"))
    held = And([FieldFilter("status", "==", "processing"), FieldFilter("assignedPodId", "==", POD)])
    pause, lost_due = 0.0, 0.0
    while not stopping:
        time.sleep(pause * random.uniform(0.5, 1))
        filters: list[Any] = [FieldFilter("status", "==", "waiting")]
        if time.monotonic() >= lost_due:
            filters += [held, FieldFilter("leaseUntil", "<", datetime.now(UTC))]
            lost_due = time.monotonic() + LEASE.total_seconds() / 3
        try:
            found = [job for each in filters for job in jobs.where(filter=each).limit(10).stream()]
            random.shuffle(found)  # so that few workers want the same job
            holding = True
            taken = any(take(db, job.reference) for job in found if not stopping)
            pause = 0 if taken else 1 if found else min(2 * pause or 1, MAX_PAUSE_SECONDS)
        except Exception as error:
            logging.warning("%s: %s", type(error).__name__, error)
            pause = MAX_PAUSE_SECONDS
        holding = False


if __name__ == "__main__":
    main()

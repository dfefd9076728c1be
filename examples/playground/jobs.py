"""Sends bursts of jobs, one per minute and a half: short ones, and one that outlasts them."""

import os
import random
import time

from google.cloud import firestore

BURSTS = 4


def main() -> None:
    client = firestore.Client(os.environ["FIRESTORE_PROJECT"])
    jobs = client.collection(os.environ["QUEUE_COLLECTION"])
    for burst in range(BURSTS):
        if burst:
            time.sleep(90)
        durations = [50, *random.choices(range(5, 16), k=random.randint(5, 8))]
        for seconds in durations:
            jobs.add({"status": "waiting", "seconds": seconds})
        print(f"sent {len(durations)} jobs of {min(durations)} to {max(durations)} s", flush=True)


if __name__ == "__main__":
    main()

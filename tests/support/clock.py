"""Runs scaler.py with its clock set: `python -m tests.support.clock TIME [argument ...]`.

The same script, as a process of its own; only the clock that `main` is given stands still at the
time named, and moves on by what a run waits for, so that tests and the demo need not wait.
"""

import os
import sys
from datetime import datetime, timedelta

import scaler


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


if __name__ == "__main__":
    clock = Clock(datetime.fromisoformat(sys.argv[1]))
    scaler.leave(scaler.main(sys.argv[2:], os.environ, clock, clock.pause))

"""Runs scaler.py with its clock set: `python -m tests.support.clock TIME [argument ...]`.

The same script, as a process of its own; only the clock that `main` is given stands still at the
time named, so that tests and the demo need not wait for minutes to pass.
"""

import os
import sys
from datetime import datetime

import scaler

if __name__ == "__main__":
    now = datetime.fromisoformat(sys.argv[1])
    scaler.leave(scaler.main(sys.argv[2:], os.environ, lambda: now))

"""The official Firestore emulator, started for the tests and gone with them.

Looked for, in this order: one that runs already (FIRESTORE_EMULATOR_HOST), a jar
(FIRESTORE_EMULATOR_JAR), the component of an installed Google Cloud CLI.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import urllib3
from google.cloud.firestore import Client

# Read at import: tests set this variable for the clients that they start.
NAMED_HOST = os.environ.get("FIRESTORE_EMULATOR_HOST", "")

# The shell reads a pipe that nobody writes to. It ends with the process that holds the other
# end, however that died, and then the whole group goes; so it does if the emulator itself ends.
UNTIL_PARENT_ENDS = '{ "$@"; kill 0; } & read -r _; kill 0'


@dataclass(frozen=True)
class Emulator:
    host: str

    def ask(self, method: str, path: str) -> int:
        """The status of its answer, or 0 where there is none."""
        with suppress(urllib3.exceptions.HTTPError):
            url = f"http://{self.host}{path}"
            return urllib3.request(method, url, retries=False, timeout=30).status
        return 0

    def clear(self, project: str) -> None:
        """Delete every document of the default database."""
        path = f"/emulator/v1/projects/{project}/databases/(default)/documents"
        status = self.ask("DELETE", path)
        assert status == 200, f"the emulator answered {status} to DELETE {path}"


@functools.cache
def emulator_or_reason() -> Emulator | str:
    """The emulator, shared by the whole process and stopped at its end, or why there is none."""
    if NAMED_HOST:
        named = Emulator(NAMED_HOST)
        reason = f"nothing answers at FIRESTORE_EMULATOR_HOST={NAMED_HOST}"
        return named if named.ask("GET", "/") == 200 else reason
    gcloud, java = shutil.which("gcloud"), shutil.which("java")
    component = "platform/cloud-firestore-emulator/cloud-firestore-emulator.jar"
    beside = Path(gcloud).resolve().parents[1] / component if gcloud else ""
    jar = Path(os.environ.get("FIRESTORE_EMULATOR_JAR") or beside)
    if not jar.is_file():
        return (
            "no Firestore emulator: neither FIRESTORE_EMULATOR_HOST nor FIRESTORE_EMULATOR_JAR "
            "names one; try `gcloud components install cloud-firestore-emulator`"
        )
    if java is None:
        return "the Firestore emulator needs java, which is not on the PATH"
    return start(java, jar)


def start(java: str, jar: Path) -> Emulator | str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    emulator = Emulator(f"127.0.0.1:{port}")
    main = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"
    # Its messages are in English only if it is told so.
    command = [java, "-Duser.language=en", "-cp", str(jar), main]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["sh", "-c", UNTIL_PARENT_ENDS, "sh", *command, "--host=127.0.0.1", f"--port={port}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        atexit.register(stop, process)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if emulator.ask("GET", "/") == 200:
                return emulator
            time.sleep(0.1)
        stop(process)
        log.seek(0)
        return f"the Firestore emulator did not start: {log.read()[-1000:].strip()}"


def stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class EmulatedQueue:
    """The official emulator, filled as the fake is."""

    host: str
    client: Client

    def put(self, path: str, fields: Mapping[str, object]) -> None:
        self.client.document(path).set(dict(fields))

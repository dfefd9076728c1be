"""kubectl as a person types it, and the API server as a given account sees it."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parent.parent.parent
GUARDRAILS = str(REPOSITORY / "guardrails.yaml")
T = TypeVar("T")


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """What kubectl prints. Where it fails, an AssertionError with what it said."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin, capture_output=True, text=True, timeout=180
    )
    assert not done.returncode, done.stderr.strip() or f"kubectl ended with {done.returncode}"
    return done.stdout


def read(*arguments: str) -> Any:
    """`kubectl get ... -o json`, parsed."""
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def live_pods(namespace: str, app: str) -> list[str]:
    """The names of those that are not terminating, the newest last."""
    order = "--sort-by=.metadata.creationTimestamp"
    found = read("pods", "-n", namespace, "-l", f"app={app}", order)["items"]
    return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]


@dataclass(frozen=True)
class Answer:
    status: int
    message: str


def asked(url: str, method: str, path: str, body: Any = None) -> Answer:
    """A PATCH with a list is a JSON patch, else a merge patch."""
    patch = "json-patch+json" if isinstance(body, list) else "merge-patch+json"
    kind = f"application/{patch if method == 'PATCH' else 'json'}"
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Accept": "application/json"}
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return Answer(response.status, "")
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"))


Ask = Callable[..., Answer]  # METHOD, PATH, and a body if there is one


@contextmanager
def account(namespace: str, name: str) -> Iterator[Ask]:
    """Plain HTTP requests in the name of an account, through `kubectl proxy --as`."""
    user = f"system:serviceaccount:{namespace}:{name}"
    command = ["kubectl", "proxy", f"--as={user}", "--port=0", "--reject-paths=^$"]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = proxy.stdout.readline() if proxy.stdout else ""
        serving = re.search(r"127\.0\.0\.1:\d+", line)
        assert serving, f"kubectl proxy did not start: {line}"
        yield partial(asked, f"http://{serving[0]}")
    finally:
        proxy.terminate()
        proxy.wait()


@dataclass
class Checks:
    """One line a check."""

    passed: int = 0
    failed: int = 0

    def note(self, name: str, right: object, seen: object, detail: str = "") -> None:
        """A check, and what was seen instead where it is not right."""
        print(f"ok    {name}{detail}" if right else f"FAIL  {name}: {seen}", flush=True)
        self.passed += bool(right)
        self.failed += not right

    @contextmanager
    def that(self, name: str) -> Iterator[Callable[[str], None]]:
        """A check that an AssertionError or a failed command ends; it may say what it has found."""
        details: list[str] = []
        try:
            yield details.append
        except (AssertionError, subprocess.SubprocessError) as problem:
            self.note(name, False, str(problem) or "not so")
        else:
            self.note(name, True, "", "".join(f"  ({detail})" for detail in details))

    def end(self) -> int:
        print(f"{self.passed} checks passed, {self.failed} failed")
        return 1 if self.failed else 0


def eventually(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """The first answer that is neither None nor empty. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() <= deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)
    return found


@contextmanager
def scratch() -> Iterator[list[str]]:
    """Two namespaces of a made-up name, with guardrails.yaml in force. All goes again but
    guardrails that were there before."""
    name = f"queue-scaler-e2e-{secrets.token_hex(3)}"
    names = [name, f"{name}-other"]
    with ExitStack() as undo:
        undo.callback(kubectl, "delete", "namespace", *names, "--ignore-not-found", "--wait=false")
        for name in names:
            kubectl("create", "namespace", name)
        if kubectl("get", "-f", GUARDRAILS, "--ignore-not-found", "-o", "name"):
            print("note  the cluster has guardrails already: they are tried as they are")
        else:
            undo.callback(kubectl, "delete", "-f", GUARDRAILS, "--ignore-not-found")
            kubectl("apply", "-f", GUARDRAILS)
        yield names

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parent.parent.parent
T = TypeVar("T")


class KubectlError(Exception):
    """kubectl failed; the message is what it said."""


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """What kubectl prints. Raises KubectlError."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin, capture_output=True, text=True, timeout=180
    )
    if done.returncode:
        raise KubectlError(done.stderr.strip() or f"kubectl ended with {done.returncode}")
    return done.stdout


def read(*arguments: str) -> Any:
    """`kubectl get ... -o json`, parsed."""
    return json.loads(kubectl("get", *arguments, "-o", "json"))


@dataclass(frozen=True)
class Answer:
    status: int
    message: str


@dataclass(frozen=True)
class Account:
    """Plain HTTP requests in the name of an account, through `kubectl proxy --as`."""

    url: str

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        kind = "application/json"
        if method == "PATCH":
            kind = f"application/{'json' if isinstance(body, list) else 'merge'}-patch+json"
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": kind, "Accept": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return Answer(response.status, "")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                return Answer(error.code, str(json.loads(text)["message"]))
            except (ValueError, KeyError, TypeError):
                return Answer(error.code, text)


@contextmanager
def account(user: str) -> Iterator[Account]:
    command = ["kubectl", "proxy", f"--as={user}", "--port=0", "--reject-paths=^$"]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout
        line = proxy.stdout.readline()
        serving = re.search(r"127\.0\.0\.1:\d+", line)
        if not serving:
            raise KubectlError(f"kubectl proxy did not start: {line.strip()}")
        yield Account(f"http://{serving[0]}")
    finally:
        proxy.terminate()
        proxy.wait()


@dataclass
class Checks:
    """One line a check."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def note(self, name: str, problem: str | None, detail: str = "") -> None:
        """A check that passed, or the problem that it found."""
        if problem is None:
            self.passed += 1
            print(f"ok    {name}" + (f"  ({detail})" if detail else ""), flush=True)
        else:
            self.failed.append(name)
            print(f"FAIL  {name}: {problem}", flush=True)

    def answer(self, name: str, answer: Answer, right: bool, detail: str = "") -> None:
        self.note(name, None if right else str(answer), detail)

    def that(self, name: str, check: Callable[[], str]) -> None:
        """A check that raises AssertionError or KubectlError, or returns a detail to show."""
        try:
            self.note(name, None, check())
        except (AssertionError, KubectlError, subprocess.TimeoutExpired) as problem:
            self.note(name, str(problem) or "not so")

    def end(self) -> int:
        print(f"{self.passed} checks passed, {len(self.failed)} failed")
        return 1 if self.failed else 0


def eventually(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """The first answer that is neither None nor empty. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)


@contextmanager
def scratch_namespaces(*suffixes: str) -> Iterator[list[str]]:
    """Namespaces of a made-up name, gone afterwards with all that is in them."""
    stem = f"queue-scaler-e2e-{secrets.token_hex(3)}"
    names = [stem + suffix for suffix in suffixes]
    try:
        for name in names:
            kubectl("create", "namespace", name)
        yield names
    finally:
        kubectl("delete", "namespace", *names, "--ignore-not-found", "--wait=false")


@contextmanager
def guardrails() -> Iterator[None]:
    """guardrails.yaml in force. What was there before stays; what was not goes again."""
    path = str(REPOSITORY / "guardrails.yaml")
    there = kubectl("get", "-f", path, "--ignore-not-found", "-o", "name")
    try:
        if not there:
            kubectl("apply", "-f", path)
        else:
            print("note  the cluster has guardrails already: they are tried as they are")
        yield
    finally:
        if not there:
            kubectl("delete", "-f", path, "--ignore-not-found")


def no_type_warnings() -> str:
    """Raises AssertionError with what the API server's type checker says of the expressions."""

    def checked(name: str) -> dict[str, Any] | None:
        policy = read("validatingadmissionpolicies.admissionregistration.k8s.io", name)
        status = policy.get("status") or {}
        current = status.get("observedGeneration") == policy["metadata"]["generation"]
        return status if current and "typeChecking" in status else None

    found = [
        f"{name} {warning['fieldRef']}: {warning['warning']}"
        for name in ("queue-scaler", "queue-scaler-label")
        for status in [eventually(partial(checked, name), 30, f"a type check of {name}")]
        for warning in (status["typeChecking"] or {}).get("expressionWarnings") or []
    ]
    assert not found, "; ".join(found)
    return ""

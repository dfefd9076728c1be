"""A Kubernetes API server and its Deployment controllers, in this process, over real HTTP.

It answers by the rules of the public API, whatever the code under test would like to hear: the
contract tests hold it and a real control plane to the same answers. What it leaves out (watches,
server-side apply, quotas) answers as an error, never as a made-up success.

    with FakeKubernetes() as cluster:
        cluster.add_deployment("worker", replicas=3)
        cluster.write_kubeconfig(path)          # ... run a client, then look at
        cluster.replicas("worker"), cluster.requests, cluster.deleted_pods
"""

from __future__ import annotations

import base64
import copy
import json
import os
import random
import secrets
import socket
import ssl
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.support.kubernetes_api import Access, Answer, Api, forbidden, json_answer
from tests.support.kubernetes_controllers import Controllers, pod_status
from tests.support.kubernetes_deployments import OWN, annotation, bare_template
from tests.support.kubernetes_objects import (
    CONTROLLER,
    KINDS,
    REVISION,
    ApiError,
    Labels,
    Match,
    Object,
    Request,
    Store,
    Writer,
    conflict,
    merge,
    not_found,
    read_request,
    stamp,
)
from tests.support.rules import Rule

__all__ = ["FakeKubernetes", "Match", "Request", "scales"]


def scales(request: Request) -> bool:
    """Whether a request is a patch that changes the number of replicas."""
    return Match("patch", "deployments")(request) and "spec" in request.body


# --- Faults --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """What goes wrong with a request; `applied`: whether it takes effect all the same."""

    what: Literal["answer", "hang", "reset", "cut", "drip"]
    applied: bool
    answer: Callable[[Request], Answer] | None = None  # instead of the real one
    seconds: float = 0


def answer(code: int, headers: Mapping[str, str] | None = None, message: str = "") -> Behaviour:
    """Answers with this status, unapplied: in the API server's own words, or with this message."""

    def reply(request: Request) -> Answer:
        if code == 429:  # overload protection answers in plain text
            plain = {"Content-Type": "text/plain; charset=utf-8", "Retry-After": "1"}
            text = b"Too many requests, please try again later.\n"
            return Answer(429, text, {**plain, **(headers or {})})
        kind = KINDS[request.resource]
        own = {
            403: forbidden(request),
            404: not_found(kind, request.name),
            409: conflict(kind, request.name),
        }
        error = ApiError(code, message or HTTPStatus(code).phrase)
        return json_answer(code, (error if message else own.get(code, error)).status, headers)

    return Behaviour("answer", False, reply)


def hang(applied: bool = False) -> Behaviour:
    """Reads the request and never answers, until the peer goes."""
    return Behaviour("hang", applied)


def reset(applied: bool = False) -> Behaviour:
    """Resets the connection (RST) instead of answering; `applied`: after doing the work."""
    return Behaviour("reset", applied)


def cut() -> Behaviour:
    """Does the work, answers with the headers and half of the body, then resets."""
    return Behaviour("cut", True)


def drip(seconds: float) -> Behaviour:
    """Does the work, then answers one byte every so many seconds."""
    return Behaviour("drip", True, seconds=seconds)


def body(raw: bytes) -> Behaviour:
    """Does the work, then answers 200 with these bytes."""
    headers = {"Content-Type": "application/json"}
    return Behaviour("answer", True, lambda _: Answer(200, raw, headers))


# --- HTTP ----------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """A thread a connection, which ends with its client."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, cluster: FakeKubernetes, tls: ssl.SSLContext | None) -> None:
        self.cluster = cluster
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls:
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the cluster's `requests` are the log."""

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply, behaviour = self.server.cluster.handle(self.command, self.path, raw, headers)
        what = behaviour.what if behaviour else "answer"
        whole = b"" if what in ("hang", "reset") else self._bytes(reply)
        sent = whole[: -len(reply.body) // 2] if what == "cut" else whole
        step = 1 if what == "drip" else len(whole) or 1
        for start in range(0, len(sent), step):
            self.wfile.write(sent[start : start + step])
            time.sleep(behaviour.seconds if behaviour else 0)
        if what == "hang":
            self.rfile.read(1)  # a client that waits for an answer sends nothing: this is its end
        elif what in ("reset", "cut"):
            self._reset()
        self.close_connection |= what in ("hang", "reset", "cut")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _bytes(self, reply: Answer) -> bytes:
        now = self.server.cluster.store.clock()
        headers = {
            "Date": format_datetime(now.astimezone(UTC), usegmt=True),
            "Content-Length": str(len(reply.body)), **reply.headers,
        }  # fmt: skip
        lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + reply.body

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # with nothing to linger for, closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())


# --- The cluster ---------------------------------------------------------------------------------


class FakeKubernetes:
    """A cluster on loopback, whose controllers are done before a write is answered, unless a test
    takes them `by_steps`."""

    def __init__(
        self,
        *,
        tls: bool = False,
        seed: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = Store(clock, random.Random(seed))
        self.access = Access()
        self.controllers = Controllers(self.store)
        self.api = Api(self.store, self.access, self.controllers)
        self.requests: list[Request] = []
        self._faults: list[Rule] = []
        self._hooks: dict[str, list[Rule]] = {"before": [], "after": []}
        self._server: _Server | None = None
        self.url = ""
        self._tls: ssl.SSLContext | None = None
        self._ca = b""
        if tls:
            import trustme  # not at hand in `make demo`, which needs no certificate

            authority = trustme.CA()
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(self._tls)
            self._ca = authority.cert_pem.bytes()
        self.scales = self.store.scales
        self.deleted_pods = self.controllers.deleted_pods  # their names, in the order of their end
        self.admin_token = self.add_token("kubernetes-admin", admin=True)

    # Life

    def __enter__(self) -> FakeKubernetes:
        self._server = _Server(self, self._tls)
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_listening()

    def stop_listening(self) -> None:
        """Refuses connections from now on."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    # Access

    def add_token(self, user: str, token: str = "", admin: bool = False) -> str:
        """A bearer token for a user name, made up unless given."""
        token = token or secrets.token_urlsafe(24)
        self.access.tokens[token] = user
        self.access.admins |= {user} if admin else set()
        return token

    def service_account(self, name: str) -> str:
        """A token of that service account."""
        return self.add_token(f"system:serviceaccount:default:{name}")

    def load_rbac(self, manifest: str) -> None:
        """Allows what this manifest allows, and nothing else."""
        self.access.load(manifest)

    def write_kubeconfig(self, path: Path, token: str = "") -> Path:
        authority = base64.b64encode(self._ca).decode()
        server = {"server": self.url, "certificate-authority-data": authority}
        context = {"cluster": "fake", "user": "fake", "namespace": "default"}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": server}],
            "users": [{"name": "fake", "user": {"token": token or self.admin_token}}],
            "contexts": [{"name": "fake", "context": context}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def write_service_account(self, directory: Path) -> dict[str, str]:
        """The three files that a pod finds, and the environment that goes with them."""
        directory.mkdir()
        (directory / "token").write_text(self.admin_token)
        (directory / "namespace").write_text("default")
        (directory / "ca.crt").write_bytes(self._ca)
        port = self.url.rpartition(":")[2]
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}

    # Faults

    def fault(
        self, match: Callable[[Request], bool], how: Behaviour, times: int | None = 1, nth: int = 1
    ) -> None:
        """Lets matching requests go wrong; the fault set first wins."""
        self._faults.append(Rule(match, how, times, nth))

    def hook(
        self,
        match: Callable[[Request], bool],
        call: Callable[[Request], object],
        when: Literal["before", "after"] = "before",
        times: int | None = 1,
    ) -> None:
        """Calls `call(request)` just before or after a matching request takes effect."""
        self._hooks[when].append(Rule(match, call, times))

    def clear_faults(self) -> None:
        self._faults.clear()
        self._hooks = {"before": [], "after": []}

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, Behaviour | None]:
        """One request: what happens before, the answer, what happens after, the record."""
        user, agent = self.access.identify(headers), headers.get("user-agent", "")
        request = read_request(method, target, json.loads(raw) if raw else None, user, agent)
        with self.store.lock:
            behaviour = next((rule.act for rule in self._faults if rule.due(request)), None)
        self._run_hooks(request, "before")
        reply = Answer(0, b"")
        if behaviour is None or behaviour.applied:
            content_type = headers.get("content-type", "").split(";")[0].strip()
            reply = self.api.answer(request, content_type)
        if behaviour and behaviour.answer:
            reply = behaviour.answer(request)
        silent = behaviour and behaviour.what in ("hang", "reset")
        request = replace(request, status=0 if silent else reply.status)
        self.requests.append(request)
        self._run_hooks(request, "after")
        return reply, behaviour

    def _run_hooks(self, request: Request, when: str) -> None:
        with self.store.lock:
            due = [rule.act for rule in self._hooks[when] if rule.due(request)]
        for call in due:
            call(request)

    # The world as a test sets it up and looks at it

    def add_deployment(
        self,
        name: str,
        *,
        replicas: int = 1,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        selector: Object | None = None,
        manager: str = "kubectl-create",
    ) -> None:
        """A Deployment with its pods."""
        labels = dict(labels or {"app": name})
        pod = {"containers": [{"name": "main", "image": "worker:1"}]}
        meta = {"name": name, "namespace": "default", "labels": labels, "annotations": annotations}
        spec = {
            "replicas": replicas,
            "selector": selector or {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        with self.store.lock:
            obj = merge({}, {"metadata": meta, "spec": spec})
            self.store.create(KINDS["deployments"], obj, Writer(manager))
            self.controllers.reconcile("default")

    def add_pod(self, name: str, labels: Labels) -> None:
        """A pod that belongs to no Deployment, whatever its labels say."""
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": str(uuid.uuid4())}
        meta = {
            "name": name,
            "namespace": "default",
            "labels": dict(labels),
            "ownerReferences": [{**owner, "controller": True}],
        }
        spec = {"containers": [{"name": "main", "image": "other:1"}], "nodeName": "node-a"}
        with self.store.lock:
            pod = {"metadata": meta, "spec": spec, "status": pod_status(spec, self.store.clock())}
            self.store.create(KINDS["pods"], pod, Writer(CONTROLLER))

    def edit(
        self,
        resource: str,
        name: str,
        change: Callable[[Object], object],
        manager: str = "kubectl-edit",
        subresource: str = "",
    ) -> None:
        """Another writer: changes an object in place, past the API's checks."""
        with self.store.lock:
            old = self.store.objects[(resource, "default", name)]
            new = copy.deepcopy(old)
            change(new)
            self.store.update(old, new, Writer(manager, subresource))
            self.controllers.reconcile("default")

    def scale(self, name: str, replicas: int, manager: str = "kubectl") -> None:
        """Scales as `kubectl scale` or an HPA does: through the scale subresource."""
        change = {"replicas": replicas}
        self.edit("deployments", name, lambda d: d["spec"].update(change), manager, "scale")

    def annotate(
        self, name: str, manager: str = "kubectl-annotate", /, **annotations: str | None
    ) -> None:
        """Sets annotations of a Deployment, as a person does; None removes one."""
        patch = {"metadata": {"annotations": annotations}}
        self.edit("deployments", name, lambda d: d.update(merge(d, patch)), manager)

    def set_template(self, name: str, manager: str = "kubectl-set", **spec: Any) -> None:
        """Changes the pod template, and so begins a rollout: of another image, for example. A
        `serviceAccountName` that does not exist lets its ReplicaSet make no pods."""
        self.edit(
            "deployments", name, lambda d: d["spec"]["template"]["spec"].update(spec), manager
        )

    def start_rollout(self, name: str, new_pods: int, old_pods: int) -> None:
        """Puts a rollout half-way, where it is paused; a rescale is shared out in proportion."""
        surge = new_pods + old_pods - self.replicas(name)
        strategy = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": 1}}
        with self.store.lock, self.by_steps():
            self.edit("deployments", name, lambda d: d["spec"]["strategy"].update(strategy))
            self.set_template(name, containers=[{"name": "main", "image": "worker:2"}])
            self.controllers.step("default", "deployments", name)
            deployment, controller = self.deployment(name), self.controllers.deployments
            new, old = controller.new_and_old(deployment)
            assert new, "the first step makes it"
            for owned, size in ((new, new_pods), *((one, old_pods) for one in old)):
                controller.resize(deployment, owned, size, "rollout", forced=True)
            self.edit("deployments", name, lambda d: d["spec"].update(paused=True))
        self.controllers.reconcile("default")

    @contextmanager
    def by_steps(self) -> Iterator[Controllers]:
        """For so long each controller, scheduler and kubelet acts only when it is told to."""
        self.controllers.instant = False
        try:
            yield self.controllers
        finally:
            self.controllers.instant = True

    def roll_back(self, name: str, manager: str = "kubectl") -> None:
        """As `kubectl rollout undo` does: the template and the annotations that the ReplicaSet of
        the revision before remembers."""
        with self.store.lock:
            deployment = self.deployment(name)
            _, old = self.controllers.deployments.new_and_old(deployment)
            before = max(old, key=lambda one: annotation(one, REVISION))
            own = {k: v for k, v in self.annotations(name).items() if k in OWN}
            theirs = (before["metadata"].get("annotations") or {}).items()
            annotations = own | {key: value for key, value in theirs if key not in OWN}

            def change(obj: Object) -> None:
                obj["metadata"]["annotations"] = annotations
                obj["spec"]["template"] = bare_template(before)

            self.edit("deployments", name, change, manager)

    def keep_terminating(self) -> None:
        """Lets deleted pods stay, from now on, marked as terminating."""
        self.controllers.keep_terminating = True

    def set_pod(
        self,
        name: str,
        *,
        ready: bool | None = None,
        phase: str | None = None,
        node: str | None = None,
        annotations: Mapping[str, str | None] | None = None,
        created: datetime | None = None,
        ready_since: datetime | None = None,
        restarts: int | None = None,
    ) -> None:
        """Changes what a kubelet, a scheduler or time would change."""

        def change(pod: Object) -> None:
            meta, status = pod["metadata"], pod["status"]
            [condition] = [one for one in status["conditions"] if one["type"] == "Ready"]
            for part, key, value in (
                (status, "phase", phase),
                (pod["spec"], "nodeName", node),
                (condition, "status", None if ready is None else str(ready)),
                (condition, "lastTransitionTime", ready_since and stamp(ready_since)),
                (status["containerStatuses"][0], "restartCount", restarts),
                (meta, "creationTimestamp", created and stamp(created)),
                (meta, "annotations", merge(meta.get("annotations"), dict(annotations or {}))),
            ):
                if value is not None:
                    part[key] = value

        self.edit("pods", name, change, "kubelet", "status")

    def deployment(self, name: str) -> Object:
        with self.store.lock:
            return copy.deepcopy(self.store.objects[("deployments", "default", name)])

    def replicas(self, name: str) -> int:
        return int(self.deployment(name)["spec"]["replicas"])

    def annotations(self, name: str) -> dict[str, str]:
        return dict(self.deployment(name)["metadata"].get("annotations", {}))

    def pods(self, name: str) -> list[Object]:
        """The Deployment's pods, terminating ones included."""
        with self.store.lock:
            return copy.deepcopy(self.controllers.pods(self.deployment(name)))

    def events(self) -> list[Object]:
        with self.store.lock:
            return copy.deepcopy(self.store.find("events", "default"))

    def calls(self, match: Callable[[Request], bool]) -> list[Request]:
        """The requests so far that match."""
        return [request for request in list(self.requests) if match(request)]

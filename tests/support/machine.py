"""A cluster, a queue and several runs of the scaler, of which each does one thing when it is told.

A `Machine` is moved by words, so that any order of events is a list of them, to be printed and
played again:

    machine = Machine()
    for move in ("A", "A", "claim 0", "B", "B lost", "stall", "controllers", "A dies"):
        machine.apply(move)
    machine.settle()

Each call of a run to the API server or to Firestore waits until the run is told to go on, so that
anything may happen first; a call that waits for long is one that is on its way, or a run that is
frozen. What must never happen raises `Broken`; `settle` ends all events and checks that everything
comes to rest.

Never, whatever happens:

- the ReplicaSet controller removes, for a run's scale-down, a pod that held a job when that run
  read for the second time which pods are busy;
- a run removes pods after a call of its kind failed (to list, count or read);
- a run changes more than the replicas, its own annotations and deletion costs of its own;
- a pause, or an order (paused-replicas), that was there when a run began is not carried out.

A scale-down is not blamed for what a client cannot steer or know: pods that became unready, or
whose costs a person set, after the run's last list of them; a ReplicaSet that joined after its
patch; pods that a rollout removes; under an order, busy pods that idle ones do not suffice for,
and those that are not ready or in a rollout. A victim's own deletion cost, set by a person, is
given back if its run spares it, and lost with a run that dies.

| word                       | what happens                                                       |
|----------------------------|--------------------------------------------------------------------|
| `A`, `B`                   | the run's next call takes effect, and it goes on to the next one    |
| `A lost`, `A late`         | the call fails, before or after it took effect                     |
| `A denied`                 | the call is answered with an error that no retry helps against     |
| `A dies`                   | the run is gone; its call never arrives                            |
| `A ends`                   | the run goes on to its end                                         |
| `claim N`, `finish N`      | pod N takes a job, or has done it; `job`: one more waits           |
| `unready N`, `ready N`     | so the kubelet says; `crash N`: a restart, too; `delete N`: evicted |
| `deployments`, ...         | one step of the Deployment controller, of the ReplicaSet controller |
|                            | (`replicasets`), of all nodes (`pods`); `controllers`: all of them  |
| `rollout`, `stall`         | another template; one whose ReplicaSet can make no pods            |
| `roll back`, `repair`      | the template before; a template that can make pods                 |
| `rename`, `adopt`          | the Deployment gets another name; a ReplicaSet made by hand joins   |
| `scale N`, `order N`       | a person scales, or sets paused-replicas; `no order`               |
| `pause`, `resume`          | a person does so; `note`: annotates; `cost N`: sets a pod's cost   |
| `wait N`                   | so many seconds pass                                               |
| `queue down`, `queue up`   | Firestore is unreachable; `api down`, `api up`: the API server     |
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

from google.cloud.firestore_v1.types import firestore
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import FakeFirestore
from tests.support.inprocess import (
    FirestoreCall,
    KubernetesCall,
    RpcError,
    http_response,
)
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_controllers import ready_since
from tests.support.kubernetes_objects import (
    DELETION_COST,
    KINDS,
    TEMPLATE_HASH,
    Object,
    Store,
    Writer,
    controller_of,
    merge,
    uid_of,
    wanted_replicas,
)
from tests.support.looks import Looker, Outcome, Time, simulated
from tests.support.world import PROJECT

NAMESPACE = "default"
OURS = "queue-scaler/"
LEASE, PAUSED, ORDER = (OURS + name for name in ("scale-down-lease", "paused", "paused-replicas"))
STATE = {
    OURS + name
    for name in (
        "last-scale-time",
        "last-scale",
        "recommendations",
        "queue-failing-since",
        "scale-down-lease",
    )
}
LONG = 400  # more calls than any run makes, more steps than the controllers take


class Broken(AssertionError):
    """Something happened that never must."""


class Killed(BaseException):
    """Ends the thread of a run that died."""


# --- Runs -----------------------------------------------------------------------------------------


class Slot:
    """One name under which runs are taken, one after another, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.looker = Looker(self._exchange)
        self.runs: SimpleQueue[Callable[[], Outcome]] = SimpleQueue()  # to be taken
        self.calls: SimpleQueue[Any] = SimpleQueue()  # from the run: a call, or its outcome
        self.answers: SimpleQueue[Any] = SimpleQueue()  # to the run
        self.killed = False
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            run = self.runs.get()
            try:
                self.calls.put(run())
            except Killed:
                self.calls.put(None)
            except BaseException as error:  # a bug, of ours or of the script's
                self.calls.put(error)

    def start(self, deployment: str, time: Time, settings: Mapping[str, str]) -> Any:
        """Begins a run; its first call, or its outcome."""
        self.killed = False
        self.runs.put(lambda: self.looker.take(deployment, time, settings))
        return self._next()

    def go_on(self, answer: Callable[[], Any]) -> Any:
        """Answers the call that waits: the next one, or the outcome."""
        self.answers.put(answer)
        return self._next()

    def kill(self) -> None:
        self.killed = True
        self.go_on(lambda: None)

    def _next(self) -> Any:
        found = self.calls.get(timeout=60)
        if isinstance(found, BaseException):
            raise found
        return found

    def _exchange(self, call: Any) -> Any:
        """In the run's thread."""
        if self.killed:
            raise Killed
        self.calls.put(call)
        answer = self.answers.get()
        if self.killed:
            raise Killed
        return answer()


@dataclass
class Run:
    """What is known of one run while it goes on.

    `busy` are the pods that held a job when it last read which do, `listed` when it last listed
    pods, `began` the annotations that it read first. `failing` are the kinds of calls of which the
    last one failed.
    """

    slot: Slot
    call: Any
    started: float
    busy: frozenset[str] | None = None
    marked: bool = False  # it has set a deletion cost since it last read which are busy
    listed: int = 0
    began: dict[str, str] | None = None
    failing: set[str] = field(default_factory=set)
    faults: bool = False
    meddled: bool = False  # a person changed a pause, or the number, since it began
    rescaled: bool = False
    steps: int = 0


@dataclass(frozen=True)
class Rescale:
    """A change of the Deployment's number that its controller has not acted on yet."""

    change: int
    spares: frozenset[str]  # the pods that it must not remove
    since: int  # ... unless, after this moment, they became unready or a person set costs
    sets: frozenset[str]  # ... or another ReplicaSet than these wants pods
    free: int = 0  # so many of them may go all the same


@dataclass(frozen=True)
class Removal:
    """The right to remove one pod of a ReplicaSet."""

    spares: frozenset[str] = frozenset()
    since: int = 0


# --- The machine ----------------------------------------------------------------------------------


_SLOTS: dict[str, Slot] = {}
_QUEUE = FakeFirestore(PROJECT)


def slot(name: str) -> Slot:
    """The clients of a slot take long to make."""
    if name not in _SLOTS:
        _SLOTS[name] = Slot(name)
    return _SLOTS[name]


class Beginning(NamedTuple):
    """Where sequences start."""

    store: Store
    documents: Mapping[str, Mapping[str, Any]]
    passed: float
    tick: int
    jobs: int


@functools.cache
def beginning(pods: int, busy: int, before: str) -> Beginning:
    """A Deployment of so many pods, an hour old, after some moves."""
    if not busy and not before:
        cluster = FakeKubernetes(seed=1, clock=Time(-3600).clock)
        cluster.add_deployment("worker", replicas=pods)
        return Beginning(cluster.store, {}, 0, 0, 0)
    machine = Machine(pods, 0)
    for number in range(busy):
        machine.apply(f"claim {number}")
    try:
        with simulated(machine.time):
            machine.play(before)
        assert not any((machine.rescales, *machine.runs.values())), "nothing is under way"
    finally:
        machine.close()
    documents = machine.queue.documents("jobs")
    store, passed = machine.cluster.store, machine.time.passed
    return Beginning(store, documents, passed, machine.tick, machine.jobs)


class _Refusing:
    """The context of a gRPC call."""

    def abort(self, code: StatusCode, details: str) -> None:
        raise RpcError(code, details)


class Machine:
    """See the top of this file. `busy` of `pods` pods hold a job at the start; then come the moves
    of `before`."""

    def __init__(
        self,
        pods: int = 4,
        busy: int = 2,
        runs: str = "AB",
        before: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        given = {"pods": pods, "busy": busy, "runs": runs, "before": before, "settings": settings}
        self.given = ", ".join(f"{name}={value!r}" for name, value in given.items() if value)
        there = beginning(pods, busy, before)
        self.time = Time(there.passed)
        self.cluster = FakeKubernetes(seed=1, clock=self.time.clock)
        store = self.cluster.store
        store.objects, store.revision = dict(there.store.objects), there.store.revision
        store.rng.setstate(there.store.rng.getstate())
        self.queue = _QUEUE
        self.queue.clear()
        self.queue.calls.clear()
        self.queue.heal()
        for name, fields in there.documents.items():
            self.queue.put(f"jobs/{name}", fields)
        self.settings = settings or {}
        self.name = "worker"
        self.moves: list[str] = []
        self.log: list[str] = []
        self.tick, self.jobs = there.tick, there.jobs
        self.names = 0
        self.outcomes: list[Outcome] = []
        self.down: set[str] = set()
        self.runs: dict[str, Run | None] = dict.fromkeys(runs)
        self.writes = 0
        self.disturbed: dict[str, int] = {}  # pods by name, when their place in the order fell
        self.rescales: list[Rescale] = []
        self.removals: dict[str, list[Removal]] = {}
        self.removed: dict[str, list[str]] = {}
        self.foreign: dict[str, str] = {}  # costs that a person set, by pod
        self.costs_set = -1  # when a person did so last
        self.acting = ""
        controllers = self.controllers = self.cluster.controllers
        controllers.instant = False
        controllers.luck = self._worst
        controllers.ended = self._ended
        controllers.deployments.resized = self._resized
        self.token = f"Bearer {self.cluster.admin_token}"
        self.time.observe = lambda: self.control("deployments")

    # What there is

    def deployment(self) -> Object:
        found = self.cluster.store.get("deployments", NAMESPACE, self.name)
        assert found
        return found

    def annotations(self) -> dict[str, str]:
        return dict(self.deployment()["metadata"].get("annotations") or {})

    def live(self) -> list[Object]:
        """The pods that are neither ending nor at an end, the oldest first: all are the
        Deployment's, even while it has not adopted their ReplicaSet yet."""
        found = [
            pod
            for pod in self.cluster.store.find("pods", NAMESPACE)
            if "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(found, key=lambda pod: (pod["metadata"]["creationTimestamp"], name_of(pod)))

    def busy(self) -> frozenset[str]:
        """The names of live pods that hold a job."""
        jobs = self.queue.documents("jobs").values()
        held = {job.get("assignedPodId") for job in jobs if job["status"] == "processing"}
        return frozenset(name_of(pod) for pod in self.live()) & held

    def active(self) -> frozenset[str]:
        """The ReplicaSets that want pods."""
        sets = self.controllers.sets(self.deployment())
        return frozenset(uid_of(one) for one in sets if wanted_replicas(one))

    def waiting(self) -> int:
        jobs = self.queue.documents("jobs").values()
        return sum(job["status"] == "waiting" for job in jobs)

    # Moves

    def possible(self) -> dict[str, list[str]]:
        """The moves that change something now, by kind."""
        runs = list(self.runs)
        going = [name for name, run in self.runs.items() if run]
        pods, busy = self.live(), self.busy()
        ready = [n for n, pod in enumerate(pods) if ready_since(pod)]
        running = [n for n, pod in enumerate(pods) if pod["status"].get("phase") == "Running"]
        held = [n for n, pod in enumerate(pods) if name_of(pod) in busy]
        account = self.deployment()["spec"]["template"]["spec"].get("serviceAccountName")
        annotations = self.annotations()
        sizes = range(1, 6)
        return {
            "run": runs,
            "fault": [f"{n} {how}" for n in going for how in ("lost", "late", "denied", "dies")],
            "jobs": [f"claim {n}" for n in running if n not in held]
            + [f"finish {n}" for n in held]
            + ["job"] * (self.waiting() < 6),
            "pods": [f"unready {n}" for n in ready]
            + [f"ready {n}" for n in running if n not in ready]
            + [f"{what} {n}" for n in running for what in ("crash", "delete")],
            "controllers": ["controllers", "deployments", "replicasets", "pods"],
            "rollout": ["rollout", "stall"]
            + ["repair"] * (account is not None)
            + ["roll back"] * (len(self.controllers.sets(self.deployment())) > 1)
            + ["rename", "adopt"],
            "person": [f"scale {n}" for n in sizes if n != wanted_replicas(self.deployment())]
            + (["resume"] if PAUSED in annotations else ["pause"])
            + (["no order"] if ORDER in annotations else [f"order {n}" for n in sizes])
            + ["note"]
            + [f"cost {n}" for n in range(len(pods))],
            "time": ["wait 5", "wait 20", "wait 60"],
            "outage": [
                f"{what} {'up' if what in self.down else 'down'}" for what in ("queue", "api")
            ],
        }

    def play(self, moves: str) -> None:
        for move in filter(None, moves.split("; ")):
            self.apply(move)

    def apply(self, move: str) -> None:
        self.moves.append(move)
        self.tick += 1
        word, _, rest = move.partition(" ")
        if word in self.runs:
            return self._step(word, rest)
        if rest.isdigit() and word in POD_MOVES:
            pods = self.live()
            return POD_MOVES[word](self, pods[int(rest)]) if int(rest) < len(pods) else None
        if move in MOVES:
            MOVES[move](self)
            return None
        getattr(self, f"_{word}")(int(rest))
        return None

    # A run's steps

    def _step(self, name: str, how: str) -> None:
        run = self.runs[name]
        if run is None:
            if how not in ("", "ends"):
                return
            mine = slot(name)
            call = mine.start(self.name, self.time, self.settings)
            run = self.runs[name] = Run(mine, call, self.time.passed)
            if how == "":
                return
        if how == "dies":
            self.runs[name] = None
            self.log.append(f"{name} dies before {run.call}")
            run.slot.kill()
        elif how == "ends":
            for _ in range(LONG):
                if self.runs[name] is None:
                    return
                self._deliver(name, run, "")
            self._break(f"a run makes more than {LONG} calls")
        else:
            self._deliver(name, run, how)

    def _deliver(self, name: str, run: Run, how: str) -> None:
        """Lets the call that waits take effect or fail, and the run go on to its next one."""
        call, run.steps = run.call, run.steps + 1
        service = "api" if isinstance(call, KubernetesCall) else "queue"
        kind = kind_of(call)
        how = "lost" if service in self.down else how
        answer: Callable[[], Any]
        if how in ("", "late"):
            answer = self._perform(run, call, kind)
        if how == "":
            run.failing.discard(kind)
        else:
            run.faults = True
            run.failing.add(kind)
        if how in ("lost", "late"):
            answer = raising(call.broken)
        elif how == "denied":
            answer = denied(call)
        self.log.append(f"{name} {call} {how}".strip())
        found = run.slot.go_on(answer)
        if isinstance(found, Outcome):
            self.runs[name] = None
            self._check_end(run, found)
        else:
            run.call = found

    def _perform(self, run: Run, call: Any, kind: str) -> Callable[[], Any]:
        """The effect of a call, and its answer."""
        if isinstance(call, FirestoreCall):
            return self._ask_queue(run, call)
        store = self.cluster.store
        before = {key: store.objects.get(key) for key in keys_of(call)}
        headers = {**call.headers, "authorization": self.token}
        reply, _ = self.cluster.handle(call.method, call.target, call.body, headers)
        if kind == "list pods":
            run.listed = self.tick
        if kind == "get deployments" and run.began is None and reply.status == 200:
            run.began = dict(json.loads(reply.body)["metadata"].get("annotations") or {})
        if reply.status < 300 and call.method != "GET":
            self.writes += 1
        for key, old in before.items():
            new = store.objects.get(key)
            if old is not None and new is not None and new is not old:
                self._check_write(run, old, new)
        found = reply.status, reply.body, reply.headers
        if reply.status >= 500:
            raise AssertionError(f"a bug of the fake: {reply}")
        return lambda: http_response(*found)

    def _ask_queue(self, run: Run, call: FirestoreCall) -> Callable[[], Any]:
        counting: Any = firestore.RunAggregationQueryRequest
        reading: Any = firestore.RunQueryRequest
        message = counting if call.kind == "count" else reading
        request = message.pb().FromString(call.message)
        try:
            found = self.queue._serve(call.kind, request, _Refusing())
        except RpcError as error:
            return raising(error)
        asked = self.queue.calls[-1]
        if call.kind == "query" and ("status", "==", "processing") in asked.filters:
            run.busy, run.marked = self.busy(), False
        answers = [type(one).serialize(one) for one in found]
        return lambda: answers

    # What is never allowed

    def _check_write(self, run: Run, old: Object, new: Object) -> None:
        """A write of a run: what it may change, and whether it may remove pods now."""
        before, after = (dict(obj["metadata"].get("annotations") or {}) for obj in (old, new))
        changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
        allowed = STATE if old["kind"] == "Deployment" else {DELETION_COST}
        if changed - allowed:
            self._break(f"a run changed {sorted(changed - allowed)}")
        meta = {
            "annotations": None,
            "resourceVersion": None,
            "managedFields": None,
            "generation": None,
        }
        cut = [merge(obj, {"metadata": meta, "spec": {"replicas": None}}) for obj in (old, new)]
        if cut[0] != cut[1]:
            self._break("a run changed more than replicas and annotations")
        if old["kind"] != "Deployment":
            if int(after.get(DELETION_COST, 0)) < 0:
                run.marked = True
                self.foreign.pop(name_of(new), None)
            return
        change = wanted_replicas(new) - wanted_replicas(old)
        if not change:
            return
        run.rescaled = True
        if change > 0:
            self.rescales.append(Rescale(change, frozenset(), self.tick, frozenset()))
            return
        if run.failing - {"patch pods", "patch deployments"}:
            self._break(f"removes pods although it could not {sorted(run.failing)}")
        if run.busy is None and self.busy():
            self._break("removes pods without having read which are busy")
        spares = run.busy or frozenset()
        ordered, sets = after.get(ORDER) == str(wanted_replicas(new)), self.active()
        if run.marked and not ordered:
            self._break("removes pods without having read again which are busy")
        free = len(spares) - wanted_replicas(new) if ordered else 0
        if ordered:  # it is carried out even if a busy pod goes before any deletion cost counts
            spares &= {name_of(pod) for pod in self.live() if ready_since(pod)}
        if ordered and len(sets) != 1:
            spares = frozenset()  # nothing can steer it, and an order is carried out
        self.rescales.append(Rescale(change, spares, run.listed, sets, max(0, free)))

    def _check_end(self, run: Run, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.log.append(f"  {outcome}")
        if "internal error" in outcome.message:
            self._break(outcome.message)
        began = run.began or {}
        if run.meddled:
            return
        if began.get(PAUSED) == "true" and run.rescaled:
            self._break("a pause that was there when a run began did not hold it")
        late = self.time.passed - run.started > 5
        if ORDER in began and PAUSED not in began and not (run.faults or late or self.down):
            number = wanted_replicas(self.deployment())
            if str(number) != began[ORDER] and not self._order_was_restored():
                self._break(f"an order of {began[ORDER]} that was there when a run began: {number}")

    def _order_was_restored(self) -> bool:
        """By a rollback: it then holds the number that there is."""
        return any(
            entry["manager"] == "kubectl"
            and f"f:{ORDER}" in entry["fieldsV1"].get("f:metadata", {}).get("f:annotations", {})
            for entry in self.deployment()["metadata"].get("managedFields", ())
        )

    def _resized(self, owned: Object, size: int, cause: str) -> None:
        """The Deployment controller gives a ReplicaSet another size: by whose order may which of
        its pods go?"""
        rights = self.removals.setdefault(uid_of(owned), [])
        change = size - wanted_replicas(owned)
        if change > 0:
            rights.sort(key=lambda one: bool(one.spares))
            del rights[max(0, len(rights) - change) :]
            return
        down = [one for one in self.rescales if one.change < 0]
        spares: frozenset[str] = frozenset()
        free, since = 0, 0
        if cause == "scale" and down and all(self.active() <= one.sets for one in down):
            # Several at once: what all of them spare.
            spares = frozenset.intersection(*(one.spares for one in down))
            free, since = sum(one.free for one in down), min(one.since for one in down)
        for number in range(-change):
            rights.append(Removal(frozenset() if number < free else spares, since))

    def _ended(self, pod: Object) -> None:
        """A pod is deleted: by the ReplicaSet controller only if somebody may remove it."""
        if self.acting != "replicasets":
            return
        uid = controller_of(pod)
        gone, rights = self.removed.setdefault(uid, []), self.removals.get(uid, [])
        gone.append(name_of(pod))
        if not self._allowed(gone, rights):
            self._break(f"removed {name_of(pod)}, which was busy at the second read of the queue")

    def _allowed(self, gone: Sequence[str], rights: Sequence[Removal]) -> bool:
        """Whether each pod that went has a right of its own under which it may go."""
        slots = [*rights, *[Removal()] * (len(gone) - len(rights))]
        taken: dict[int, str] = {}

        def place(name: str, seen: set[int]) -> bool:
            for number, right in enumerate(slots):
                weak = max(self.disturbed.get(name, -1), self.costs_set) > right.since
                if number in seen or (name in right.spares and not weak):
                    continue
                seen.add(number)
                if number not in taken or place(taken[number], seen):
                    taken[number] = name
                    return True
            return False

        return all(place(name, set()) for name in gone)

    def _worst(self, pods: list[Object]) -> list[Object]:
        """Among pods that no rule of the ReplicaSet controller tells apart, the busy ones go."""
        busy = self.busy()
        return sorted(pods, key=lambda pod: name_of(pod) not in busy)

    def _break(self, what: str) -> None:
        played = f"replay({'; '.join(self.moves)!r}, {self.given})"
        raise Broken("\n".join([what, played, *self.log[-60:]]))

    # Controllers

    def control(self, resource: str) -> None:
        """One step of each controller of a kind."""
        self.acting = resource
        for found, name in self.controllers.steps(NAMESPACE):
            if found != resource:
                continue
            self.controllers.step(NAMESPACE, resource, name)
            if resource == "deployments" and name == self.name:
                self.rescales.clear()
        if resource == "replicasets":
            for one in self.controllers.sets(self.deployment()):
                active = [p for p in self.live() if controller_of(p) == uid_of(one)]
                if len(active) <= wanted_replicas(one):
                    self.removals.pop(uid_of(one), None)
                    self.removed.pop(uid_of(one), None)
        self.acting = ""

    def control_all(self) -> None:
        for _ in range(LONG):
            before = self.cluster.store.revision
            for one in ("deployments", "replicasets", "pods"):
                self.control(one)
            if self.cluster.store.revision == before:
                return
        self._break("the controllers do not come to rest")

    # Pods and jobs

    def claim(self, pod: Object) -> None:
        if pod["status"].get("phase") == "Running" and name_of(pod) not in self.busy():
            waiting = [
                i for i, j in self.queue.documents("jobs").items() if j["status"] == "waiting"
            ]
            self.jobs += not waiting
            name = min(waiting, default=f"job-{self.jobs:03}")
            job = {"status": "processing", "assignedPodId": name_of(pod)}
            self.queue.put(f"jobs/{name}", job)

    def finish(self, pod: Object) -> None:
        for name, job in self.queue.documents("jobs").items():
            if job.get("assignedPodId") == name_of(pod) and job["status"] == "processing":
                self.queue.put(f"jobs/{name}", {"status": "done", "assignedPodId": name_of(pod)})

    def job(self) -> None:
        self.jobs += 1
        self.queue.put(f"jobs/job-{self.jobs:03}", {"status": "waiting"})

    def set_ready(self, pod: Object, ready: bool, restarts: int = 0) -> None:
        if pod["status"].get("phase") == "Running":
            count = pod["status"]["containerStatuses"][0]["restartCount"] + restarts
            self.cluster.set_pod(
                name_of(pod), ready=ready, ready_since=self.time.clock(), restarts=count
            )
            self.disturbed[name_of(pod)] = self.tick

    def delete(self, pod: Object) -> None:
        self.acting = "person"
        self.controllers.delete_pod(pod)
        self.acting = ""

    def cost(self, pod: Object) -> None:
        self.cluster.edit(
            "pods",
            name_of(pod),
            lambda obj: obj.update(merge(obj, {"metadata": {"annotations": {DELETION_COST: "7"}}})),
            "kubectl-annotate",
        )
        self.foreign[name_of(pod)] = "7"
        self.costs_set = self.tick

    # People

    @contextmanager
    def meddling(self) -> Iterator[None]:
        """What a person does to the Deployment, which a run need not have seen."""
        before = wanted_replicas(self.deployment())
        yield
        change = wanted_replicas(self.deployment()) - before
        if change:
            self.rescales.append(Rescale(change, frozenset(), self.tick, frozenset()))
        for run in filter(None, self.runs.values()):
            run.meddled = True

    def annotate(self, name: str, value: str | None) -> None:
        with self.meddling():
            self.cluster.annotate(self.name, **{name: value})

    def note(self) -> None:
        self.cluster.annotate(self.name, note=str(self.tick))

    def _scale(self, number: int) -> None:
        with self.meddling():
            self.cluster.scale(self.name, number)

    def _order(self, number: int) -> None:
        self.annotate(ORDER, str(number))

    def _wait(self, seconds: int) -> None:
        self.time.passed += seconds

    def roll_out(self, **spec: Any) -> None:
        with self.meddling():
            self.cluster.set_template(self.name, **spec)

    def another_template(self) -> None:
        self.names += 1
        self.roll_out(containers=[{"name": "main", "image": f"worker:{1 + self.names}"}])

    def repair(self) -> None:
        self.names += 1
        self.roll_out(serviceAccountName="default")

    def roll_back(self) -> None:
        if len(self.controllers.sets(self.deployment())) > 1:
            with self.meddling():
                self.cluster.roll_back(self.name)

    def rename(self) -> None:
        """As `kubectl delete --cascade=orphan` and a manifest with another name do."""
        with self.meddling():
            self.names += 1
            old = self.deployment()
            self.controllers.delete(old, orphan=True)
            self.name = f"worker-{self.names}"
            shown = {
                key: value
                for key, value in (old["metadata"].get("annotations") or {}).items()
                if not key.startswith("deployment.kubernetes.io/")
            }
            meta = {"name": self.name, "namespace": NAMESPACE, "annotations": shown}
            new = {"metadata": {**meta, "labels": {"app": "worker"}}, "spec": old["spec"]}
            self.cluster.store.create(KINDS["deployments"], new, Writer("kubectl-create"))

    def adopt(self) -> None:
        """A ReplicaSet made by hand whose labels the Deployment's selector meets."""
        self.names += 1
        labels = {"app": "worker", TEMPLATE_HASH: f"hand{self.names}"}
        containers = [{"name": "main", "image": f"worker:{1 + self.names}"}]
        spec = {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}},
        }
        meta = {"name": f"hand-{self.names}", "namespace": NAMESPACE, "labels": labels}
        with self.meddling():
            obj = {"metadata": meta, "spec": spec}
            self.cluster.store.create(KINDS["replicasets"], obj, Writer("kubectl-create"))

    # The end

    def close(self) -> None:
        """Ends the threads."""
        for name, run in self.runs.items():
            if run:
                self.runs[name] = None
                run.slot.kill()

    def settle(self) -> None:
        """No more events: all runs go on to their ends, then one a minute. Everything comes to
        rest, and what the runs left behind is gone."""
        for name, run in self.runs.items():
            if run:
                self._step(name, "ends")
        self.down.clear()
        self._rest()
        if {PAUSED, ORDER} & self.annotations().keys():
            for name in (PAUSED, ORDER):
                self.annotate(name, None)
            self._rest()
        number, last = wanted_replicas(self.deployment()), self.outcomes[-1]
        busy, waiting = self.busy(), self.waiting()
        minimum = int(self.settings.get("MIN_REPLICAS", "1"))
        expected = min(6, max(minimum, len(busy) + waiting))
        if LEASE in self.annotations():
            self._break("a lease is left")
        for pod in self.live():
            cost = (pod["metadata"].get("annotations") or {}).get(DELETION_COST)
            if cost is not None and int(cost) < 0:
                self._break(f"{name_of(pod)} still has the deletion cost {cost}")
            if cost != self.foreign.get(name_of(pod), cost):
                self._break(f"{name_of(pod)}'s own deletion cost is {cost} now")
        weak = any(name_of(p) in busy and not ready_since(p) for p in self.live())
        rolling = len(self.active()) > 1
        held = number > expected and last.reason == "WorkersBusy" and (weak or rolling)
        if number != expected and not held:
            self._break(f"settles at {number} pods instead of {expected}: {last}")

    def _rest(self) -> None:
        """Runs, one a minute, until one succeeds and has nothing to write."""
        for _ in range(15):
            self.control_all()
            self.time.passed += 60
            before = self.writes
            self._step(next(iter(self.runs)), "ends")
            if self.writes == before and self.outcomes[-1].exit_code == 0:
                return
        self._break("it does not come to rest")


POD_MOVES: Mapping[str, Callable[[Machine, Object], None]] = {
    "claim": Machine.claim,
    "finish": Machine.finish,
    "unready": lambda machine, pod: machine.set_ready(pod, False),
    "ready": lambda machine, pod: machine.set_ready(pod, True),
    "crash": lambda machine, pod: machine.set_ready(pod, False, restarts=1),
    "delete": Machine.delete,
    "cost": Machine.cost,
}
MOVES: Mapping[str, Callable[[Machine], Any]] = {
    "job": Machine.job,
    "controllers": Machine.control_all,
    **{
        one: (lambda machine, one=one: machine.control(one))  # type: ignore[misc]
        for one in ("deployments", "replicasets", "pods")
    },
    "rollout": Machine.another_template,
    "stall": lambda machine: machine.roll_out(serviceAccountName="missing"),
    "repair": Machine.repair,
    "roll back": Machine.roll_back,
    "rename": Machine.rename,
    "adopt": Machine.adopt,
    "pause": lambda machine: machine.annotate(PAUSED, "true"),
    "resume": lambda machine: machine.annotate(PAUSED, None),
    "no order": lambda machine: machine.annotate(ORDER, None),
    "note": Machine.note,
    "queue down": lambda machine: machine.down.add("queue"),
    "queue up": lambda machine: machine.down.discard("queue"),
    "api down": lambda machine: machine.down.add("api"),
    "api up": lambda machine: machine.down.discard("api"),
}


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def denied(call: Any) -> Callable[[], Any]:
    if isinstance(call, FirestoreCall):
        return raising(RpcError(StatusCode.PERMISSION_DENIED, "Missing permissions."))
    body = b'{"kind": "Status", "message": "forbidden: User cannot do this"}'
    return lambda: http_response(403, body, {"Content-Type": "application/json"})


def parts_of(call: KubernetesCall) -> list[str]:
    return call.target.partition("?")[0].partition(f"/{NAMESPACE}/")[2].split("/")


def keys_of(call: KubernetesCall) -> list[tuple[str, str, str]]:
    """The object that a call is about."""
    parts = parts_of(call)
    return [(parts[0], NAMESPACE, parts[1])] if len(parts) > 1 else []


def kind_of(call: Any) -> str:
    if isinstance(call, FirestoreCall):
        return call.kind
    parts = parts_of(call)
    verb = call.method.lower() if len(parts) > 1 or call.method != "GET" else "list"
    return f"{verb} {parts[0]}"

"""Whatever fails: the run ends in time, in one clear line, with the replicas where they belong.

The matrix below lets every call of a run meet every fault. The worlds are two: one that scales
down, which makes every call there is (three pods, one of them busy, nothing waiting: 1 pod is
wanted), and one that scales up (one pod, five jobs waiting: 3 pods are wanted). Both servers are
real ones on loopback, each behind a proxy that can go away, drop, reset and drip.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.firestore import Client as JobsClient
from grpc import StatusCode  # type: ignore[import-untyped]
from kubernetes.client import ApiClient

import scaler
from tests.support import firestore, kubernetes
from tests.support.firestore import Fail, FakeFirestore, On
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.proxy import ChaosProxy
from tests.support.world import BUSY, PROJECT, START, Run, World

SHORT_SECONDS = 5  # the budget of a run that uses it up
PROCESS_SECONDS = 10  # the same, for a run whose process has to start first
LONG_SECONDS = 20  # the budget of any other run
OUTAGE_SECONDS = 0.7
AT_ONCE = 6  # cells played at the same time: most of a cell is waiting

# ---------------------------------------------------------------------------------- the worlds


@dataclass(kw_only=True)
class FaultyWorld(World):
    """A world about to scale from `before` to `after`, with a proxy in front of either server."""

    before: int
    after: int
    api: ChaosProxy
    front: ChaosProxy
    at_end: ExitStack
    busy_pod: str = ""


@contextmanager
def servers(replicas: int, wanted: int, process: bool, **settings: str) -> Iterator[FaultyWorld]:
    with (
        tempfile.TemporaryDirectory() as directory,
        FakeKubernetes(seed=1) as cluster,
        FakeFirestore(project=PROJECT) as queue,
        ChaosProxy(cluster.url.removeprefix("http://")) as api,
        ChaosProxy(queue.host) as front,
        ExitStack() as at_end,
    ):
        cluster.add_deployment("worker", replicas=replicas)
        kubeconfig = cluster.write_kubeconfig(Path(directory) / "through-the-proxy")
        kubeconfig.write_text(kubeconfig.read_text().replace(cluster.url, f"http://{api.host}"))
        yield FaultyWorld(
            cluster, queue, "worker", START, {"KUBECONFIG": str(kubeconfig), **settings},
            Path(directory), process, front.host,
            before=replicas, after=wanted, api=api, front=front, at_end=at_end,
        )  # fmt: skip


@contextmanager
def scaling_down(process: bool = False, **settings: str) -> Iterator[FaultyWorld]:
    """Three pods, one busy, nothing waiting: the run that makes every call there is."""
    more = {"BUSY_FILTER": BUSY, "SCALE_DOWN_STABILIZATION_SECONDS": "0", **settings}
    with servers(3, 1, process, **more) as world:
        world.busy_pod = str(world.cluster.pods("worker")[0]["metadata"]["name"])
        job = {"status": "processing", "assignedPodId": world.busy_pod}
        world.queue.put(f"jobs/{'a-long-name' * 100}", job)  # an answer that can break in two
        yield world


@contextmanager
def scaling_up(process: bool = False, **settings: str) -> Iterator[FaultyWorld]:
    """One pod, five jobs waiting, at most three pods."""
    with servers(1, 3, process, **settings) as world:
        world.queue.fill(5)
        yield world


# ---------------------------------------------------------------------------------- the calls


@dataclass(frozen=True)
class Call:
    """A column of the matrix: a call of a run, and what the run says of it."""

    doing: str
    on: Match | On
    id: str = ""
    world: Callable[..., Any] = scaling_down
    nth: int = 1  # of those to the API server
    after_marking: bool = False

    def __str__(self) -> str:
        return self.id or self.doing

    def made(self, world: FaultyWorld, times: int = 1) -> bool:
        """Whether a run has got as far as making it so many times."""
        if isinstance(self.on, Match):
            return len(world.cluster.calls(self.on)) >= times + self.nth - 1
        return sum(map(self.on.matches, world.queue.calls)) >= times + self.after_marking


def about_pods(call: firestore.Call) -> bool:
    return any(op == "in" for _, op, _ in call.filters)


GET, PATCH = Match("get", "deployments"), Match("patch", "deployments")
PATCH_POD = Match("patch", "pods")
READ = Call("reading the Deployment", GET)
SETS = Call("listing the ReplicaSets", Match("list", "replicasets"))
LIST = Call("listing the pods", Match("list", "pods"))
LEASE = Call("patching the Deployment", PATCH, "taking the lease")
MARK = Call("setting a pod's deletion cost", PATCH_POD)
DOWN = replace(LEASE, id="scaling down", nth=2)
UP = replace(LEASE, id="scaling up", world=scaling_up)
EVENT = Call("writing the Event", Match("create", "events"))
WAITING = Call("counting waiting jobs", On("count", where=lambda call: not about_pods(call)))
BUSY_JOBS = Call("counting busy jobs", On("count", where=about_pods))
LOOK = Call("reading which pods are busy", On("query"))
AGAIN = replace(LOOK, id="reading again which pods are busy", after_marking=True)

# --------------------------------------------------------------------------------- the matrix
#
# succeeds  exit 0: scaled once, one Event
# warns     exit 0: scaled once, and a warning that the Event may be missing
# scales    exit 0: scaled once, at most one Event
# holds     exit 1: nothing is changed, and the next run tries again
# unknown   exit 1: whether the patch arrived could not be found out, which the run says
# person    exit 2: nothing is changed, and the run says what the user has to do
# -         not a case of this matrix
#
# An indented line goes on with the faults of the row before it.

CLUSTER_CALLS = (READ, SETS, LIST, LEASE, MARK, DOWN, UP, EVENT)

# Twice, or for as long as OUTAGE_SECONDS; after that everything is well.
API_SERVER_PASSING = """
read     sets     list     lease    mark     down     up       event
succeeds succeeds succeeds succeeds succeeds succeeds succeeds warns    resets before it acts
    | resets after it has acted | goes away before it acts | goes away after it has acted
    | breaks off in mid-answer | answers garbage | answers nothing
    | answers 408/429/500/502/503/504 | answers 504, but acts
succeeds succeeds succeeds succeeds succeeds succeeds succeeds succeeds answers another kind
-        -        -        succeeds succeeds succeeds succeeds warns    answers 409
"""

# A 404 for a pod means that it is gone; test_busy.py has a test of it.
API_SERVER_STAYING = """
read     sets     list     lease    mark     down     up       event
holds    holds    holds    holds    holds    unknown  unknown  warns    never answers
    | resets before it acts | goes away before it acts | goes away after it has acted
    | answers garbage and does nothing | answers 500/502/503/504 | answers 503, retry after 600
holds    holds    holds    holds    holds    unknown  unknown  scales   drips its answer
holds    holds    holds    unknown  holds    succeeds succeeds warns    never answers, but acts
holds    holds    holds    succeeds holds    succeeds succeeds warns    answers 504, but acts
    | resets after it has acted | breaks off in mid-answer | answers garbage | answers nothing
holds    holds    holds    succeeds succeeds succeeds succeeds succeeds answers another kind
holds    holds    holds    holds    holds    holds    holds    warns    answers 408/409/429
    | answers 429, retry after 600
person   person   person   person   person   person   person   warns    answers 400/401/403/422
person   person   person   person   -        person   person   warns    answers 404
"""

QUEUE_CALLS = (WAITING, BUSY_JOBS, LOOK, AGAIN)

FIRESTORE_PASSING = """
waiting   busy      look      again
succeeds  succeeds  succeeds  succeeds  answers ABORTED/CANCELLED/DEADLINE_EXCEEDED/INTERNAL
    | answers RESOURCE_EXHAUSTED/UNAVAILABLE | resets before the answer
    | breaks off in mid-answer | goes away
"""

FIRESTORE_STAYING = """
waiting   busy      look      again
holds     holds     holds     holds     answers ABORTED/CANCELLED/DEADLINE_EXCEEDED/INTERNAL
    | answers RESOURCE_EXHAUSTED/UNAVAILABLE | answers ALREADY_EXISTS/DATA_LOSS/OUT_OF_RANGE
    | answers UNIMPLEMENTED/UNKNOWN | never answers | resets before the answer
    | drips its answer | drops all packets | goes away
person    person    person    person    answers FAILED_PRECONDITION/INVALID_ARGUMENT/NOT_FOUND
    | answers PERMISSION_DENIED/UNAUTHENTICATED
"""

NOBODY_THERE = """
read      waiting
holds     holds     refuses connections | resets connections | drops all, from the first
    | drips, from the first
succeeds  succeeds  is slow
"""

# What a run that waits for its user has to say, by what was denied.
ADVICE = {
    "answers 401": "credentials",
    "answers 403": "the Role in namespace default must allow {on.verb} on {on.resource} (",
    "answers FAILED_PRECONDITION": "https://console.firebase.google.com/v1/r/project/",
    "answers INVALID_ARGUMENT": "check QUEUE_COLLECTION, WAITING_FILTER, BUSY_FILTER",
    "answers NOT_FOUND": "check FIRESTORE_PROJECT and FIRESTORE_DATABASE",
    "answers PERMISSION_DENIED": "roles/datastore.viewer",
    "answers UNAUTHENTICATED": "GOOGLE_APPLICATION_CREDENTIALS",
}
FORBIDDEN = {"answers 401", "answers 403", "answers 422"}
FORBIDDEN |= {"answers PERMISSION_DENIED", "answers UNAUTHENTICATED"}


@dataclass(frozen=True)
class Cell:
    """One call, one fault, and how the run ends. `passing`: the fault strikes twice at most."""

    call: Call
    fault: str
    passing: bool
    ending: str

    def __str__(self) -> str:
        how_long = " for a moment" if self.passing else ""
        server = "the API server" if isinstance(self.call.on, Match) else "Firestore"
        return f"{server} {self.fault}{how_long} while {self.call}: {self.ending}"

    @property
    def reason(self) -> str:
        """The reason of a run that holds."""
        if self.fault in FORBIDDEN and self.ending == "person":
            return "Forbidden"
        if self.fault == "answers 404" and self.call in (READ, LEASE, DOWN, UP):
            return "DeploymentNotFound"
        return "ClusterUnavailable" if isinstance(self.call.on, Match) else "QueueUnavailable"

    @property
    def drips(self) -> bool:
        return self.fault.startswith("drips")

    @property
    def budget_seconds(self) -> int:
        tries_on = self.ending in ("holds", "unknown", "scales") and "600" not in self.fault
        short = PROCESS_SECONDS if self.drips else SHORT_SECONDS
        return short if tries_on else LONG_SECONDS


def read_table(table: str, calls: tuple[Call, ...], passing: bool) -> Iterator[Cell]:
    header, *rows = table.strip().replace("\n    |", " |").splitlines()
    assert len(header.split()) == len(calls), header
    for row in rows:
        *endings, faults = row.split(maxsplit=len(calls))
        for fault in faults.split(" | "):
            answers = fault.removeprefix("answers ").split("/")
            each = [f"answers {answer}" for answer in answers] if len(answers) > 1 else [fault]
            for (call, ending), name in product(zip(calls, endings, strict=True), each):
                if ending != "-":
                    yield Cell(call, name, passing, ending)


MATRIX = [
    *read_table(API_SERVER_PASSING, CLUSTER_CALLS, passing=True),
    *read_table(API_SERVER_STAYING, CLUSTER_CALLS, passing=False),
    *read_table(FIRESTORE_PASSING, QUEUE_CALLS, passing=True),
    *read_table(FIRESTORE_STAYING, QUEUE_CALLS, passing=False),
    *read_table(NOBODY_THERE, (READ, WAITING), passing=False),
]

# --------------------------------------------------------------------------------- the faults

GARBAGE = kubernetes.body(b"<html>not what you asked for</html>")
CONFIG_MAPS = b'{"kind":"ConfigMapList","apiVersion":"v1","metadata":{},"items":[]}'
HTTP_FAULTS = {
    "never answers": kubernetes.hang(),
    "never answers, but acts": kubernetes.hang(applied=True),
    "resets before it acts": kubernetes.reset(),
    "resets after it has acted": kubernetes.reset(applied=True),
    "breaks off in mid-answer": kubernetes.cut(),
    "drips its answer": kubernetes.drip(0.2),
    "answers garbage": GARBAGE,
    "answers garbage and does nothing": replace(GARBAGE, applied=False),
    "answers nothing": kubernetes.body(b""),
    "answers another kind": kubernetes.body(CONFIG_MAPS),
    "answers 429, retry after 600": kubernetes.answer(429, {"Retry-After": "600"}),
    "answers 503, retry after 600": kubernetes.answer(503, {"Retry-After": "600"}),
    "answers 504, but acts": replace(kubernetes.answer(504), applied=True),
}
GRPC_FAULTS: Mapping[str, firestore.Behaviour] = {
    "never answers": firestore.Hang(),
    "answers FAILED_PRECONDITION": firestore.missing_index(PROJECT),
}
FIRST_FAULTS: Mapping[str, Callable[[ChaosProxy], None]] = {
    "refuses connections": lambda proxy: proxy.become("refuse"),
    "resets connections": lambda proxy: proxy.become("reset"),
    "drops all, from the first": lambda proxy: proxy.become("hang"),
    "drips, from the first": lambda proxy: proxy.become("drip", seconds=0.2),
    "is slow": lambda proxy: proxy.become("delay", seconds=0.2),
}
NETWORK_FAULTS: Mapping[str, Callable[[ChaosProxy], None]] = {
    "resets before the answer": lambda proxy: proxy.become("reset", after_bytes=0),
    "breaks off in mid-answer": lambda proxy: proxy.become(
        "reset", after_bytes=proxy.bytes_answered + 60
    ),
    "drips its answer": lambda proxy: proxy.become("drip", seconds=0.2),
    "drops all packets": lambda proxy: proxy.become("hang"),
    "goes away": lambda proxy: vanish(proxy),
}


def vanish(proxy: ChaosProxy) -> None:
    """What stands is reset, and nobody listens any more."""
    proxy.become("refuse")
    proxy.reset()


def pass_over(world: FaultyWorld, proxy: ChaosProxy) -> None:
    timer = threading.Timer(OUTAGE_SECONDS, lambda: proxy.become("pass"))
    timer.start()
    world.at_end.callback(timer.join)


def strike(world: FaultyWorld, call: Call, fault: str, times: int | None = None) -> None:
    """Let a call meet a fault, so many times, or always."""
    on = call.on
    if fault in FIRST_FAULTS:
        FIRST_FAULTS[fault](world.api if isinstance(on, Match) else world.front)
    elif isinstance(on, Match):
        strike_cluster(world, on, fault, times, call.nth)
    elif call.after_marking:
        world.cluster.hook(PATCH_POD, lambda _: strike_queue(world, on, fault, times), "after")
    else:
        strike_queue(world, on, fault, times)


def strike_cluster(world: FaultyWorld, on: Match, fault: str, times: int | None, nth: int) -> None:
    requests = itertools.count(1)

    def go_away(_: kubernetes.Request) -> None:
        if next(requests) != nth:
            return
        if times:
            pass_over(world, world.api)  # first: the run may be over as soon as the other is done
        vanish(world.api)

    if fault.startswith("goes away"):
        world.cluster.hook(on, go_away, "after", times=nth)
    behaviour = HTTP_FAULTS.get(fault.replace("goes away", "resets"))
    if behaviour is None:
        behaviour = kubernetes.answer(int(fault.removeprefix("answers ")))
    world.cluster.fault(on, behaviour, times, nth)


def strike_queue(world: FaultyWorld, on: On, fault: str, times: int | None) -> None:
    def misbehave(_: firestore.Call) -> None:
        if times:
            pass_over(world, world.front)
        NETWORK_FAULTS[fault](world.front)

    if fault in NETWORK_FAULTS:
        world.queue.hook(on, misbehave, times=times and 1)
    elif fault in GRPC_FAULTS:
        world.queue.fault(on, GRPC_FAULTS[fault], times)
    else:
        code = StatusCode[fault.removeprefix("answers ")]
        world.queue.fault(on, Fail(code, "as the test wants it"), times)


# ------------------------------------------------------------------------- what has to be true


def last_line(run: Run) -> str:
    """The last line of the log, which has to say what the record says."""
    record, line = run.record, run.stdout.splitlines()[-1]
    target = "/".join(filter(None, (record["namespace"], record["deployment"])))
    assert line.endswith(f" AutoScaler {target} {record['reason']}: {record['message']}"), run
    assert run.stderr == "", run
    return line


def check(world: FaultyWorld, run: Run, ending: str, budget_seconds: float) -> None:
    """What every ending has in common."""
    record, replicas, scales = run.record, world.replicas, world.cluster.scales
    last_line(run)
    assert "Traceback" not in run.stdout, run
    assert world.cluster.admin_token not in run.stdout + json.dumps(record), "a token was written"
    assert run.seconds <= budget_seconds + 2, run
    assert run.exit_code == {"holds": 1, "unknown": 1, "person": 2}.get(ending, 0), run
    assert len(scales) == (replicas != world.before), run
    assert replicas in (world.before, world.after), run
    assert world.busy_pod not in world.cluster.deleted_pods, run
    assert record["current"] in (None, world.before), run
    if ending == "unknown":
        assert (record["action"], record["replicas"]) == ("none", None), run
        assert "not known" in record["message"], run
    elif ending in ("holds", "person"):
        assert replicas == world.before, run
        assert (record["action"], record["replicas"]) == ("none", record["current"]), run
    else:
        up = world.after > world.before
        action = ("ScaledUp", "scale-up") if up else ("ScaledDown", "scale-down")
        assert (record["reason"], record["action"]) == action, run
        assert (record["replicas"], replicas) == (world.after, world.after), run
    sizes = [str(event["message"]).split(";")[0] for event in world.cluster.events()]
    about = {event["involvedObject"]["uid"] for event in world.cluster.events()}
    assert about <= {world.cluster.deployment("worker")["metadata"]["uid"]}, run
    assert sizes in ([], [f"New size: {world.after}"]), run
    assert ending in ("warns", "scales") or len(sizes) == (ending == "succeeds"), run
    assert ("no Event was written" in run.stdout) is (ending == "warns"), run


def play(index: int) -> None:
    """One run with the fault of a cell, which has to end as the cell says."""
    cell, call = MATRIX[index], MATRIX[index].call
    with call.world(cell.drips, TIMEOUT_SECONDS=str(cell.budget_seconds)) as world:
        strike(world, call, cell.fault, 2 if cell.passing else None)
        run: Run = world.run()
        reached = cell.fault in FIRST_FAULTS or call.made(world)
        assert reached, f"it did not get as far as the fault\n{run}"
        check(world, run, cell.ending, cell.budget_seconds)
        if cell.ending in ("holds", "person"):
            assert run.reason == cell.reason, run
            doing = {call.doing, READ.doing} if call is LEASE else {call.doing}  # it reads again
            message = run.record["message"]
            assert any(one in message for one in doing) or run.reason == "DeploymentNotFound"
        if cell.fault in ADVICE:
            assert ADVICE[cell.fault].format(on=call.on) in run.stdout, run
        if cell.fault.endswith("retry after 600"):
            assert run.record["durationSeconds"] < LONG_SECONDS / 2, run
        if not cell.passing:
            check_next_run(world)


def check_next_run(world: FaultyWorld) -> None:
    """Without the fault, the next minute brings what the last one could not; nothing twice."""
    world.cluster.clear_faults()
    world.queue.heal()
    for proxy in (world.api, world.front):
        proxy.become("pass")
        proxy.reset()
    world.process = False
    world.pass_time()
    run = world.run(TIMEOUT_SECONDS=str(LONG_SECONDS))
    last_line(run)
    assert run.exit_code == 0, run
    assert (world.replicas, run.record["replicas"]) == (world.after, world.after), run
    assert len(world.cluster.scales) == 1, run
    assert len(world.cluster.events()) <= 1, run
    assert world.busy_pod not in world.cluster.deleted_pods, run


@pytest.fixture(scope="module")
def endings(request: pytest.FixtureRequest) -> Iterator[Mapping[Cell, Future[None]]]:
    """The cells that were asked for, some of them always under way, as most of a cell is waiting.
    Each is played inside one of a few processes, which are started once."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    cells = [spec.params["cell"] for spec in asked if spec and "cell" in spec.params]
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        yield {cell: pool.submit(play, MATRIX.index(cell)) for cell in cells}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", MATRIX, ids=str)
@pytest.mark.slow
def test_a_fault(cell: Cell, endings: Mapping[Cell, Future[None]]) -> None:
    endings[cell].result()


# ----------------------------------------------------------- conflicts and unknown outcomes


def test_a_patch_whose_answer_is_lost_is_looked_up_and_not_sent_again() -> None:
    with scaling_up() as world:
        world.cluster.fault(PATCH, kubernetes.reset(applied=True), times=None)
        run = world.run()
        check(world, run, "succeeds", 45)
        assert len(world.cluster.calls(PATCH)) == 1
        assert len(world.cluster.calls(GET)) == 2


def test_a_lost_answer_and_then_another_writer_leave_one_rescale_of_ours() -> None:
    with scaling_up() as world:
        world.cluster.fault(PATCH, kubernetes.reset(applied=True))
        world.cluster.hook(PATCH, lambda _: world.cluster.scale("worker", 2), "after")
        run = world.run()
        last_line(run)
        assert run.reason == "ScaleUpCooldown", run
        assert (run.record["replicas"], world.replicas) == (2, 2), run
        assert [scale.manager for scale in world.cluster.scales] == ["queue-scaler", "kubectl"]


def test_a_late_patch_and_its_repetition_scale_once() -> None:
    """The API server takes its time: the patch is carried out after the run has looked."""
    with scaling_up() as world:
        late: list[Any] = []

        def carry_out(request: kubernetes.Request) -> None:
            if late:
                spec, annotations = late[0]["spec"], late[0]["metadata"]["annotations"]
                world.cluster.edit("deployments", "worker", lambda d: d["spec"].update(spec))
                world.cluster.annotate("worker", **annotations)
            late.append(request.body)

        world.cluster.fault(PATCH, kubernetes.answer(504))
        world.cluster.hook(PATCH, carry_out, times=2)
        run = world.run()
        check(world, run, "succeeds", 45)
        assert [call.status for call in world.cluster.calls(PATCH)] == [504, 409]


def test_a_short_retry_after_is_waited_for() -> None:
    with scaling_up() as world:
        asked: list[float] = []
        world.cluster.hook(PATCH, lambda _: asked.append(time.monotonic()), times=None)
        world.cluster.fault(PATCH, kubernetes.answer(429, {"Retry-After": "1"}))
        run = world.run()
        check(world, run, "succeeds", 45)
        assert asked[1] - asked[0] >= 1, run


def test_a_stream_that_breaks_after_some_documents_is_not_taken_for_the_whole() -> None:
    """Many jobs of one pod come first, the only job of another one is lost with the rest."""
    with scaling_down(JOBS_PER_POD="100") as world:
        first, last = (pod["metadata"]["name"] for pod in world.cluster.pods("worker")[1:])
        for number in range(40):
            job = {"status": "processing", "assignedPodId": first}
            world.queue.put(f"jobs/a-{number:03}", job)
        world.queue.put("jobs/z", {"status": "processing", "assignedPodId": last})
        world.queue.hook(
            "query",
            lambda _: world.front.become("reset", after_bytes=world.front.bytes_answered + 3000),
            times=1,
        )
        run = world.run(TIMEOUT_SECONDS=str(SHORT_SECONDS))
        last_line(run)
        assert world.replicas == 3, run
        assert run.reason in ("WorkersBusy", "QueueUnavailable"), run


# ----------------------------------------------------------------------- SIGTERM and crashes


def terminate(world: FaultyWorld, call: Call, times: int = 1, by: int = signal.SIGTERM) -> Run:
    """A run that gets the signal as soon as it has made this call so many times."""
    log = world.directory / "termination-log"
    process = world.start(log=log)
    while not call.made(world, times):
        assert process.poll() is None, "the run never got there"
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(by)
    stdout, stderr = process.communicate(timeout=30)
    seconds = time.monotonic() - begun
    return Run(process.returncode, stdout, stderr, json.loads(log.read_text()), seconds)


@pytest.mark.parametrize("call", [*CLUSTER_CALLS, *QUEUE_CALLS], ids=str)
@pytest.mark.slow
def test_sigterm_ends_a_run_immediately_and_is_no_error(call: Call) -> None:
    with call.world(process=True) as world:
        strike(world, call, "never answers")
        run = terminate(world, call)
        line = last_line(run)
        assert run.exit_code == 143 and run.seconds < 5, run
        assert " INFO AutoScaler" in line, run
        if call is EVENT:
            check_scaled(world, run)
        else:
            assert run.reason == "Interrupted" and f"ended by SIGTERM while {call.doing}" in line
            assert run.record["action"] == "none", run
            assert run.record["replicas"] == (None if call in (READ, DOWN, UP) else world.before)
            assert world.replicas == world.before, run


def check_scaled(world: FaultyWorld, run: Run) -> None:
    """What was done before the run was aborted is reported as it is."""
    assert run.record["action"] == ("scale-up" if world.after > world.before else "scale-down")
    assert run.record["replicas"] == world.replicas == world.after, run
    assert len(world.cluster.scales) == 1, run


@pytest.mark.slow
def test_sigint_ends_a_run_as_sigterm_does() -> None:
    with scaling_up(process=True) as world:
        strike(world, READ, "never answers")
        run = terminate(world, READ, by=signal.SIGINT)
        assert run.exit_code == 130 and "SIGINT while reading the Deployment" in last_line(run)


@pytest.mark.slow
def test_sigterm_after_a_patch_whose_answer_was_lost_claims_nothing() -> None:
    with scaling_up(process=True) as world:
        world.cluster.fault(PATCH, kubernetes.reset(applied=True))
        world.cluster.fault(GET, kubernetes.hang(), nth=2)
        run = terminate(world, READ, times=2)
        assert run.exit_code == 143 and "not known" in last_line(run), run
        assert (run.record["action"], run.record["replicas"]) == ("none", None), run


@pytest.mark.slow
def test_a_login_helper_that_hangs_is_ended_by_the_budget() -> None:
    with scaling_up(process=True, TIMEOUT_SECONDS="4") as world:
        kubeconfig = yaml.safe_load(Path(world.settings["KUBECONFIG"]).read_text())
        helper = {"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}
        user = {"exec": {**helper, "command": "sleep", "args": ["60"]}}
        kubeconfig["users"][0]["user"] = user
        path = world.directory / "with-login-helper"
        path.write_text(yaml.safe_dump(kubeconfig))
        run = world.run(KUBECONFIG=str(path))
        assert run.exit_code == 1 and run.seconds <= 6, run
        last = last_line(run)
        assert "out of time (TIMEOUT_SECONDS=4) while loading the Kubernetes client" in last


def crash(*_: object, **__: object) -> None:
    """What nobody expects."""
    raise ZeroDivisionError("made by the test")


BROKEN = {
    "the settings": (scaler, "read_settings"),
    "the decision": (scaler, "decide"),
    "the annotations": (scaler, "parse_state"),
    "Google's client": (JobsClient, "collection"),
    "the cluster's client": (ApiClient, "call_api"),
}


@pytest.mark.parametrize(("where", "name"), BROKEN.values(), ids=BROKEN)
def test_a_crash_before_the_patch_changes_nothing(
    where: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, crash)
    with scaling_down() as world:
        run = world.run()
        assert run.exit_code == 1, run
        assert "Traceback" in run.stdout and "internal error" in last_line(run), run
        assert "ZeroDivisionError: made by the test" in run.record["message"], run
        assert (run.record["action"], world.replicas) == ("none", 3), run
        assert world.cluster.scales == []


def test_a_crash_after_the_patch_still_reports_the_rescale(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the Event, which is the last thing that a run writes."""
    call_api = ApiClient.call_api

    def crash_at_the_event(client: ApiClient, method: str, *more: Any, **named: Any) -> Any:
        return (crash if method == "POST" else call_api)(client, method, *more, **named)

    monkeypatch.setattr(ApiClient, "call_api", crash_at_the_event)
    with scaling_down() as world:
        run = world.run()
        assert run.exit_code == 1 and "Traceback" in run.stdout, run
        check_scaled(world, run)


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_is_a_crash_like_any_other() -> None:
    with scaling_up(process=True) as world:
        (world.directory / "tenacity.py").write_text("raise RuntimeError('half installed')")
        run = world.run(PYTHONPATH=str(world.directory))
        assert run.exit_code == 1 and "half installed" in last_line(run), run
        assert world.replicas == 1


@pytest.mark.slow
def test_a_termination_log_that_hangs_does_not_hold_the_run_up() -> None:
    with scaling_up(process=True, TIMEOUT_SECONDS="4") as world:
        log = world.directory / "a-pipe-that-nobody-reads"
        os.mkfifo(log)
        begun = time.monotonic()
        process = world.start(log=log)
        stdout, _ = process.communicate(timeout=60)
        assert "ScaledUp" in stdout
        assert time.monotonic() - begun < 4 + 2 + 1


# ------------------------------------------------------------------------------ the fallback

UNREADABLE = Fail(StatusCode.UNKNOWN, "as the test wants it")


def failing_minutes(world: FaultyWorld, minutes: int) -> list[tuple[int, str, int | None]]:
    """Exit code, reason and replicas of one run a minute while the queue is unreadable."""
    ends = []
    for _ in range(minutes):
        run = world.run()
        last_line(run)
        ends.append((run.exit_code, run.reason, world.replicas))
        world.pass_time()
    return ends


def test_the_fallback_adds_pods_after_its_time_and_ends_when_the_queue_is_back() -> None:
    with scaling_up(FALLBACK_REPLICAS="2", FALLBACK_AFTER_SECONDS="180") as world:
        world.queue.fault("count", UNREADABLE)
        assert failing_minutes(world, 1) == [(1, "QueueUnavailable", 1)]
        assert world.annotations == {"queue-failing-since": "2026-01-01T00:00:00Z"}
        written = world.resource_version
        assert failing_minutes(world, 2) == [(1, "QueueUnavailable", 1)] * 2
        assert world.resource_version == written, "the time is written once"
        assert failing_minutes(world, 3) == [(1, "Fallback", 2)] * 3
        assert [(scale.before, scale.after) for scale in world.cluster.scales] == [(1, 2)]
        assert len(world.cluster.events()) == 1
        assert world.annotations["last-scale"] == "up 1->2"
        world.queue.heal()
        run = world.run()
        assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 3), run
        assert "queue-failing-since" not in world.annotations


def test_a_denied_queue_falls_back_too_and_still_says_what_to_do() -> None:
    with scaling_up(FALLBACK_REPLICAS="2", FALLBACK_AFTER_SECONDS="60") as world:
        world.queue.fault("count", Fail(StatusCode.PERMISSION_DENIED, "no"))
        assert failing_minutes(world, 2) == [(2, "Forbidden", 1), (2, "Fallback", 2)]

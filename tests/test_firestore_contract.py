"""What the scaler asks of Firestore, asked of the fake and of the official emulator alike, by
Google's own client; and what only the fake has: its records, and the proxy before it."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud.firestore import And, Client, FieldFilter, Or

from tests.conftest import Queue
from tests.support.firestore import FakeFirestore
from tests.support.proxy import ChaosProxy, Mode
from tests.support.world import PROJECT


@pytest.fixture
def db(any_queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", any_queue.host)
    with closing(Client(project=PROJECT)) as client:
        yield client


def found(query: Any) -> list[str]:
    return [snapshot.reference.path for snapshot in query.stream(retry=None, timeout=20)]


def ids(query: Any) -> list[str]:
    return sorted(found(query))


def count(query: Any) -> int:
    [[result]] = query.count().get(retry=None, timeout=20)
    return int(result.value)


def where(query: Any, *filters: tuple[str, str, object]) -> Any:
    for one in filters:
        query = query.where(filter=FieldFilter(*one))
    return query


# --- What both of them answer ------------------------------------------------------------------

DAY, SECOND = datetime(2026, 1, 1, tzinfo=UTC), timedelta(seconds=1)
# In Firestore's order, which goes by the type first.
MIXED: dict[str, object] = {
    "null": None, "true": True, "minus": -1, "one": 1, "one-as-float": 1.0,
    "big-float": float(2**53), "big": 2**53 + 1, "day": DAY, "second": DAY + SECOND,
    "2026": "2026-01-01T00:00:00Z", "a": "a", "b": "b", "bytes": b"x", "fast": "lanes/fast",
    "slow": "lanes/slow", "list": [1, 2], "longer": [1, 2, 0], "map": {"a": 1},
}  # fmt: skip
REFERENCES = ("fast", "slow")
NO_NULL = list(MIXED)[1:]
ONES = ["one", "one-as-float"]
PODS = [f"pod-{number:02}" for number in range(31)]

FILTERS: list[tuple[str, object, list[str]]] = [
    ("==", 1, ONES),
    ("==", 2**53, ["big-float"]),
    ("==", "a", ["a"]),
    ("==", "1", []),
    ("==", True, ["true"]),
    ("==", DAY, ["day"]),
    ("==", [1, 2], ["list"]),
    ("==", {"a": 1}, ["map"]),
    ("==", {"timestampValue": "2026-01-01T00:00:00Z"}, []),
    ("!=", 1, [name for name in NO_NULL if name not in ONES]),
    ("!=", "a", [name for name in NO_NULL if name != "a"]),
    ("!=", DAY, [name for name in NO_NULL if name != "day"]),
    (">", 1, ["big", "big-float"]),
    (">", "a", ["b"]),
    (">=", "a", ["a", "b"]),
    ("<", 1, ["minus"]),
    ("<=", 1, ["minus", *ONES]),
    ("<", DAY + SECOND, ["day"]),
    ("<=", DAY + SECOND, ["day", "second"]),
    (">", DAY, ["second"]),
    ("<=", "2026-01-01T00:00:00Z", ["2026"]),
    ("in", [1, "a"], ["a", *ONES]),
    ("in", [1, 1, 1], ONES),
    ("in", [DAY, [1, 2]], ["day", "list"]),
]
REFUSED: list[list[tuple[str, str, object]]] = [
    [("v", "in", [])],
    [("v", "in", PODS)],
    [("v", "in", PODS[:6]), ("w", "in", PODS[:6])],
]


def test_a_filter_finds_what_it_should_or_is_refused(any_queue: Queue, db: Client) -> None:
    """One document for each kind of value in `v`, and one without the field."""
    for name, value in MIXED.items():
        value = db.document(str(value)) if name in REFERENCES else value
        any_queue.put(f"mixed/{name}", {"v": value})
    any_queue.put("mixed/missing", {"w": 1})
    mixed, fast, slow = db.collection("mixed"), *(db.document(f"lanes/{x}") for x in REFERENCES)
    references: list[tuple[str, object, list[str]]] = [
        ("==", fast, ["fast"]),
        (">", fast, ["slow"]),
        ("in", [slow, 1], ["slow", *ONES]),
    ]
    for operator, value, expected in FILTERS + references:
        query = where(mixed, ("v", operator, value))
        names = [path.removeprefix("mixed/") for path in ids(query)]
        assert names == sorted(expected), (operator, value)
        assert count(query) == len(expected), (operator, value)
    for filters in REFUSED:
        for ask in (ids, count):
            with pytest.raises(exceptions.InvalidArgument):
                ask(where(mixed, *filters))
    assert found(mixed.order_by("v")) == [f"mixed/{name}" for name in MIXED]


def test_filters_limits_lists_and_collections_combine(any_queue: Queue, db: Client) -> None:
    for number, pod in enumerate(PODS):
        any_queue.put(f"jobs/{pod}", {"status": "busy" if number % 2 else "done", "pod": pod})
    jobs, busy = db.collection("jobs"), ("status", "==", "busy")
    assert (count(jobs), count(where(jobs, busy)), count(db.collection("none"))) == (31, 15, 0)
    assert [count(jobs.limit(most)) for most in (0, 5, 31, 100)] == [0, 5, 31, 31]
    assert count(where(jobs, busy, ("pod", "in", PODS[:30]))) == 15
    assert ids(where(jobs, busy, ("pod", ">", "pod-27"))) == ["jobs/pod-29"]
    assert count(where(jobs, busy, ("status", "==", "done"))) == 0
    any_queue.put("tenants/a/jobs/2", {"status": "busy", "deep": {"pod": "p-1", "a b": 1}})
    tenants = db.collection("tenants/a/jobs")
    assert (count(jobs), count(db.collection("tenants"))) == (31, 0)
    assert ids(tenants) == ids(where(tenants, ("deep.`a b`", "==", 1))) == ["tenants/a/jobs/2"]
    selected = [one.to_dict() for one in tenants.select(["deep.pod", "x"]).stream()]
    assert selected == [{"deep": {"pod": "p-1"}}]


WAITING, LATE = FieldFilter("status", "==", "waiting"), FieldFilter("until", "<", DAY)
LOST = And([FieldFilter("status", "==", "busy"), LATE])


@pytest.fixture
def leases(any_queue: Queue, db: Client) -> Any:
    """A waiting job, one that also has a lease that has expired, and two busy ones."""
    jobs: dict[str, dict[str, object]] = {
        "waiting": {"status": "waiting", "since": DAY},
        "both": {"status": "waiting", "since": DAY - SECOND, "until": DAY - SECOND},
        "lost": {"status": "busy", "until": DAY - SECOND, "pod": PODS[0], "since": DAY + SECOND},
        "busy": {"status": "busy", "until": DAY + SECOND, "pod": PODS[1]},
    }
    for name, fields in jobs.items():
        any_queue.put(f"jobs/{name}", fields)
    return db.collection("jobs")


def test_a_job_that_meets_two_alternatives_is_one_job(leases: Any) -> None:
    either = leases.where(filter=Or([WAITING, FieldFilter("until", "==", DAY - SECOND)]))
    assert ids(either) == ["jobs/both", "jobs/lost", "jobs/waiting"]
    assert (count(either), count(either.limit(2))) == (3, 2)
    assert ids(leases.where(filter=Or([And([WAITING])]))) == ["jobs/both", "jobs/waiting"]
    assert ids(where(leases, ("pod", "in", PODS[:15])).where(filter=LOST)) == ["jobs/lost"]


def test_an_inequality_asks_the_other_alternatives_for_its_field_too(leases: Any) -> None:
    for other in (LATE, LOST, FieldFilter("until", "!=", DAY + SECOND)):
        either = leases.where(filter=Or([And([WAITING]), other]))
        assert ids(either) == ["jobs/both", "jobs/lost"], "without jobs/waiting"
        assert count(either) == 2
        assert count(either.where(filter=WAITING)) == 1


def test_lists_and_alternatives_share_the_limit(leases: Any) -> None:
    lists = Or([FieldFilter("pod", "in", PODS[:20]), FieldFilter("status", "in", PODS[:10])])
    assert count(leases.where(filter=lists)) == 2
    lists.filters.append(LATE)
    for query in (
        leases.where(filter=lists),
        where(leases.where(filter=Or([WAITING, LOST])), ("pod", "in", PODS[:16])),
    ):
        with pytest.raises(exceptions.InvalidArgument):
            count(query)


def test_an_order_leaves_out_jobs_without_the_field(leases: Any) -> None:
    assert found(leases.order_by("since")) == ["jobs/both", "jobs/waiting", "jobs/lost"]
    for filters, first in ((WAITING, "both"), (LOST, "lost"), (Or([WAITING, LOST]), "both")):
        query = leases.where(filter=filters).order_by("since").limit(1).select(["since"])
        [job] = query.stream()
        assert (job.id, list(job.to_dict())) == (first, ["since"])
    exists = leases.order_by("until").limit(1).select([])
    assert [job.to_dict() for job in exists.stream()] == [{}]
    assert found(leases.order_by("since.deep").limit(1).select([])) == []


# --- The fake alone -----------------------------------------------------------------------------


fake_alone = pytest.mark.parametrize("any_queue", ["fake"], indirect=True)


@fake_alone
def test_calls_are_recorded_with_what_firestore_bills(queue: FakeFirestore, db: Client) -> None:
    queue.fill(2_500)
    jobs = db.collection("jobs")
    for ask in (count, lambda query: count(query.limit(1_000)), lambda q: ids(q.limit(7))):
        ask(where(jobs, ("status", "==", "waiting")))
    count(db.collection("nothing"))
    ids(jobs.select(["pod"]).limit(2))
    assert [call.reads_billed for call in queue.calls] == [3, 1, 7, 1, 2]
    first, last = queue.calls[1], queue.calls[-1]
    assert (first.filters, first.limit) == ((("status", "==", "waiting"),), 1_000)
    assert (first.kind, last.kind, last.select) == ("count", "query", ("pod",))
    lane = db.document("lanes/fast")
    ids(where(db.collection("tenants/a/jobs").order_by("at"), ("lane", "==", lane)))
    last = queue.calls[-1]
    assert (last.collection, last.order_by) == ("tenants/a/jobs", ("at",))
    [(_, _, asked)] = last.filters
    assert asked.path == lane.path


@fake_alone
def test_what_the_fake_does_not_have_it_refuses(db: Client) -> None:
    jobs = db.collection("jobs")
    for query in (
        jobs.order_by("v", direction="DESCENDING"),
        jobs.offset(1),
        db.collection_group("jobs"),
        where(jobs, ("v", "not-in", [1])),
        where(jobs, ("v", "==", None)),
        where(jobs, ("v", "array_contains", 1)),
    ):
        with pytest.raises(exceptions.MethodNotImplemented):
            ids(query)
    other = Client(project=PROJECT, database="elsewhere")
    with closing(other), pytest.raises(exceptions.NotFound, match="elsewhere does not exist"):
        count(other.collection("jobs"))


# --- The proxy ---------------------------------------------------------------------------------


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(OSError):
            while data := self.request.recv(65_536):
                self.request.sendall(data)


def said(proxy: ChaosProxy) -> str:
    """What comes back of a word that is sent through, or how that ends."""
    name, _, port = proxy.host.rpartition(":")
    try:
        with socket.create_connection((name, int(port)), timeout=0.4) as line:
            line.sendall(b"hello")
            return line.makefile("rb").read(5).decode()
    except OSError as error:
        return type(error).__name__


@pytest.mark.parametrize(
    ("mode", "more", "expected", "answered"),
    [
        ("refuse", {}, "ConnectionRefusedError", 0),
        ("hang", {}, "TimeoutError", 0),
        ("reset", {}, "ConnectionResetError", 0),
        ("reset", {"after_bytes": 3}, "ConnectionResetError", 3),
        ("drip", {"seconds": 0.05}, "hello", 5),
        ("delay", {"seconds": 0.2}, "hello", 5),
    ],
)
def test_the_proxy_does_as_told(
    mode: Mode, more: dict[str, Any], expected: str, answered: int
) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ChaosProxy(f"127.0.0.1:{server.server_address[1]}") as proxy:
            proxy.become(mode, **more)
            begun = time.monotonic()
            assert (said(proxy), proxy.bytes_answered) == (expected, answered)
            waits = answered if mode == "drip" else 1
            assert time.monotonic() - begun >= waits * more.get("seconds", 0)
            proxy.become("pass")
            assert said(proxy) == "hello"
        server.shutdown()

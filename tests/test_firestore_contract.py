"""What a client may rely on, asked of the fake and of the official emulator alike.

Everything goes through Google's own client. The second part is about what only the fake has:
its records, its faults and the proxy.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud import firestore
from google.cloud.firestore_v1.base_query import And, BaseCompositeFilter, FieldFilter, Or
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import (
    Call,
    CountAs,
    EmptyStream,
    Fail,
    FakeFirestore,
    Hang,
    On,
    Slow,
    missing_index,
)
from tests.support.proxy import ChaosProxy, Mode
from tests.support.world import PROJECT

pytestmark = pytest.mark.slow

Query = firestore.Query | firestore.CollectionReference
ClientFor = Callable[..., firestore.Client]

NAN = math.nan
DAY = datetime(2026, 1, 1, tzinfo=UTC)
WAITING = FieldFilter("status", "==", "waiting")


@dataclass(frozen=True)
class Server:
    name: str
    host: str


@pytest.fixture(params=["fake", "emulator"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each of the two, empty."""
    if request.param == "emulator":
        yield Server("emulator", request.getfixturevalue("emulator").host)
        return
    with FakeFirestore(other_databases=["second"]) as fake:
        yield Server("fake", fake.host)


@pytest.fixture
def client_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientFor]:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", server.host)
    with ExitStack() as clients:

        def make(project: str = PROJECT, database: str = "(default)") -> firestore.Client:
            client = firestore.Client(project=project, database=database)
            return clients.enter_context(closing(client))

        yield make


@pytest.fixture
def db(client_for: ClientFor) -> firestore.Client:
    return client_for()


def ids(query: Query) -> list[str]:
    return [snapshot.id for snapshot in query.stream(retry=None, timeout=20)]


def count(query: Any, timeout: float = 20) -> int:
    [[result]] = query.count().get(retry=None, timeout=timeout)
    return int(result.value)


def where(collection: Query, *filters: FieldFilter | BaseCompositeFilter) -> Query:
    for item in filters:
        collection = collection.where(filter=item)
    return collection


def fill(db: firestore.Client, collection: str, n: int, status: str = "waiting") -> None:
    for start in range(0, n, 500):
        batch = db.batch()
        for number in range(start, min(n, start + 500)):
            batch.set(db.document(f"{collection}/{status}-{number:05}"), {"status": status})
        batch.commit()


# --- Counting --------------------------------------------------------------------------------


def test_a_missing_collection_counts_0(db: firestore.Client) -> None:
    assert count(db.collection("jobs")) == 0
    assert ids(db.collection("jobs")) == []


def test_a_count_counts_what_the_filters_leave(db: firestore.Client) -> None:
    fill(db, "jobs", 7)
    fill(db, "jobs", 3, "done")
    fill(db, "other", 4)
    jobs = db.collection("jobs")

    assert count(jobs) == 10
    assert count(where(jobs, WAITING)) == 7
    assert count(where(jobs, FieldFilter("status", "in", ["waiting", "done"]))) == 10
    assert count(where(jobs, WAITING, FieldFilter("status", "==", "done"))) == 0


def test_a_limit_caps_a_count_and_an_offset_skips(db: firestore.Client) -> None:
    fill(db, "jobs", 12)
    jobs = where(db.collection("jobs"), WAITING)

    assert count(jobs.limit(5)) == 5
    assert count(jobs.limit(12)) == 12
    assert count(jobs.limit(100)) == 12
    assert count(jobs.limit(0)) == 0
    assert count(jobs.offset(10)) == 2
    assert count(jobs.offset(5).limit(10)) == 7
    assert count(jobs.offset(50)) == 0


def test_up_to_caps_a_count_too(db: firestore.Client) -> None:
    fill(db, "jobs", 12)

    def capped(up_to: int, limit: int | None = None) -> int:
        query: dict[str, object] = {"from_": [{"collection_id": "jobs"}]}
        if limit is not None:
            query["limit"] = limit
        parent = f"projects/{db.project}/databases/(default)/documents"
        aggregation = {"alias": "n", "count": {"up_to": up_to}}
        asked = {"structured_query": query, "aggregations": [aggregation]}
        request = {"parent": parent, "structured_aggregation_query": asked}
        [answer] = db._firestore_api.run_aggregation_query(request=request, retry=None)
        return int(answer.result.aggregate_fields["n"].integer_value)

    assert [capped(0), capped(5), capped(12), capped(100)] == [0, 5, 12, 12]
    assert [capped(10, limit=3), capped(3, limit=10)] == [3, 3]
    with pytest.raises(exceptions.InvalidArgument, match="up_to"):
        capped(-1)


def test_a_count_leaves_out_documents_without_the_field_it_is_sorted_by(
    db: firestore.Client,
) -> None:
    fill(db, "jobs", 3)
    db.document("jobs/ranked").set({"rank": 1})

    assert count(db.collection("jobs").order_by("rank")) == 1


def test_several_counts_come_in_one_answer(db: firestore.Client) -> None:
    fill(db, "jobs", 3)
    jobs: Any = db.collection("jobs")
    query = jobs.count(alias="a").count(alias="b")

    assert {result.alias: result.value for result in query.get()[0]} == {"a": 3, "b": 3}
    with pytest.raises(exceptions.InvalidArgument, match="duplicate alias"):
        query.count(alias="a").get()


def test_thousands_of_documents_are_counted(server: Server, db: firestore.Client) -> None:
    n = 20_000 if server.name == "fake" else 3_000
    fill(db, "jobs", n)

    assert count(where(db.collection("jobs"), WAITING)) == n
    assert count(where(db.collection("jobs"), WAITING).limit(1_000)) == 1_000


# --- Filters ---------------------------------------------------------------------------------

MIXED: dict[str, object] = {
    "null": None, "false": False, "true": True, "nan": NAN, "minus": -1, "one": 1,
    "one-as-float": 1.0, "big-float": float(2**53), "big": 2**53 + 1, "day": DAY,
    "a": "a", "b": "b", "bytes": b"x", "place": firestore.GeoPoint(1, 2), "empty-list": [],
    "list": [1, 2], "empty-map": {}, "map": {"a": 1},
}  # fmt: skip
IN_ORDER = list(MIXED)  # the values above stand in Firestore's order
NO_NULL = IN_ORDER[1:]

OPERATORS: list[tuple[str, object, list[str]]] = [
    ("==", None, ["null"]),
    ("==", NAN, ["nan"]),
    ("==", True, ["true"]),
    ("==", 1, ["one", "one-as-float"]),
    ("==", 1.0, ["one", "one-as-float"]),
    ("==", 2**53, ["big-float"]),
    ("==", "a", ["a"]),
    ("==", "1", []),
    ("==", b"x", ["bytes"]),
    ("==", DAY, ["day"]),
    ("==", firestore.GeoPoint(1, 2), ["place"]),
    ("==", [1, 2], ["list"]),
    ("==", [2, 1], []),
    ("==", {"a": 1}, ["map"]),
    ("!=", None, NO_NULL),
    ("!=", NAN, [name for name in NO_NULL if name != "nan"]),
    ("!=", 1, [name for name in NO_NULL if not name.startswith("one")]),
    ("!=", "a", [name for name in NO_NULL if name != "a"]),
    ("<", 1, ["minus"]),
    ("<=", 1, ["minus", "one", "one-as-float"]),
    (">", 1, ["big-float", "big"]),
    (">=", 1.0, ["one", "one-as-float", "big-float", "big"]),
    ("<", True, ["false"]),
    (">=", True, ["true"]),
    ("<", "b", ["a"]),
    (">", "a", ["b"]),
    ("<=", DAY, ["day"]),
    ("<", DAY, []),
    (">", b"", ["bytes"]),
    ("<", [1, 2], ["empty-list"]),
    (">", {}, ["map"]),
    ("in", [1, "a"], ["a", "one", "one-as-float"]),
    ("in", [None, NAN, True], ["true"]),
    ("in", [[1, 2]], ["list"]),
    ("in", [1, 1, 1], ["one", "one-as-float"]),
    ("not-in", [1, "a"], [n for n in NO_NULL if n != "a" and not n.startswith("one")]),
    ("not-in", [1, None], []),
    ("array_contains", 1, ["list"]),
    ("array_contains", 3, []),
    ("array_contains_any", [2, 7], ["list"]),
]


@pytest.fixture
def mixed(db: firestore.Client) -> firestore.CollectionReference:
    """One document for each kind of value in `v`, and one without the field."""
    collection = db.collection("mixed")
    batch = db.batch()
    for name, value in MIXED.items():
        batch.set(collection.document(name), {"v": value})
    batch.set(collection.document("missing"), {"w": 1})
    batch.commit()
    return collection


@pytest.mark.parametrize(
    ("operator", "value", "expected"), OPERATORS, ids=[f"{o} {v!r}" for o, v, _ in OPERATORS]
)
def test_a_filter_finds(
    mixed: firestore.CollectionReference, operator: str, value: object, expected: list[str]
) -> None:
    query = where(mixed, FieldFilter("v", operator, value))

    assert ids(query) == expected
    assert count(query) == len(expected)


def test_documents_are_sorted_by_type_and_value(mixed: firestore.CollectionReference) -> None:
    assert ids(mixed.order_by("v")) == IN_ORDER
    descending = mixed.order_by("v", direction=firestore.Query.DESCENDING)
    assert ids(descending) == list(reversed(IN_ORDER))
    assert ids(descending.limit(2)) == ["map", "empty-map"]
    assert ids(mixed.order_by("v").offset(3).limit(2)) == ["nan", "minus"]


def test_without_an_order_documents_are_sorted_by_name(
    mixed: firestore.CollectionReference,
) -> None:
    everything = sorted([*MIXED, "missing"])

    assert ids(mixed) == everything
    assert ids(mixed.order_by("__name__")) == everything
    assert ids(mixed.limit(3)) == everything[:3]


def test_and_or_combine(db: firestore.Client) -> None:
    jobs = db.collection("jobs")
    rows = {"a": (5, 0), "b": (5, 1), "c": (0, 1), "d": (9, 1), "e": (7, 2)}
    for name, (v, w) in rows.items():
        jobs.document(name).set({"v": v, "w": w})
    five, nine = FieldFilter("v", "==", 5), FieldFilter("v", "==", 9)
    one = FieldFilter("w", "==", 1)

    assert ids(where(jobs, five, one)) == ["b"]
    assert ids(where(jobs, Or([five, nine]))) == ["a", "b", "d"]
    assert ids(where(jobs, And([one, Or([five, nine])]))) == ["b", "d"]
    assert ids(where(jobs, Or([FieldFilter("v", ">", 6), one]))) == ["c", "b", "e", "d"]
    assert count(where(jobs, Or([five, nine]), one)) == 2
    by_rank = where(jobs, FieldFilter("v", ">", 0)).order_by("v", direction="DESCENDING")
    assert ids(by_rank) == ["d", "e", "b", "a"]


def test_an_order_by_an_inequality_leaves_out_documents_without_the_field(
    db: firestore.Client,
) -> None:
    jobs = db.collection("jobs")
    jobs.document("with").set({"v": 1, "w": 1})
    jobs.document("without").set({"w": 1})

    either = Or([FieldFilter("v", ">", 0), FieldFilter("w", "==", 1)])

    assert ids(where(jobs, either)) == ["with"]


def test_inequalities_on_two_fields_work(db: firestore.Client) -> None:
    jobs = db.collection("jobs")
    for name, v, w in (("a", 1, 9), ("b", 2, 5), ("c", 3, 1)):
        jobs.document(name).set({"v": v, "w": w})

    assert ids(where(jobs, FieldFilter("v", ">", 1), FieldFilter("w", ">", 1))) == ["b"]


def test_nested_fields_and_odd_names_are_found(db: firestore.Client) -> None:
    db.document("jobs/1").set({"worker": {"pod": "p-1"}, "a b": 1, "`": 2})
    jobs = db.collection("jobs")

    assert ids(where(jobs, FieldFilter("worker.pod", "==", "p-1"))) == ["1"]
    assert ids(where(jobs, FieldFilter("worker.pod.deeper", "==", "p-1"))) == []
    assert ids(where(jobs, FieldFilter("`a b`", "==", 1))) == ["1"]
    assert ids(where(jobs, FieldFilter(r"`\``", "==", 2))) == ["1"]


def test_in_takes_30_values_and_not_31(db: firestore.Client) -> None:
    jobs = db.collection("jobs")
    for number in range(40):
        jobs.document(f"{number:02}").set({"pod": f"pod-{number}", "status": "busy"})
    busy = where(jobs, FieldFilter("status", "==", "busy"))

    def on(n: int) -> Query:
        return where(busy, FieldFilter("pod", "in", [f"pod-{i}" for i in range(n)]))

    assert count(on(30)) == 30
    assert ids(on(30)) == [f"{number:02}" for number in range(30)]
    with pytest.raises(exceptions.InvalidArgument, match="30"):
        count(on(31))
    with pytest.raises(exceptions.InvalidArgument, match="30"):
        ids(on(31))


def f(field: str, operator: str, value: object) -> FieldFilter:
    return FieldFilter(field, operator, value)


REFUSED: dict[str, list[FieldFilter | BaseCompositeFilter]] = {
    "in nothing": [f("v", "in", [])],
    "not in nothing": [f("v", "not-in", [])],
    "in what is not a list": [f("v", "in", 1)],
    "not-in of 11": [f("v", "not-in", list(range(11)))],
    "array-contains-any of 31": [f("v", "array_contains_any", list(range(31)))],
    "two !=": [f("v", "!=", 1), f("w", "!=", 1)],
    "!= and not-in": [f("v", "!=", 1), f("v", "not-in", [2])],
    "not-in and in": [f("v", "not-in", [1]), f("w", "in", [2])],
    "not-in in an or": [Or([f("v", "not-in", [1]), f("w", "==", 1)])],
    "array-contains twice": [f("v", "array_contains", 1), f("v", "array_contains", 2)],
    "an or of 31": [Or([f("v", "==", i) for i in range(31)])],
    "in times in": [f("v", "in", list(range(6))), f("w", "in", list(range(6)))],
    "reserved field": [f("__v__", "==", 1)],
    "a name that is not a reference": [f("__name__", "==", "jobs/1")],
    "a name that is null": [f("__name__", "==", None)],
    "a name as a list": [f("__name__", "array_contains", 1)],
}


@pytest.mark.parametrize("filters", REFUSED.values(), ids=REFUSED)
def test_a_filter_is_refused(
    db: firestore.Client, filters: list[FieldFilter | BaseCompositeFilter]
) -> None:
    db.document("jobs/1").set({"v": 1})
    query = where(db.collection("jobs"), *filters)

    with pytest.raises(exceptions.InvalidArgument):
        ids(query)
    with pytest.raises(exceptions.InvalidArgument):
        count(query)


ODD_QUERIES: dict[str, Callable[[firestore.CollectionReference], Query]] = {
    "negative limit": lambda jobs: jobs.limit(-1),
    "negative offset": lambda jobs: jobs.offset(-1),
    "sorted twice by a field": lambda jobs: jobs.order_by("v").order_by("v"),
}


@pytest.mark.parametrize("change", ODD_QUERIES.values(), ids=ODD_QUERIES)
def test_a_query_is_refused(
    db: firestore.Client, change: Callable[[firestore.CollectionReference], Query]
) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        ids(change(db.collection("jobs")))


def test_a_reserved_collection_is_refused(db: firestore.Client) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="reserved"):
        count(db.collection("__jobs__"))


def test_by_name(db: firestore.Client) -> None:
    jobs = db.collection("jobs")
    for name in ("a", "b", "c"):
        jobs.document(name).set({"v": 1})
    names = {name: jobs.document(name) for name in ("a", "b", "c")}

    assert ids(where(jobs, f("__name__", "==", names["b"]))) == ["b"]
    assert ids(where(jobs, f("__name__", "in", [names["c"], names["a"]]))) == ["a", "c"]
    assert ids(where(jobs, f("__name__", ">", names["a"]))) == ["b", "c"]
    assert ids(where(jobs, f("__name__", "!=", names["a"]))) == ["b", "c"]
    assert count(where(jobs, f("__name__", "<=", names["b"]))) == 2
    with pytest.raises(exceptions.FailedPrecondition):
        ids(jobs.order_by("__name__", direction=firestore.Query.DESCENDING))


# --- Where documents lie ---------------------------------------------------------------------


def test_nested_collections_and_groups(db: firestore.Client) -> None:
    for path in ("jobs/1", "tenants/a/jobs/2", "tenants/b/jobs/3", "tenants/a/jobs/2/jobs/4"):
        db.document(path).set({"status": "waiting"})
    db.document("tenants/a/jobsite/5").set({"status": "waiting"})
    db.document("tenants/b/jobs/6").set({"status": "done"})
    group = db.collection_group("jobs")

    assert ids(db.collection("tenants/a/jobs")) == ["2"]
    assert ids(db.collection("tenants/a/jobs/2/jobs")) == ["4"]
    assert count(db.collection("jobs")) == 1
    assert count(db.collection("tenants")) == 0, "a document of which only children exist"
    assert [s.reference.path for s in group.stream()] == [
        "jobs/1",
        "tenants/a/jobs/2",
        "tenants/a/jobs/2/jobs/4",
        "tenants/b/jobs/3",
        "tenants/b/jobs/6",
    ]
    assert count(where(group, WAITING)) == 4
    assert count(where(group, WAITING).limit(2)) == 2
    assert ids(where(group, f("__name__", "==", db.document("tenants/a/jobs/2")))) == ["2"]


def test_ids_are_sorted_by_their_bytes(db: firestore.Client) -> None:
    in_order = ["10", "9", "B", "_", "a", "a b", "é", "\uffee", "😀"]
    for name in reversed(in_order):
        db.collection("jobs").document(name).set({})

    assert ids(db.collection("jobs")) == in_order
    assert db.document("jobs/a b").get().exists
    assert count(db.collection("jobs")) == len(in_order)


@pytest.mark.parametrize("name", [".", "..", "__job__", "x" * 1501], ids=lambda name: name[:8])
def test_an_id_is_refused(db: firestore.Client, name: str) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        db.collection("jobs").document(name).set({})


def test_projects_and_databases_are_apart(client_for: ClientFor) -> None:
    here, project, database = (
        client_for(),
        client_for(project="another-project"),
        client_for(database="second"),
    )
    here.document("jobs/1").set({})

    assert [count(db.collection("jobs")) for db in (here, project, database)] == [1, 0, 0]


# --- Reading ---------------------------------------------------------------------------------


def test_select_brings_only_what_was_asked_for(db: firestore.Client) -> None:
    db.document("jobs/1").set({"pod": "p-1", "payload": "x" * 1000, "deep": {"a": 1, "b": 2}})
    jobs = db.collection("jobs")

    def selected(*fields: str) -> list[dict[str, object] | None]:
        return [snapshot.to_dict() for snapshot in jobs.select(fields).stream()]

    assert selected("pod") == [{"pod": "p-1"}]
    assert selected("deep.b") == [{"deep": {"b": 2}}]
    assert selected("nothing") == [{}]
    assert selected() == [{}]
    assert selected("__name__") == [{}]


def test_every_kind_of_value_comes_back_as_it_went(db: firestore.Client) -> None:
    values = {**MIXED, "reference": db.document("jobs/2"), "deep": {"list": [{"a": [1]}]}}
    del values["nan"]
    db.document("jobs/1").set(values)

    assert db.document("jobs/1").get().to_dict() == values


def test_documents_are_got_by_name(db: firestore.Client) -> None:
    db.document("jobs/1").set({"v": 1, "w": 2})
    asked = [db.document("jobs/1"), db.document("jobs/2"), db.document("jobs/1")]

    found = {snapshot.id: snapshot.to_dict() for snapshot in db.get_all(asked)}

    assert found == {"1": {"v": 1, "w": 2}, "2": None}
    assert db.document("jobs/1").get(field_paths=["w"]).to_dict() == {"w": 2}
    assert not db.document("jobs/2").get().exists


# --- Writing ---------------------------------------------------------------------------------


def test_set_update_merge_and_delete(db: firestore.Client) -> None:
    job = db.document("jobs/1")

    def now() -> dict[str, object] | None:
        return job.get().to_dict()

    job.set({"a": 1, "b": {"c": 2}})
    job.update({"a": 3, "b.d": 4})
    assert now() == {"a": 3, "b": {"c": 2, "d": 4}}
    job.update({"b.c": firestore.DELETE_FIELD, "x.y": firestore.DELETE_FIELD})
    assert now() == {"a": 3, "b": {"d": 4}}
    job.set({"b": {"e": 5}}, merge=True)
    assert now() == {"a": 3, "b": {"d": 4, "e": 5}}
    job.update({"a.deep": 1})
    assert now() == {"a": {"deep": 1}, "b": {"d": 4, "e": 5}}
    job.set({"only": True})
    assert now() == {"only": True}
    job.delete()
    job.delete()
    assert now() is None


def test_transforms(db: firestore.Client) -> None:
    job = db.document("jobs/1")
    job.set({"n": 1, "f": 1.5, "text": "x", "big": 2**63 - 1, "list": [1, 2], "max": 3})
    job.update(
        {
            "n": firestore.Increment(2),
            "f": firestore.Increment(1),
            "text": firestore.Increment(2),
            "big": firestore.Increment(5),
            "new": firestore.Increment(7),
            "list": firestore.ArrayUnion([2, 3, 3]),
            "max": firestore.Maximum(9),
            "at": firestore.SERVER_TIMESTAMP,
        }
    )
    found = job.get().to_dict() or {}
    at = found.pop("at")

    assert abs(at.timestamp() - time.time()) < 60
    assert found == {
        "n": 3, "f": 2.5, "text": 2, "big": 2**63 - 1, "new": 7, "list": [1, 2, 3], "max": 9,
    }  # fmt: skip
    job.update({"list": firestore.ArrayRemove([1, 3]), "max": firestore.Minimum(4)})
    assert (job.get().get("list"), job.get().get("max")) == ([2], 4)


def test_preconditions(db: firestore.Client) -> None:
    job, missing = db.document("jobs/1"), db.document("jobs/2")
    written = job.create({"v": 1}).update_time
    earlier = db.write_option(last_update_time=DAY)

    with pytest.raises(exceptions.AlreadyExists):
        job.create({"v": 2})
    with pytest.raises(exceptions.NotFound):
        missing.update({"v": 2})
    with pytest.raises(exceptions.NotFound):
        missing.delete(option=db.write_option(exists=True))
    with pytest.raises(exceptions.FailedPrecondition):
        job.update({"v": 2}, option=earlier)
    with pytest.raises(exceptions.FailedPrecondition):
        job.delete(option=earlier)
    with pytest.raises(exceptions.FailedPrecondition):
        missing.delete(option=earlier)
    assert job.get().to_dict() == {"v": 1}
    job.update({"v": 2}, option=db.write_option(last_update_time=written))
    assert job.get().to_dict() == {"v": 2}


def test_the_update_time_moves_only_with_the_content(db: firestore.Client) -> None:
    job = db.document("jobs/1")
    first = job.set({"v": 1}).update_time

    assert job.set({"v": 1}).update_time == first
    assert job.set({"v": 2}).update_time > first
    snapshot = job.get()
    assert snapshot.create_time == first
    assert snapshot.update_time is not None and snapshot.update_time > first


def test_a_batch_is_written_whole_or_not_at_all(db: firestore.Client) -> None:
    batch = db.batch()
    batch.set(db.document("jobs/1"), {"v": 1})
    batch.update(db.document("jobs/missing"), {"v": 1})

    with pytest.raises(exceptions.NotFound):
        batch.commit()
    assert count(db.collection("jobs")) == 0


def test_a_bulk_writer_writes_each_for_itself(db: firestore.Client) -> None:
    db.document("jobs/there").set({"v": 0})
    failed: list[str] = []

    def give_up(failure: Any, writer: object) -> bool:
        failed.append(failure.operation.reference.id)
        return False

    writer = db.bulk_writer()
    writer.on_write_error(give_up)
    for number in range(30):
        writer.create(db.document(f"jobs/{number}"), {"v": number})
    writer.create(db.document("jobs/there"), {"v": 1})
    with closing(writer):
        pass

    assert count(db.collection("jobs")) == 31
    assert failed == ["there"]
    assert db.document("jobs/there").get().to_dict() == {"v": 0}


BAD_FIELDS: dict[str, dict[str, object]] = {
    "reserved": {"__v__": 1},
    "list in a list": {"v": [[1]]},
    "larger than a document": {"v": "x" * 1_100_000},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_document_is_refused(db: firestore.Client, fields: dict[str, object]) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        db.document("jobs/1").set(fields)


# --- Transactions ----------------------------------------------------------------------------


def claim(db: firestore.Client, pod: str, at_read: Callable[[], None]) -> bool:
    """Take the job of `jobs/1`, if it is still waiting."""
    job = db.document("jobs/1")

    @firestore.transactional
    def attempt(transaction: firestore.Transaction) -> bool:
        waiting = bool(job.get(transaction=transaction).get("status") == "waiting")
        at_read()
        if waiting:
            transaction.update(job, {"status": "busy", "pod": pod})
        return waiting

    return bool(attempt(db.transaction()))


def test_of_two_that_claim_a_job_one_gets_it(db: firestore.Client) -> None:
    db.document("jobs/1").set({"status": "waiting"})
    barrier = threading.Barrier(2, timeout=20)
    met = threading.Event()

    def meet_once() -> None:
        if not met.is_set():
            barrier.wait()
            met.set()

    with ThreadPoolExecutor() as pool:
        pods = ["p-1", "p-2"]
        won = list(pool.map(lambda pod: claim(db, pod, meet_once), pods))

    assert sorted(won) == [False, True]
    winner = pods[won.index(True)]
    assert db.document("jobs/1").get().to_dict() == {"status": "busy", "pod": winner}


def test_several_workers_never_take_the_same_job(db: firestore.Client) -> None:
    fill(db, "jobs", 4)
    waiting = where(db.collection("jobs"), WAITING).limit(1)

    @firestore.transactional
    def take(transaction: firestore.Transaction) -> str | None:
        for snapshot in waiting.stream(transaction=transaction):
            transaction.update(snapshot.reference, {"status": "busy"})
            return snapshot.id
        return None

    def work(_: int) -> list[str]:
        taken: list[str] = []
        while count(where(db.collection("jobs"), WAITING)):
            try:
                job = take(db.transaction())
            except (exceptions.Aborted, ValueError):  # the client's five attempts are used up
                continue
            taken += [job] if job else []
        return taken

    with ThreadPoolExecutor() as pool:
        taken = [job for jobs in pool.map(work, range(2)) for job in jobs]

    assert sorted(taken) == [f"waiting-{number:05}" for number in range(4)]


def test_a_transaction_that_fails_leaves_nothing(db: firestore.Client) -> None:
    @firestore.transactional
    def attempt(transaction: firestore.Transaction) -> None:
        transaction.set(db.document("jobs/1"), {"v": 1})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt(db.transaction())
    assert not db.document("jobs/1").get().exists


def test_a_read_only_transaction_reads(db: firestore.Client) -> None:
    db.document("jobs/1").set({"v": 1})
    transaction = db.transaction(read_only=True)

    @firestore.transactional
    def attempt(transaction: firestore.Transaction) -> dict[str, object] | None:
        return db.document("jobs/1").get(transaction=transaction).to_dict()

    assert attempt(transaction) == {"v": 1}


# --- The fake alone: what it records ---------------------------------------------------------


@pytest.fixture
def client(queue: FakeFirestore, monkeypatch: pytest.MonkeyPatch) -> Iterator[firestore.Client]:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", queue.host)
    with closing(firestore.Client(project=queue.project)) as client:
        yield client


def test_reads_are_billed_as_firestore_bills_them(
    queue: FakeFirestore, client: firestore.Client
) -> None:
    queue.fill(2_500)
    jobs = where(client.collection("jobs"), WAITING)

    def billed(ask: Callable[[], object]) -> int:
        ask()
        return queue.calls[-1].reads_billed

    assert billed(lambda: count(jobs)) == 3
    assert billed(lambda: count(jobs.limit(1_000))) == 1
    assert billed(lambda: count(jobs.limit(1_001))) == 2
    assert billed(lambda: count(jobs.offset(1_000).limit(1))) == 2
    assert billed(lambda: count(client.collection("nothing"))) == 1
    assert billed(lambda: ids(jobs.limit(7))) == 7
    assert billed(lambda: ids(client.collection("nothing"))) == 1
    assert billed(client.document("jobs/missing").get) == 1
    assert billed(lambda: client.document("jobs/new").set({})) == 0


def test_calls_are_described(queue: FakeFirestore, client: firestore.Client) -> None:
    jobs = client.collection("tenants/a/jobs")
    count(where(jobs, WAITING, f("pod", "in", ["p-1"])).limit(9))
    ids(where(client.collection_group("jobs"), Or([WAITING, f("v", "==", None)])).select(["pod"]))
    client.document("jobs/1").set({})

    counted, queried, written = queue.calls
    assert counted == Call(
        number=1,
        method="RunAggregationQuery",
        kind="count",
        database=f"projects/{PROJECT}/databases/(default)",
        path="tenants/a/jobs",
        filters=(("status", "==", "waiting"), ("pod", "in", ["p-1"])),
        limit=9,
        reads_billed=1,
        status="OK",
    )
    assert (queried.kind, queried.path, queried.select) == ("query", "**/jobs", ("pod",))
    either = (("status", "==", "waiting"), ("v", "is-null", None))
    assert queried.filters == (("", "or", either),)
    assert (written.kind, written.documents) == ("commit", ("jobs/1",))


def test_documents_are_put_and_looked_at(queue: FakeFirestore, client: firestore.Client) -> None:
    queue.fill(2)
    queue.fill(1, "busy", assignedPodId="p-1")
    queue.put("jobs/own", {"at": DAY, "list": [1, {"a": None}]})

    assert client.document("jobs/own").get().to_dict() == {"at": DAY, "list": [1, {"a": None}]}
    assert queue.document("jobs/own") == {"at": DAY, "list": [1, {"a": None}]}
    assert count(client.collection("jobs")) == 4
    assert {"status": "busy", "assignedPodId": "p-1"} in queue.documents("jobs").values()
    queue.delete("jobs/own")
    assert queue.document("jobs/own") is None
    queue.clear()
    assert count(client.collection("jobs")) == 0


def test_20_000_documents_are_there_at_once(queue: FakeFirestore, client: firestore.Client) -> None:
    started = time.thread_time()
    queue.fill(20_000)
    assert time.thread_time() - started < 1

    assert count(where(client.collection("jobs"), WAITING)) == 20_000
    assert len(ids(where(client.collection("jobs"), WAITING).select([]).limit(10))) == 10


def test_an_unknown_database_is_not_found(queue: FakeFirestore, client: firestore.Client) -> None:
    missing = f"elsewhere does not exist for project {PROJECT}"
    other = firestore.Client(project=PROJECT, database="elsewhere")
    with closing(other), pytest.raises(exceptions.NotFound, match=missing):
        count(other.collection("jobs"))


# --- The fake alone: faults ------------------------------------------------------------------


def asked(client: firestore.Client, timeout: float = 5) -> int:
    return count(client.collection("jobs"), timeout)


def test_a_status_with_its_message(queue: FakeFirestore, client: firestore.Client) -> None:
    queue.fault("count", missing_index())

    with pytest.raises(exceptions.FailedPrecondition, match=r"create it here: https://console\."):
        asked(client)
    assert queue.calls[-1].status == "FAILED_PRECONDITION"
    assert queue.calls[-1].reads_billed == 0
    queue.heal()
    assert asked(client) == 0


def test_retry_info_is_in_the_trailing_metadata(
    queue: FakeFirestore, client: firestore.Client
) -> None:
    queue.fault("count", Fail(StatusCode.RESOURCE_EXHAUSTED, "quota", retry_after_seconds=2.5))

    with pytest.raises(exceptions.ResourceExhausted, match="quota") as failed:
        asked(client)
    [info] = failed.value.details
    assert isinstance(info, RetryInfo)
    assert info.retry_delay.ToNanoseconds() == 2_500_000_000


def test_faults_are_counted(queue: FakeFirestore, client: firestore.Client) -> None:
    queue.fault(On("count", nth=2), Fail(StatusCode.INTERNAL))
    queue.fault(On("count", nth=4), Fail(StatusCode.PERMISSION_DENIED))
    queue.fault(On(where=lambda call: call.limit == 9), Fail(StatusCode.NOT_FOUND))
    queue.fault("RunQuery", Fail(StatusCode.UNAVAILABLE), times=1)

    asked(client)
    with pytest.raises(exceptions.InternalServerError):
        asked(client)
    asked(client)
    with pytest.raises(exceptions.Forbidden):
        asked(client)
    with pytest.raises(exceptions.NotFound):
        count(client.collection("jobs").limit(9))
    with pytest.raises(exceptions.ServiceUnavailable):
        ids(client.collection("jobs"))
    assert ids(client.collection("jobs")) == []
    assert [call.status for call in queue.calls] == [
        "OK", "INTERNAL", "OK", "PERMISSION_DENIED", "NOT_FOUND", "UNAVAILABLE", "OK",
    ]  # fmt: skip


def test_hanging_and_slow_calls(queue: FakeFirestore, client: firestore.Client) -> None:
    queue.fault("count", Hang(), times=1)
    queue.fault("count", Slow(0.3), times=1)

    with pytest.raises(exceptions.DeadlineExceeded):
        asked(client, timeout=0.3)
    started = time.monotonic()
    assert asked(client) == 0
    assert time.monotonic() - started >= 0.3


def test_odd_counts(queue: FakeFirestore, client: firestore.Client) -> None:
    queue.fault("count", CountAs(-1), times=1)
    queue.fault("count", CountAs(None), times=1)
    queue.fault("count", EmptyStream(), times=1)

    jobs: Any = client.collection("jobs")
    assert jobs.count().get()[0][0].value == -1
    assert jobs.count().get() == []
    assert jobs.count().get() == []


def test_hooks_run_before_and_after_the_look(
    queue: FakeFirestore, client: firestore.Client
) -> None:
    queue.hook("count", lambda call: queue.fill(1))
    queue.hook(On("count", nth=2), lambda call: queue.fill(10), after=True)

    assert [asked(client), asked(client), asked(client)] == [1, 2, 13]


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as clients, ThreadPoolExecutor() as pool:
        with FakeFirestore() as fake:
            monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", fake.host)
            client = clients.enter_context(closing(firestore.Client(project=PROJECT)))
            fake.fault("count", Hang())
            hanging = pool.submit(asked, client)
            while not fake.calls:
                time.sleep(0.01)
        with pytest.raises(exceptions.GoogleAPICallError):
            hanging.result()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("firestore")]
    with pytest.raises(ConnectionRefusedError):
        connect(fake.host)


COUNT_FROM_A_PROCESS = """
import sys
from google.cloud import firestore
project, number = sys.argv[1:]
client = firestore.Client(project=project)
for _ in range(5):
    [[result]] = client.collection("jobs").count().get()
    assert result.value == 1000, result
client.document(f"done/{number}").set({})
"""


def test_20_processes_at_once(queue: FakeFirestore) -> None:
    queue.fill(1_000)
    environment = {**os.environ, "FIRESTORE_EMULATOR_HOST": queue.host}
    command = [sys.executable, "-c", COUNT_FROM_A_PROCESS, PROJECT]
    processes = [subprocess.Popen([*command, str(n)], env=environment) for n in range(20)]

    assert [process.wait(120) for process in processes] == [0] * 20
    assert len(queue.documents("done")) == 20


# --- The proxy -------------------------------------------------------------------------------


def connect(host: str) -> socket.socket:
    name, _, port = host.rpartition(":")
    return socket.create_connection((name, int(port)), timeout=2)


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that says everything back."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(65_536):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
            except OSError:
                return

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def said(connection: socket.socket, text: bytes, n: int) -> bytes:
    connection.sendall(text)
    answer = b""
    while len(answer) < n and (piece := connection.recv(n - len(answer))):
        answer += piece
    return answer


def test_the_proxy_passes_and_counts(echo: str) -> None:
    with ChaosProxy(echo) as proxy, connect(proxy.host) as line:
        assert said(line, b"hello" * 50_000, 250_000) == b"hello" * 50_000
        assert (proxy.connections, proxy.bytes_asked, proxy.bytes_answered) == (1, 250_000, 250_000)


def test_the_proxy_refuses_and_recovers_on_the_same_port(echo: str) -> None:
    with ChaosProxy(echo) as proxy:
        proxy.become("refuse")
        with pytest.raises(ConnectionRefusedError):
            connect(proxy.host)
        proxy.become("pass")
        with connect(proxy.host) as line:
            assert said(line, b"hello", 5) == b"hello"


def test_the_proxy_swallows(echo: str) -> None:
    with ChaosProxy(echo) as proxy:
        proxy.become("swallow")
        with connect(proxy.host) as line:
            line.settimeout(0.3)
            with pytest.raises(TimeoutError):
                said(line, b"hello", 5)
        assert (proxy.bytes_asked, proxy.bytes_answered) == (5, 0)


def test_the_proxy_resets(echo: str) -> None:
    with ChaosProxy(echo) as proxy:
        with connect(proxy.host) as line:
            assert said(line, b"hello", 5) == b"hello"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                line.recv(1)
        proxy.become("reset", after_bytes=3)
        with connect(proxy.host) as line, pytest.raises(ConnectionResetError):
            said(line, b"hello", 5)
        assert proxy.bytes_answered == 5 + 3
        proxy.become("reset")
        with pytest.raises(ConnectionResetError), connect(proxy.host) as line:
            said(line, b"hello", 5)


def test_the_proxy_drips_and_delays(echo: str) -> None:
    with ChaosProxy(echo) as proxy:
        slow: list[tuple[Mode, float, float]] = [("drip", 0.05, 0.2), ("delay", 0.3, 0.3)]
        for mode, seconds, least in slow:
            proxy.become(mode, seconds=seconds)
            with connect(proxy.host) as line:
                started = time.monotonic()
                assert said(line, b"hello", 5) == b"hello"
                assert time.monotonic() - started >= least


def test_the_client_survives_the_proxy(
    queue: FakeFirestore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.fill(3)
    with ChaosProxy(queue.host) as proxy:
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", proxy.host)
        with closing(firestore.Client(project=PROJECT)) as client:
            assert asked(client) == 3
            proxy.become("swallow")
            with pytest.raises(exceptions.DeadlineExceeded):
                asked(client, timeout=0.5)
            proxy.become("pass")
            proxy.reset()
            jobs: Any = client.collection("jobs")
            assert jobs.count().get(timeout=20)[0][0].value == 3

"""A Firestore inside the test process, which Google's own client asks over real gRPC.

    with FakeFirestore(project="demo") as queue:
        queue.fill(5)  # five waiting jobs in `jobs`
        queue.fault("count", Fail(StatusCode.UNAVAILABLE), times=2)
        ...  # run a client with FIRESTORE_EMULATOR_HOST=queue.host
        assert [call.reads_billed for call in queue.calls] == [0, 0, 1]

It has what the scaler's tests use: counts and queries of one collection, with comparisons joined by
AND and OR, in ascending order, with a limit and with selected fields. All else is UNIMPLEMENTED.
tests/test_firestore_contract.py asks it and the official emulator the same questions. It has every
index: a missing one is a fault, `missing_index()`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from threading import Event, RLock
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import Client, DocumentReference
from google.cloud.firestore_v1._helpers import decode_value, encode_dict, set_field_value
from google.cloud.firestore_v1.field_path import FieldPath, parse_field_path
from google.cloud.firestore_v1.types import document, firestore
from grpc import StatusCode

from tests.support.rules import Rule

Pb = Any  # a message of the Firestore API: Google's generated classes carry no types
Fields = Mapping[str, Any]

MAX_DISJUNCTIONS = 30
INDEX_ENTRIES_PER_READ = 1_000
OPERATORS = {1: "<", 2: "<=", 3: ">", 4: ">=", 5: "==", 6: "!=", 8: "in"}
OR = 2
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Refused(Exception):
    """An answer of the service that is not OK."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass
class Call:
    """One call as the server saw it."""

    kind: str  # "count" or "query"
    collection: str
    filters: tuple[tuple[str, str, Any], ...]  # of all alternatives, one after another
    order_by: tuple[str, ...]
    limit: int | None
    select: tuple[str, ...] | None
    reads_billed: int = 0


@dataclass(frozen=True)
class On:
    """Which calls: of this kind, where this is true, and only the nth of those."""

    kind: str = ""
    nth: int | None = None
    where: Callable[[Call], bool] | None = None

    def matches(self, call: Call) -> bool:
        return self.kind in ("", call.kind) and (not self.where or self.where(call))


@dataclass(frozen=True)
class Fail:
    """Answer with a status."""

    code: StatusCode
    message: str = ""


class Hang:
    """Never answer; ends when the client gives up or the server stops."""


@dataclass(frozen=True)
class CountAs:
    """Answer a count with this number; None leaves it out of the answer."""

    value: int | None


@dataclass(frozen=True)
class EmptyStream:
    """End the answer well without having said anything."""


Behaviour = Fail | Hang | CountAs | EmptyStream


def missing_index(project: str = "demo-queue") -> Fail:
    """What Firestore answers to a query that none of its indexes can serve."""
    link = f"https://console.firebase.google.com/v1/r/project/{project}/firestore/indexes"
    return Fail(
        StatusCode.FAILED_PRECONDITION,
        f"The query requires an index. You can create it here: {link}?create_composite=abc",
    )


class FakeFirestore:
    def __init__(self, project: str = "demo-queue") -> None:
        self.project, self.host = project, ""
        self._client = Client(project, AnonymousCredentials())  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._documents: dict[str, Fields] = {}
        self._faults: list[Rule] = []
        self._hooks: list[Rule] = []
        self._ids = itertools.count(1)
        self._lock = RLock()
        self._threads = ThreadPoolExecutor(64, "firestore")
        self._server = grpc.server(self._threads)

    def __enter__(self) -> FakeFirestore:
        requests = {
            "RunAggregationQuery": ("count", firestore.RunAggregationQueryRequest.pb()),
            "RunQuery": ("query", firestore.RunQueryRequest.pb()),
        }
        handlers = {method: self._handler(*one) for method, one in requests.items()}
        service = grpc.method_handlers_generic_handler("google.firestore.v1.Firestore", handlers)
        self._server.add_generic_rpc_handlers([service])
        self.host = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()
        self._threads.shutdown()

    # What a test puts in and looks at: paths such as `jobs/1`, values in plain Python.

    def put(self, path: str, fields: Fields) -> None:
        with self._lock:
            self._documents[path] = dict(fields)

    def fill(self, n: int, status: str = "waiting", **fields: object) -> None:
        """Add n jobs that differ in nothing but their ids."""
        for number in itertools.islice(self._ids, n):
            self.put(f"jobs/job-{number:06}", {"status": status, **fields})

    def documents(self, collection: str) -> dict[str, dict[str, Any]]:
        """The documents of one collection by id."""
        with self._lock:
            pairs = [(path.rpartition("/"), dict(v)) for path, v in self._documents.items()]
        return {name: fields for (parent, _, name), fields in pairs if parent == collection}

    def clear(self) -> None:
        """Forget every document, but neither calls nor faults."""
        with self._lock:
            self._documents.clear()

    def fault(self, on: On | str, behaviour: Behaviour, times: int | None = None) -> None:
        """Answer matching calls, `times` of them, like this; the fault set first wins."""
        self._faults.append(rule(on, behaviour, times))

    def hook(self, on: On | str, run: Callable[[Call], None], times: int | None = None) -> None:
        """Run this before a call is looked at."""
        self._hooks.append(rule(on, run, times))

    def heal(self) -> None:
        """Remove all faults and hooks."""
        self._faults.clear()
        self._hooks.clear()

    # One call, from the wire to the wire.

    def _handler(self, kind: str, request_type: Pb) -> Any:
        return grpc.unary_stream_rpc_method_handler(
            lambda request, context: iter(self._serve(kind, request, context)),
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: type(message).serialize(message),
        )

    def _serve(self, kind: str, request: Pb, context: Any) -> Any:
        call = describe(kind, request, self._client)
        with self._lock:
            self.calls.append(call)
            due = [rule.act for rule in self._hooks if rule.due(call)]
        for run in due:
            run(call)
        with self._lock:
            behaviour = next((rule.act for rule in self._faults if rule.due(call)), None)
        try:
            hold_up(behaviour, context)
            with self._lock:
                answers, call.reads_billed = self._answer(call, request)
            return distorted(behaviour, answers)
        except Refused as refused:
            return context.abort(refused.code, refused.message)  # which raises

    def _answer(self, call: Call, request: Pb) -> tuple[list[Any], int]:
        """The messages, and the reads that Firestore bills for them."""
        query = query_of(request)
        # projects/PROJECT/databases/DATABASE/documents, and the path below as people write it
        place = request.parent.split("/")
        if place[3] != "(default)":
            message = f"The database {place[3]} does not exist for project {self.project}"
            raise Refused(StatusCode.NOT_FOUND, message)
        check(query, call)
        matches = matcher(query.where, self._client)
        # Inequalities order as well, and an order leaves out documents without the field.
        unequal = {name for name, op, _ in call.filters if op not in ("==", "in")}
        order = [parse_field_path(name) for name in (*call.order_by, *sorted(unequal))]
        found = (
            (path, fields)
            for path, fields in self._documents.items()
            if path.rpartition("/")[0] == call.collection
            and matches(fields)
            and all(at(fields, name) is not MISSING for name in order)
        )
        if call.kind == "count":
            seen = sum(1 for _ in itertools.islice(found, call.limit))
            return [count_of(request, seen)], max(1, -(-seen // INDEX_ENTRIES_PER_READ))

        def rank(one: tuple[str, Fields]) -> tuple[list[Any], str]:
            return [comparable(at(one[1], name)) for name in order], one[0]

        root, chosen = "/".join(place[:5]), sorted(found, key=rank)[: call.limit]
        answers = [document_of(f"{root}/{path}", fields, call.select) for path, fields in chosen]
        return answers or [firestore.RunQueryResponse(done=True)], max(1, len(answers))


def rule(on: On | str, act: Any, times: int | None) -> Rule:
    on = On(on) if isinstance(on, str) else on
    return Rule(on.matches, act, 1 if on.nth else times, on.nth or 1)


def hold_up(behaviour: Behaviour | None, context: Any) -> None:
    """What a fault does instead of an answer."""
    if isinstance(behaviour, Fail):
        raise Refused(behaviour.code, behaviour.message)
    if isinstance(behaviour, Hang):
        ended = Event()
        if not context.add_callback(ended.set) or ended.wait():
            raise Refused(StatusCode.CANCELLED, "the client has gone")


def distorted(behaviour: Behaviour | None, answers: list[Any]) -> list[Any]:
    if isinstance(behaviour, EmptyStream):
        return []
    if isinstance(behaviour, CountAs):
        counts = answers[0].result.aggregate_fields
        for alias in list(counts):
            if behaviour.value is None:
                del counts[alias]
            else:
                counts[alias] = document.Value(integer_value=behaviour.value)
    return answers


# --- A request in words ----------------------------------------------------------------------


def query_of(request: Pb) -> Pb:
    counting = hasattr(request, "structured_aggregation_query")
    return (request.structured_aggregation_query if counting else request).structured_query


def describe(kind: str, request: Pb, client: Client) -> Call:
    query = query_of(request)
    selected = tuple(one.field_path for one in query.select.fields)
    return Call(
        kind,
        collection="/".join([*request.parent.split("/")[5:], query.from_[0].collection_id]),
        filters=tuple(parse_leaf(leaf, client) for leaf in leaves(query.where)),
        order_by=tuple(one.field.field_path for one in query.order_by),
        limit=query.limit.value if query.HasField("limit") else None,
        select=selected if query.HasField("select") else None,
    )


def leaves(where: Pb) -> Iterator[Pb]:
    for part in where.composite_filter.filters:
        yield from leaves(part)
    if where.WhichOneof("filter_type") in ("unary_filter", "field_filter"):
        yield where


def parse_leaf(where: Pb, client: Client) -> tuple[str, str, Any]:
    """Field, operator and value of one filter; an operator that is missing here is ""."""
    if where.HasField("unary_filter"):
        return where.unary_filter.field.field_path, "", None
    leaf = where.field_filter
    return leaf.field.field_path, OPERATORS.get(leaf.op, ""), decode_value(leaf.value, client)


def disjunctions(where: Pb) -> int:
    """How many a filter comes to once it is a list of alternatives without lists."""
    if where.HasField("composite_filter"):
        parts = map(disjunctions, where.composite_filter.filters)
        return sum(parts) if where.composite_filter.op == OR else math.prod(parts)
    leaf = where.field_filter
    return len(leaf.value.array_value.values) if OPERATORS.get(leaf.op) == "in" else 1


def check(query: Pb, call: Call) -> None:
    """Refuses what Firestore refuses, and what this fake has not."""
    unknown = {field.name for field, _ in query.ListFields()}
    unknown -= {"from_", "where", "order_by", "limit", "select"}
    if any(not op for _, op, _ in call.filters):
        unknown.add("this filter")
    if any(one.direction > 1 for one in query.order_by):
        unknown.add("descending order")
    if query.from_[0].all_descendants:
        unknown.add("collection groups")
    if unknown:
        raise Refused(StatusCode.UNIMPLEMENTED, f"not in this fake: {unknown}")
    number = disjunctions(query.where)
    if not 1 <= number <= MAX_DISJUNCTIONS:
        message = f"{number} disjunctions; Firestore takes 1 to {MAX_DISJUNCTIONS}"
        raise Refused(StatusCode.INVALID_ARGUMENT, message)


# --- Values and documents --------------------------------------------------------------------

MISSING = object()


# The types in Firestore's order.
TYPES: tuple[type | tuple[type, ...], ...] = (
    type(None), bool, (int, float), datetime, str, bytes, DocumentReference, list, dict,
)  # fmt: skip


def comparable(value: Any) -> tuple[int, Any]:
    """A value as Firestore sorts it: by its type first."""
    if isinstance(value, str):  # the most frequent type, without the search
        return TYPES.index(str), value
    rank = next(rank for rank, kind in enumerate(TYPES) if isinstance(value, kind))
    if isinstance(value, DocumentReference):
        value = tuple(value.path.split("/"))
    elif isinstance(value, list):
        value = tuple(map(comparable, value))
    elif isinstance(value, dict):
        value = tuple(sorted((name, comparable(one)) for name, one in value.items()))
    return rank, value


def at(fields: Any, path: Sequence[str]) -> Any:
    for part in path:
        fields = fields.get(part, MISSING) if isinstance(fields, Mapping) else MISSING
    return fields


def matcher(where: Pb, client: Client) -> Callable[[Fields], bool]:
    if where.HasField("composite_filter"):
        parts = [matcher(part, client) for part in where.composite_filter.filters]
        combine = any if where.composite_filter.op == OR else all
        return lambda fields: combine(part(fields) for part in parts)
    if not where.HasField("field_filter"):
        return lambda fields: True
    name, op, given = parse_leaf(where, client)
    path = parse_field_path(name)
    wanted = {comparable(one) for one in (given if op == "in" else [given])}
    limit = next(iter(wanted), (0, None))

    def matches(fields: Fields) -> bool:
        value = at(fields, path)
        if value is MISSING or value is None:
            return False
        found = comparable(value)
        if compare := COMPARISONS.get(op):
            return found[0] == limit[0] and compare(found, limit)
        return (found in wanted) is (op != "!=")

    return matches


def document_of(name: str, fields: Fields, select: Sequence[str] | None) -> Any:
    if select is not None:
        shown: dict[str, Any] = {}
        for path in set(select) - {"__name__"}:
            if (value := at(fields, parse_field_path(path))) is not MISSING:
                set_field_value(shown, FieldPath.from_api_repr(path), value)
        fields = shown
    found = document.Document(name=name, fields=encode_dict(fields))
    return firestore.RunQueryResponse(document=found)


def count_of(request: Pb, seen: int) -> Any:
    [asked] = request.structured_aggregation_query.aggregations
    counts = {asked.alias or "field_1": document.Value(integer_value=seen)}
    return firestore.RunAggregationQueryResponse(result={"aggregate_fields": counts})

"""A Firestore inside the test process, which Google's own client asks over real gRPC.

    with FakeFirestore(project="demo") as queue:
        queue.fill(5)  # five waiting jobs in `jobs`
        queue.fault("count", Fail(StatusCode.UNAVAILABLE), times=2)
        ...  # run a client with FIRESTORE_EMULATOR_HOST=queue.host
        assert [call.reads_billed for call in queue.calls] == [0, 0, 1]

It has what the scaler's tests use: counts and queries, with filters that compare numbers and text,
with a limit and with selected fields. tests/test_firestore_contract.py asks it and the official
emulator the same questions; all else is UNIMPLEMENTED. It has every index: a missing one is a
fault, `missing_index()`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, RLock
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.cloud.firestore_v1._helpers import decode_value, encode_dict, set_field_value
from google.cloud.firestore_v1.field_path import FieldPath, parse_field_path
from google.cloud.firestore_v1.types import document, firestore
from grpc import StatusCode

from tests.support.rules import Rule

Pb = Any  # a message of the Firestore API: Google's generated classes carry no types
Fields = Mapping[str, Any]

MAX_DISJUNCTIONS = 30
INDEX_ENTRIES_PER_READ = 1_000
OPERATORS = {3: ">", 5: "==", 6: "!=", 8: "in"}


class Refused(Exception):
    """An answer of the service that is not OK."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass
class Call:
    """One call as the server saw it."""

    kind: str  # "count" or "query"
    filters: tuple[tuple[str, str, Any], ...]
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
        call = describe(kind, query_of(request))
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
        collection = "/".join([*place[5:], query.from_[0].collection_id])
        tests = [matcher(*one) for one in call.filters]
        found = (
            (path, fields)
            for path, fields in self._documents.items()
            if path.rpartition("/")[0] == collection and all(test(fields) for test in tests)
        )
        if call.kind == "count":
            seen = sum(1 for _ in itertools.islice(found, call.limit))
            return [count_of(request, seen)], max(1, -(-seen // INDEX_ENTRIES_PER_READ))
        root, chosen = "/".join(place[:5]), sorted(found)[: call.limit]
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


def describe(kind: str, query: Pb) -> Call:
    selected = tuple(one.field_path for one in query.select.fields)
    limit = query.limit.value if query.HasField("limit") else None
    select = selected if query.HasField("select") else None
    return Call(kind, tuple(leaves(query.where)), limit, select)


def leaves(where: Pb) -> Iterator[tuple[str, str, Any]]:
    """Field, operator and value of every filter; the operators that are missing here are ""."""
    for part in where.composite_filter.filters:
        yield from leaves(part)
    if where.HasField("unary_filter"):
        yield where.unary_filter.field.field_path, "", None
    if where.HasField("field_filter"):
        leaf = where.field_filter
        yield leaf.field.field_path, OPERATORS.get(leaf.op, ""), decode_value(leaf.value, None)


def check(query: Pb, call: Call) -> None:
    """Refuses what Firestore refuses, and what this fake has not."""
    unknown = {field.name for field, _ in query.ListFields()}
    unknown -= {"from_", "where", "limit", "select"}
    for _, op, value in call.filters:
        if not op or any(typed(one)[0] not in (float, str) for one in values(op, value)):
            unknown.add("this filter")
    if unknown or query.where.composite_filter.op > 1 or query.from_[0].all_descendants:
        raise Refused(StatusCode.UNIMPLEMENTED, f"not in this fake: OR, groups, {unknown}")
    terms = math.prod(len(many) for _, op, many in call.filters if op == "in")
    if not 1 <= terms <= MAX_DISJUNCTIONS:
        message = f"{terms} disjunctions: 'IN' takes 1 to {MAX_DISJUNCTIONS} values, all together"
        raise Refused(StatusCode.INVALID_ARGUMENT, message)


# --- Values and documents --------------------------------------------------------------------

MISSING = object()


def values(op: str, given: Any) -> Sequence[Any]:
    """What a filter compares with."""
    return given if op == "in" else [given]


def typed(value: Any) -> tuple[type, Any]:
    """A value as Firestore compares it: with those of its own type alone."""
    return float if type(value) is int else type(value), value


def at(fields: Any, path: Sequence[str]) -> Any:
    for part in path:
        fields = fields.get(part, MISSING) if isinstance(fields, Mapping) else MISSING
    return fields


def matcher(name: str, op: str, given: Any) -> Callable[[Fields], bool]:
    path = parse_field_path(name)
    wanted = [typed(one) for one in values(op, given)]

    def matches(fields: Fields) -> bool:
        found = typed(at(fields, path))
        if found[1] is MISSING or found[1] is None:
            return False
        if op == ">":
            return found[0] is wanted[0][0] and found > wanted[0]
        return (found in wanted) is (op != "!=")

    return matches


def document_of(name: str, fields: Fields, select: Sequence[str] | None) -> Any:
    if select is not None:
        shown: dict[str, Any] = {}
        for path in select:
            if (value := at(fields, parse_field_path(path))) is not MISSING:
                set_field_value(shown, FieldPath.from_api_repr(path), value)
        fields = shown
    found = document.Document(name=name, fields=encode_dict(fields))
    return firestore.RunQueryResponse(document=found)


def count_of(request: Pb, seen: int) -> Any:
    [asked] = request.structured_aggregation_query.aggregations
    counts = {asked.alias or "field_1": document.Value(integer_value=seen)}
    return firestore.RunAggregationQueryResponse(result={"aggregate_fields": counts})

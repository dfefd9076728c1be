"""A Firestore inside the test process, which Google's own client asks over real gRPC.

    with FakeFirestore(project="demo") as queue:
        queue.fill(5)  # five waiting jobs in `jobs`
        queue.fault("count", Fail(StatusCode.UNAVAILABLE), times=2)
        ...  # run a client with FIRESTORE_EMULATOR_HOST=queue.host
        assert [call.reads_billed for call in queue.calls] == [0, 0, 1]

It has what the scaler uses: counts and queries with filters, a limit and selected fields.
tests/test_firestore_contract.py asks it and the official emulator the same questions; all else is
UNIMPLEMENTED. It has every index: a missing one is a fault, `missing_index()`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from threading import Event, RLock
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.cloud.firestore_v1._helpers import decode_value, encode_dict
from google.cloud.firestore_v1.field_path import parse_field_path
from google.cloud.firestore_v1.types import document, firestore
from grpc import StatusCode

Pb = Any  # a message of the Firestore API: Google's generated classes carry no types
Fields = Mapping[str, Any]

MAX_DISJUNCTIONS = 30
INDEX_ENTRIES_PER_READ = 1_000
NAME = re.compile(r"projects/([^/]+)/databases/([^/]+)/documents(?:/(.+))?")
RESERVED = re.compile(r"__.*__", re.DOTALL)
OPERATORS = {
    1: "<", 2: "<=", 3: ">", 4: ">=", 5: "==", 6: "!=",
    7: "array-contains", 8: "in", 9: "array-contains-any", 10: "not-in",
}  # fmt: skip
# Null and NaN are asked for by operators of their own.
UNARY_OPERATORS = {2: ("==", math.nan), 3: ("==", None), 4: ("!=", math.nan), 5: ("!=", None)}
LIST_LIMITS = {"in": 30, "array-contains-any": 30, "not-in": 10}


class Refused(Exception):
    """An answer of the service that is not OK."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def invalid(message: str) -> Refused:
    return Refused(StatusCode.INVALID_ARGUMENT, message)


@dataclass(frozen=True)
class Call:
    """One call as the server saw it. `status` is empty until it has been answered."""

    number: int
    kind: str  # "count" or "query"
    database: str
    path: str  # the collection, `**/jobs` for a collection group
    filters: tuple[tuple[str, str, object], ...] = ()
    limit: int | None = None
    select: tuple[str, ...] | None = None
    reads_billed: int = 0
    status: str = ""


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


@dataclass(frozen=True)
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


@dataclass
class Rule:
    """A fault or a hook, with how often it has matched and how often it may still act."""

    on: On
    act: Any
    times: int | None
    matched: int = 0

    def due(self, call: Call) -> bool:
        """To be asked once about each call: it counts them."""
        if not self.on.matches(call):
            return False
        self.matched += 1
        return self.times != 0 and self.on.nth in (None, self.matched)

    def use(self) -> Any:
        self.times = self.times and self.times - 1
        return self.act


class FakeFirestore:
    """The server, its documents and its faults. Every database named is there, and empty."""

    def __init__(
        self,
        project: str = "demo-queue",
        database: str = "(default)",
        other_databases: Iterable[str] = (),
    ) -> None:
        self.project, self.database, self.host = project, database, ""
        self.calls: list[Call] = []
        self._databases: dict[str, dict[str, Fields]] = {
            name: {} for name in (database, *other_databases)
        }
        self._faults: list[Rule] = []
        self._hooks: list[Rule] = []
        self._numbers, self._ids = itertools.count(1), itertools.count(1)
        self._lock = RLock()
        self._threads = ThreadPoolExecutor(64, "firestore")
        self._server = grpc.server(self._threads)

    def __enter__(self) -> FakeFirestore:
        handlers = {
            "RunAggregationQuery": self._handler(
                "count", firestore.RunAggregationQueryRequest.pb()
            ),
            "RunQuery": self._handler("query", firestore.RunQueryRequest.pb()),
        }
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
            self._databases[self.database][path] = dict(fields)

    def fill(
        self, n: int, status: str = "waiting", collection: str = "jobs", **fields: object
    ) -> None:
        """Add n jobs that differ in nothing but their ids."""
        for number in itertools.islice(self._ids, n):
            self.put(f"{collection}/job-{number:06}", {"status": status, **fields})

    def documents(self, collection: str) -> dict[str, dict[str, Any]]:
        """The documents of one collection by id."""
        with self._lock:
            found = self._databases[self.database].items()
            pairs = [(path.rpartition("/"), dict(fields)) for path, fields in found]
        return {name: fields for (parent, _, name), fields in pairs if parent == collection}

    def clear(self) -> None:
        """Forget every document, but neither calls nor faults."""
        with self._lock:
            for documents in self._databases.values():
                documents.clear()

    def fault(self, on: On | str, behaviour: Behaviour, times: int | None = None) -> None:
        """Answer matching calls, `times` of them, like this; the fault set first wins."""
        with self._lock:
            self._faults.append(Rule(On(on) if isinstance(on, str) else on, behaviour, times))

    def hook(self, on: On | str, run: Callable[[Call], None], times: int | None = None) -> None:
        """Run this before a call is looked at."""
        with self._lock:
            self._hooks.append(Rule(On(on) if isinstance(on, str) else on, run, times))

    def heal(self) -> None:
        """Remove all faults and hooks."""
        with self._lock:
            self._faults.clear()
            self._hooks.clear()

    # One call, from the wire to the wire.

    def _handler(self, kind: str, request_type: Pb) -> Any:
        return grpc.unary_stream_rpc_method_handler(
            lambda request, context: iter(self._serve(kind, request, context)),
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: type(message).serialize(message),
        )

    def _serve(self, kind: str, request: Pb, context: Any) -> list[Any]:
        with self._lock:
            call = describe(next(self._numbers), kind, request)
            self.calls.append(call)
            due = [rule.use() for rule in self._hooks if rule.due(call)]
        try:
            for run in due:
                run(call)
            with self._lock:
                faults = [rule for rule in self._faults if rule.due(call)]
                behaviour = faults[0].use() if faults else None
            hold_up(behaviour, context)
            with self._lock:
                answers, reads = self._answer(call, request)
                self._record(replace(call, reads_billed=reads, status="OK"))
            return distorted(behaviour, answers)
        except Refused as refused:
            self._record(replace(call, status=refused.code.name))
            context.abort(refused.code, refused.message)
            return []  # never reached: abort raises

    def _record(self, answered: Call) -> None:
        with self._lock:
            self.calls[:] = [
                answered if one.number == answered.number else one for one in self.calls
            ]

    def _answer(self, call: Call, request: Pb) -> tuple[list[Any], int]:
        """The messages, and the reads that Firestore bills for them."""
        if call.database not in self._databases:
            message = f"The database {call.database} does not exist for project {self.project}"
            raise Refused(StatusCode.NOT_FOUND, message)
        query = query_of(request)
        only_known_parts(query)
        keep = all_of([matcher(*found) for found in call.filters])
        check_together(call.filters)
        parent = relative(request.parent)
        root = request.parent.removesuffix(f"/{parent}") if parent else request.parent
        found = (
            (path, fields)
            for path, fields in self._databases[call.database].items()
            if lies_in(path, query.from_[0], parent) and keep(fields)
        )
        if call.kind == "count":
            seen = sum(1 for _ in itertools.islice(found, call.limit))
            return [count_of(request, seen)], max(1, -(-seen // INDEX_ENTRIES_PER_READ))
        documents = sorted(found)[: call.limit]
        answers = [document_of(f"{root}/{path}", fields, call.select)
                   for path, fields in documents]  # fmt: skip
        return answers or [firestore.RunQueryResponse(done=True)], max(1, len(documents))


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
    return request.structured_aggregation_query.structured_query if counting else (
        request.structured_query
    )  # fmt: skip


def relative(name: str) -> str:
    """The path below `documents`, as people write it."""
    found = NAME.fullmatch(name)
    return (found[3] or "") if found else name


def describe(number: int, kind: str, request: Pb) -> Call:
    query, found = query_of(request), NAME.fullmatch(request.parent)
    group = "**" if query.from_[0].all_descendants else ""
    parts = (relative(request.parent), group, query.from_[0].collection_id)
    return Call(
        number,
        kind,
        database=found[2] if found else "",
        path="/".join(filter(None, parts)),
        filters=tuple(leaves(query.where)),
        limit=query.limit.value if query.HasField("limit") else None,
        select=tuple(one.field_path for one in query.select.fields)
        if query.HasField("select")
        else None,
    )


def leaves(where: Pb) -> Iterator[tuple[str, str, Any]]:
    """Field, operator and value of every filter."""
    for part in where.composite_filter.filters:
        yield from leaves(part)
    if where.HasField("field_filter"):
        leaf = where.field_filter
        yield leaf.field.field_path, OPERATORS[leaf.op], decode_value(leaf.value, None)
    if where.HasField("unary_filter"):
        yield (where.unary_filter.field.field_path, *UNARY_OPERATORS[where.unary_filter.op])


def only_known_parts(query: Pb) -> None:
    known = {"from_", "where", "limit", "select"}
    unknown = {field.name for field, _ in query.ListFields()} - known
    if unknown or query.where.composite_filter.op > 1:
        raise Refused(StatusCode.UNIMPLEMENTED, f"not in this fake: OR, {unknown}")
    if query.limit.value < 0:
        raise invalid("limit is negative")
    if RESERVED.fullmatch(query.from_[0].collection_id):
        raise invalid(f'Collection id "{query.from_[0].collection_id}" is reserved.')


def check_together(filters: Sequence[tuple[str, str, Any]]) -> None:
    """Limits on the filters of one query."""
    operators = [op for _, op, _ in filters]
    terms = math.prod(len(v) for _, op, v in filters if op in ("in", "array-contains-any"))
    if terms > MAX_DISJUNCTIONS:
        raise invalid(f"{terms} disjunctions are more than the maximum of {MAX_DISJUNCTIONS}")
    if sum(op in ("!=", "not-in") for op in operators) > 1:
        raise invalid("Only a single 'NOT_EQUAL' or 'NOT_IN' filter allowed per query.")
    if "not-in" in operators and {"in", "array-contains-any"} & set(operators):
        raise invalid("'NOT_IN' cannot be used in the same query with 'IN'.")
    if sum(op.startswith("array-contains") for op in operators) > 1:
        raise invalid("A maximum of 1 'ARRAY_CONTAINS' filter is allowed per disjunction.")


# --- Values and documents --------------------------------------------------------------------


def order_key(value: Any) -> tuple[Any, ...]:
    """Sorts values of all types as Firestore does; equal values have equal keys."""
    match value:
        case None:
            return (0,)
        case bool():
            return (1, value)
        case int() | float():
            return (2, 0) if value != value else (2, 1, value)
        case datetime():
            return (3, value)
        case str():
            return (4, value.encode())
        case bytes():
            return (5, value)
        case Mapping():
            return (9, tuple((key.encode(), order_key(value[key])) for key in sorted(value)))
        case Sequence():
            return (8, tuple(map(order_key, value)))
    raise TypeError(f"not a value of this fake: {value!r}")


MISSING = object()


def at(fields: Any, path: Sequence[str]) -> Any:
    for part in path:
        fields = fields.get(part, MISSING) if isinstance(fields, Mapping) else MISSING
    return fields


def parsed(text: str) -> tuple[str, ...]:
    path = tuple(parse_field_path(text))
    if any(map(RESERVED.fullmatch, path)):
        raise invalid(f"Invalid reserved name in field path {text}")
    return path


def all_of(tests: Sequence[Callable[[Fields], bool]]) -> Callable[[Fields], bool]:
    return lambda fields: all(test(fields) for test in tests)


def matcher(name: str, op: str, given: Any) -> Callable[[Fields], bool]:
    path, test = parsed(name), value_test(op, given)

    def matches(fields: Fields) -> bool:
        value = at(fields, path)
        return value is not MISSING and test(value)

    return matches


def value_test(op: str, given: Any) -> Callable[[Any], bool]:
    """In lists, null and NaN equal nothing; a range stays within the type of its bound."""
    if op in LIST_LIMITS and not (isinstance(given, list) and 1 <= len(given) <= LIST_LIMITS[op]):
        raise invalid(f"'{op}' takes a list of up to {LIST_LIMITS[op]} comparison values.")
    many = given if op in LIST_LIMITS else [given]
    keys = {order_key(one) for one in many}
    if op not in ("==", "!="):
        keys -= {(0,), (2, 0)}
    key = order_key(given)
    least = (2, 1) if key[0] == 2 else key[:1]
    tests: dict[str, Callable[[Any], bool]] = {
        "==": lambda value: order_key(value) in keys,
        "!=": lambda value: value is not None and order_key(value) not in keys,
        "not-in": lambda v: v is not None and None not in many and order_key(v) not in keys,
        "array-contains": lambda v: isinstance(v, list) and any(order_key(x) in keys for x in v),
        "<": lambda value: key in keys and least <= order_key(value) < key,
        "<=": lambda value: key in keys and least <= order_key(value) <= key,
        ">": lambda value: key in keys and key < order_key(value) < (key[0] + 1,),
        ">=": lambda value: key in keys and key <= order_key(value) < (key[0] + 1,),
    }
    return tests[{"in": "==", "array-contains-any": "array-contains"}.get(op, op)]


def lies_in(path: str, source: Pb, parent: str) -> bool:
    """Whether a document is in the collection, or in one of the group, that a query is about."""
    home, _, collection = path.rpartition("/")[0].rpartition("/")
    below = not parent or f"{home}/".startswith(f"{parent}/")
    return collection == source.collection_id and (
        below if source.all_descendants else home == parent
    )


def document_of(name: str, fields: Fields, select: Sequence[str] | None) -> Any:
    if select is not None:
        shown: dict[str, Any] = {}
        for path in map(parsed, select):
            if (value := at(fields, path)) is not MISSING:
                inner = shown
                for part in path[:-1]:
                    inner = inner.setdefault(part, {})
                inner[path[-1]] = value
        fields = shown
    found = document.Document(name=name, fields=encode_dict(fields))
    return firestore.RunQueryResponse(document=found)


def count_of(request: Pb, seen: int) -> Any:
    [asked] = request.structured_aggregation_query.aggregations
    counts = {asked.alias or "field_1": document.Value(integer_value=seen)}
    return firestore.RunAggregationQueryResponse(result={"aggregate_fields": counts})

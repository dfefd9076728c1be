"""A Firestore inside the test process, spoken to by Google's own client over real gRPC.

    with FakeFirestore(project="demo") as queue:
        queue.fill(5)  # five waiting jobs in `jobs`
        queue.fault("count", Fail(StatusCode.UNAVAILABLE), times=2)
        ...  # run a client with FIRESTORE_EMULATOR_HOST=queue.host
        assert [call.reads_billed for call in queue.calls] == [0, 0, 1]

tests/test_firestore_contract.py asks it and the official emulator the same questions. What it
does not have (cursors, sums, listening, reading the past) it refuses with UNIMPLEMENTED. It has
every index: a missing one is a fault, `missing_index()`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, RLock
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.cloud.firestore_v1.types import aggregation_result, document, firestore, write
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]
from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from grpc import StatusCode

from .firestore_database import (
    FIELD_OPERATORS,
    NAME,
    OR,
    UNARY_OPERATORS,
    Database,
    Pb,
    Refused,
    Stored,
    Transaction,
    Value,
    check_document_name,
    field_path,
    invalid,
    plan_query,
    relative,
    timestamp,
    to_plain,
    to_value,
    written,
)

MAX_AGGREGATIONS = 5
INDEX_ENTRIES_PER_READ = 1_000
WORKER_THREADS = 64

Document: Pb = document.Document.pb()
Write: Pb = write.Write.pb()
AggregationResult: Pb = aggregation_result.AggregationResult.pb()
BatchGetResponse: Pb = firestore.BatchGetDocumentsResponse.pb()
BatchWriteResponse: Pb = firestore.BatchWriteResponse.pb()
BeginResponse: Pb = firestore.BeginTransactionResponse.pb()
CommitResponse: Pb = firestore.CommitResponse.pb()
CountResponse: Pb = firestore.RunAggregationQueryResponse.pb()
QueryResponse: Pb = firestore.RunQueryResponse.pb()

KINDS = {
    "RunAggregationQuery": "count",
    "RunQuery": "query",
    "BatchGetDocuments": "get",
    "Commit": "commit",
    "BatchWrite": "commit",
    "BeginTransaction": "transaction",
    "Rollback": "transaction",
}
STREAMED = {"count", "query", "get"}


@dataclass(frozen=True)
class Call:
    """One call as the server saw it. `status` is empty until it has been answered."""

    number: int
    method: str
    kind: str
    database: str
    path: str = ""  # collection of a query, `**/jobs` for a collection group
    documents: tuple[str, ...] = ()  # paths read or written one by one
    filters: tuple[tuple[str, str, object], ...] = ()  # an OR is ("", "or", (filter, ...))
    limit: int | None = None
    up_to: int | None = None  # of the first count that has one
    select: tuple[str, ...] | None = None
    transaction: bool = False
    reads_billed: int = 0
    status: str = ""


@dataclass(frozen=True)
class On:
    """Which calls: of this method or kind, where this is true, and only the nth of those."""

    call: str = ""
    nth: int | None = None
    where: Callable[[Call], bool] | None = None

    def matches(self, call: Call) -> bool:
        return self.call in ("", call.method, call.kind) and (not self.where or self.where(call))


@dataclass(frozen=True)
class Fail:
    """Answer with a status; `retry_after_seconds` travels as RetryInfo, as Google sends it."""

    code: StatusCode
    message: str = ""
    retry_after_seconds: float | None = None


@dataclass(frozen=True)
class Hang:
    """Never answer; ends when the client gives up or the server stops."""


@dataclass(frozen=True)
class Slow:
    """Answer correctly, this much later."""

    seconds: float


@dataclass(frozen=True)
class CountAs:
    """Answer a count with this number; None leaves it out of the answer."""

    value: int | None


@dataclass(frozen=True)
class EmptyStream:
    """End the answer well without having said anything."""


Behaviour = Fail | Hang | Slow | CountAs | EmptyStream


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
    after: bool = False
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
    """The server, its documents and its faults. Every project has these databases, each empty."""

    def __init__(
        self,
        project: str = "demo-queue",
        database: str = "(default)",
        other_databases: Iterable[str] = (),
    ) -> None:
        self.project = project
        self.database = database
        self.host = ""
        self.calls: list[Call] = []
        self._database_ids = {database, *other_databases}
        self._databases: dict[str, Database] = {}
        self._faults: list[Rule] = []
        self._hooks: list[Rule] = []
        self._numbers = itertools.count(1)
        self._lock = RLock()
        self._threads = ThreadPoolExecutor(WORKER_THREADS, "firestore")
        self._server = grpc.server(self._threads)

    def __enter__(self) -> FakeFirestore:
        handlers = {method: self._handler(method) for method in METHODS}
        service = grpc.method_handlers_generic_handler("google.firestore.v1.Firestore", handlers)
        self._server.add_generic_rpc_handlers([service])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.host = f"127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()
        self._threads.shutdown()

    # What a test puts in and looks at: paths such as `jobs/1`, values in plain Python.

    def put(self, path: str, fields: Mapping[str, object]) -> None:
        with self._lock:
            database = self._own()
            update = Document(
                name=f"{database.root}/{path}", fields=to_value(fields).map_value.fields
            )
            database.commit([Write(update=update)])

    def delete(self, path: str) -> None:
        with self._lock:
            database = self._own()
            database.commit([Write(delete=f"{database.root}/{path}")])

    def fill(
        self, n: int, status: str = "waiting", collection: str = "jobs", **fields: object
    ) -> None:
        """Add n jobs that differ in nothing but their ids."""
        same = {key: to_value(value) for key, value in {"status": status, **fields}.items()}
        with self._lock:
            database = self._own()
            now = database.now()
            for number in itertools.islice(database.ids, n):
                name = f"{database.root}/{collection}/job-{number:06}"
                database.store(name, Stored(name, same, now, now))

    def document(self, path: str) -> dict[str, object] | None:
        with self._lock:
            database = self._own()
            stored = database.get(f"{database.root}/{path}")
            return plain_fields(stored) if stored else None

    def documents(self, collection: str) -> dict[str, dict[str, object]]:
        """The documents of one collection by id."""
        with self._lock:
            database = self._own()
            found = database.collections.get(f"{database.root}/{collection}", {})
            return {name.rpartition("/")[2]: plain_fields(doc) for name, doc in found.items()}

    def clear(self) -> None:
        """Forget every document of every database, but neither calls nor faults."""
        with self._lock:
            for database in self._databases.values():
                database.collections.clear()

    def fault(self, on: On | str, behaviour: Behaviour, times: int | None = None) -> None:
        """Answer matching calls, `times` of them, like this; the fault set first wins."""
        with self._lock:
            self._faults.append(Rule(as_on(on), behaviour, times))

    def hook(
        self,
        on: On | str,
        run: Callable[[Call], None],
        *,
        after: bool = False,
        times: int | None = None,
    ) -> None:
        """Run this before a call is looked at or, with `after`, once its answer is fixed but
        not sent."""
        with self._lock:
            self._hooks.append(Rule(as_on(on), run, times, after))

    def heal(self) -> None:
        """Remove all faults and hooks."""
        with self._lock:
            self._faults.clear()
            self._hooks.clear()

    def _own(self) -> Database:
        return self._open(f"projects/{self.project}/databases/{self.database}")

    def _open(self, name: str) -> Database:
        found = NAME.fullmatch(f"{name}/documents")
        if not found:
            raise invalid(f'Database name "{name}" is not of the form projects/*/databases/*.')
        if found["database"] not in self._database_ids:
            project = found["project"]
            raise Refused(
                StatusCode.NOT_FOUND,
                f"The database {found['database']} does not exist for project {project} Please "
                f"visit https://console.cloud.google.com/datastore/setup?project={project} to "
                "add a Cloud Datastore or Cloud Firestore database.",
            )
        if name not in self._databases:
            self._databases[name] = Database(name)
        return self._databases[name]

    # One call, from the wire to the wire.

    def _handler(self, method: str) -> Any:
        request_type, _ = METHODS[method]
        messages: dict[str, Any] = {
            "request_deserializer": request_type.pb().FromString,
            "response_serializer": lambda message: message.SerializeToString(),
        }
        if KINDS[method] in STREAMED:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: iter(self._serve(method, request, context)), **messages
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._serve(method, request, context)[0], **messages
        )

    def _serve(self, method: str, request: Pb, context: Any) -> list[Pb]:
        with self._lock:
            call = describe(next(self._numbers), method, request)
            self.calls.append(call)
        try:
            self._run_hooks(call, after=False)
            behaviour = self._due_fault(call)
            hold_up(behaviour, context)
            with self._lock:
                answers, reads = METHODS[method][1](self._open(call.database), request)
                self._record(replace(call, reads_billed=reads, status="OK"))
            self._run_hooks(call, after=True)
            return distorted(behaviour, answers)
        except Refused as refused:
            self._record(replace(call, status=refused.code.name))
            return abort(context, refused)

    def _due_fault(self, call: Call) -> Behaviour | None:
        with self._lock:
            due = [rule for rule in self._faults if rule.due(call)]
            return due[0].use() if due else None

    def _run_hooks(self, call: Call, *, after: bool) -> None:
        with self._lock:
            due = [rule for rule in self._hooks if rule.after == after and rule.due(call)]
            runs = [rule.use() for rule in due]
        for run in runs:
            run(call)

    def _record(self, answered: Call) -> None:
        with self._lock:
            for place, call in enumerate(self.calls):
                if call.number == answered.number:
                    self.calls[place] = answered


def as_on(on: On | str) -> On:
    return On(on) if isinstance(on, str) else on


def plain_fields(stored: Stored) -> dict[str, object]:
    return {key: to_plain(value) for key, value in stored.fields.items()}


def hold_up(behaviour: Behaviour | None, context: Any) -> None:
    """What a fault does instead of an answer, or before it."""
    if isinstance(behaviour, Fail):
        raise Refused(behaviour.code, behaviour.message, behaviour.retry_after_seconds)
    if isinstance(behaviour, Hang | Slow):
        ended = Event()
        seconds = behaviour.seconds if isinstance(behaviour, Slow) else None
        if not context.add_callback(ended.set) or ended.wait(seconds):
            raise Refused(StatusCode.CANCELLED, "the client has gone")


def distorted(behaviour: Behaviour | None, answers: list[Pb]) -> list[Pb]:
    if isinstance(behaviour, EmptyStream):
        return []
    if isinstance(behaviour, CountAs):
        for answer in answers:
            counts = answer.result.aggregate_fields
            for alias in list(counts):
                if behaviour.value is None:
                    del counts[alias]
                else:
                    counts[alias].integer_value = behaviour.value
    return answers


def abort(context: Any, refused: Refused) -> list[Pb]:
    if refused.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(refused.retry_after_seconds * 1e9))
        status = Status(code=refused.code.value[0], message=refused.message)
        status.details.add().Pack(RetryInfo(retry_delay=delay))
        context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(refused.code, refused.message)
    return []  # never reached: abort raises


# --- A request in words ----------------------------------------------------------------------


def describe(number: int, method: str, request: Pb) -> Call:
    """The call as it was asked, before anything in it has been checked."""
    call = Call(
        number,
        method,
        KINDS[method],
        database=database_of(request),
        transaction=bool(getattr(request, "transaction", b"")),
    )
    match call.kind:
        case "count":
            asked = request.structured_aggregation_query
            caps = [item.count.up_to for item in asked.aggregations if item.count.HasField("up_to")]
            described = describe_query(call, request.parent, asked.structured_query)
            return replace(described, up_to=caps[0].value if caps else None)
        case "query":
            return describe_query(call, request.parent, request.structured_query)
        case "get":
            return replace(call, documents=tuple(map(relative, request.documents)))
        case "commit":
            return replace(call, documents=tuple(relative(written(w)) for w in request.writes))
    return call


def describe_query(call: Call, parent: str, query: Pb) -> Call:
    source = next(iter(query.from_), None)
    group = "**" if source and source.all_descendants else ""
    names = (relative(parent), group, source.collection_id if source else "")
    return replace(
        call,
        path="/".join(filter(None, names)),
        filters=tuple(describe_filters(query.where)),
        limit=query.limit.value if query.HasField("limit") else None,
        select=tuple(item.field_path for item in query.select.fields)
        if query.HasField("select")
        else None,
    )


def describe_filters(where: Pb) -> Iterator[tuple[str, str, object]]:
    match where.WhichOneof("filter_type"):
        case "composite_filter":
            parts = [tuple(describe_filters(part)) for part in where.composite_filter.filters]
            if where.composite_filter.op == OR:
                yield "", "or", tuple(p[0] if len(p) == 1 else ("", "and", p) for p in parts)
            else:
                yield from itertools.chain.from_iterable(parts)
        case "field_filter":
            leaf = where.field_filter
            yield leaf.field.field_path, FIELD_OPERATORS.get(leaf.op, "?"), to_plain(leaf.value)
        case "unary_filter":
            yield (
                where.unary_filter.field.field_path,
                UNARY_OPERATORS.get(where.unary_filter.op, "?"),
                None,
            )


def database_of(request: Pb) -> str:
    """`projects/p/databases/d`, from whichever field of the request says it."""
    if hasattr(request, "database"):
        return str(request.database)
    found = NAME.fullmatch(request.parent)
    return found["root"] if found else str(request.parent)


# --- The methods: what they answer, and the reads that Firestore bills for it ----------------

Answer = tuple[list[Pb], int]


def aggregate(database: Database, request: Pb) -> Answer:
    asked = request.structured_aggregation_query
    plan = plan_query(request.parent, asked.structured_query)
    if not 1 <= len(asked.aggregations) <= MAX_AGGREGATIONS:
        raise invalid(f"A query has 1 to {MAX_AGGREGATIONS} aggregations.")
    transaction = transaction_of(database, request)
    counts: dict[str, Pb] = {}
    entries = 0
    for number, item in enumerate(asked.aggregations, 1):
        up_to = check_count(item)
        alias = item.alias or f"field_{number}"
        if alias in counts:
            raise invalid(f"Aggregation aliases contain duplicate alias: {alias}.")
        seen = read(transaction, partial(database.count, plan, up_to))
        counts[alias] = Value(integer_value=max(0, seen - plan.offset))
        entries = max(entries, seen)
    answer = CountResponse(
        result=AggregationResult(aggregate_fields=counts), read_time=timestamp(database.now())
    )
    return [answer], max(1, -(-entries // INDEX_ENTRIES_PER_READ))


def check_count(item: Pb) -> int | None:
    if item.WhichOneof("operator") != "count":
        raise Refused(StatusCode.UNIMPLEMENTED, "of the aggregations this fake has count only")
    if item.alias:
        field_path(item.alias if item.alias.isidentifier() else f"`{item.alias}`")
    if item.count.up_to.value < 0:
        raise invalid("The `up_to` value in a COUNT aggregation must not be negative.")
    return item.count.up_to.value if item.count.HasField("up_to") else None


def run_query(database: Database, request: Pb) -> Answer:
    plan = plan_query(request.parent, request.structured_query)
    found, skipped = read(transaction_of(database, request), partial(database.select, plan))
    now = timestamp(database.now())
    answers = [QueryResponse(document=doc.message(plan.select), read_time=now) for doc in found]
    answers = answers or [QueryResponse(read_time=now)]
    answers[0].skipped_results = skipped
    answers[-1].done = True
    return answers, max(1, len(found) + skipped)


def batch_get(database: Database, request: Pb) -> Answer:
    names = [check_document_name(name, database.name) for name in dict.fromkeys(request.documents)]
    mask = [field_path(text) for text in request.mask.field_paths]
    transaction = transaction_of(database, request)
    now = timestamp(database.now())
    answers = []
    for name in names:
        stored = read(transaction, partial(database.get, name))
        if stored:
            found = stored.message(mask if request.HasField("mask") else None)
            answers.append(BatchGetResponse(found=found, read_time=now))
        else:
            answers.append(BatchGetResponse(missing=name, read_time=now))
    return answers, len(names)


def read(transaction: Transaction | None, reading: Callable[[], Any]) -> Any:
    seen = reading()
    if transaction and not transaction.read_only:
        transaction.readings.append((reading, seen))
    return seen


def transaction_of(database: Database, request: Pb) -> Transaction | None:
    if request.WhichOneof("consistency_selector") in ("read_time", "new_transaction"):
        raise Refused(StatusCode.UNIMPLEMENTED, "reading the past is not in this fake")
    return database.transaction(request.transaction)


def begin(database: Database, request: Pb) -> Answer:
    key = f"transaction-{next(database.ids)}".encode()
    database.transactions[key] = Transaction(request.options.HasField("read_only"))
    return [BeginResponse(transaction=key)], 0


def rollback(database: Database, request: Pb) -> Answer:
    if request.transaction not in database.transactions:
        raise invalid("Invalid transaction.")
    database.transactions[request.transaction] = None
    return [Empty()], 0


def commit(database: Database, request: Pb) -> Answer:
    transaction = database.transaction(request.transaction)
    if transaction and transaction.read_only and request.writes:
        raise invalid("Cannot modify entities in a read-only transaction.")
    if transaction:
        database.transactions[request.transaction] = None
    results = database.commit(request.writes, transaction)
    return [CommitResponse(write_results=results, commit_time=timestamp(database.last_micros))], 0


def batch_write(database: Database, request: Pb) -> Answer:
    """Each write for itself: one that fails takes none of the others with it."""
    names = [written(item) for item in request.writes]
    if len(set(names)) < len(names):
        raise invalid("the same document cannot be written more than once in a single request")
    answer = BatchWriteResponse()
    for item in request.writes:
        try:
            answer.write_results.extend(database.commit([item]))
            answer.status.add()
        except Refused as refused:
            answer.write_results.add()
            answer.status.add(code=refused.code.value[0], message=refused.message)
    return [answer], 0


METHODS: dict[str, tuple[Any, Callable[[Database, Pb], Answer]]] = {
    "RunAggregationQuery": (firestore.RunAggregationQueryRequest, aggregate),
    "RunQuery": (firestore.RunQueryRequest, run_query),
    "BatchGetDocuments": (firestore.BatchGetDocumentsRequest, batch_get),
    "Commit": (firestore.CommitRequest, commit),
    "BatchWrite": (firestore.BatchWriteRequest, batch_write),
    "BeginTransaction": (firestore.BeginTransactionRequest, begin),
    "Rollback": (firestore.RollbackRequest, rollback),
}

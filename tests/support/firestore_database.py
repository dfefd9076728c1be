"""What Firestore does with documents, without the network: values, queries, transactions, writes.

The limits and the answers are those of the real service's native mode; messages are worded as
the official emulator words them, so that one set of contract tests can read both.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from google.cloud.firestore_v1.field_path import parse_field_path
from google.cloud.firestore_v1.types import document, write
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]
from grpc import StatusCode  # type: ignore[import-untyped]

Pb = Any  # a message of the Firestore API: Google's generated classes carry no types
Value: Pb = document.Value.pb()
MapValue: Pb = document.MapValue.pb()
ArrayValue: Pb = document.ArrayValue.pb()
Document: Pb = document.Document.pb()

MAX_IN_VALUES = 30
MAX_NOT_IN_VALUES = 10
MAX_DISJUNCTIONS = 30
MAX_DOCUMENT_BYTES = 1_048_576
MAX_ID_BYTES = 1_500
INT64 = 2**63

NAME = re.compile(
    r"(?P<root>projects/(?P<project>[^/]+)/databases/(?P<database>[^/]+))"
    r"/documents(?:/(?P<path>.+))?"
)
NAME_FIELD = ("__name__",)
RESERVED = re.compile(r"__.*__", re.DOTALL)
NUMERIC_ID = re.compile(r"__id(-?\d+)__")

FIELD_OPERATORS = {
    1: "<", 2: "<=", 3: ">", 4: ">=", 5: "==", 6: "!=",
    7: "array-contains", 8: "in", 9: "array-contains-any", 10: "not-in",
}  # fmt: skip
AND, OR = 1, 2
DESCENDING = 2
UNARY_OPERATORS = {2: "is-nan", 3: "is-null", 4: "is-not-nan", 5: "is-not-null"}
RANGES = {"<", "<=", ">", ">="}
NEGATIONS = {"!=", "not-in", "is-not-nan", "is-not-null"}
LIST_LIMITS = {
    "in": MAX_IN_VALUES, "array-contains-any": MAX_IN_VALUES, "not-in": MAX_NOT_IN_VALUES,
}  # fmt: skip


class Refused(Exception):
    """An answer of the service that is not OK."""

    def __init__(
        self, code: StatusCode, message: str, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds


def invalid(message: str) -> Refused:
    return Refused(StatusCode.INVALID_ARGUMENT, message)


# --- Values ----------------------------------------------------------------------------------


def to_value(plain: object) -> Pb:
    match plain:
        case None:
            return Value(null_value=0)
        case bool():
            return Value(boolean_value=plain)
        case int():
            return Value(integer_value=plain)
        case float():
            return Value(double_value=plain)
        case str():
            return Value(string_value=plain)
        case bytes():
            return Value(bytes_value=plain)
        case datetime():
            micros = (plain - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
            return Value(timestamp_value=timestamp(micros))
        case Mapping():
            return Value(map_value=MapValue(fields={k: to_value(v) for k, v in plain.items()}))
        case Sequence():
            return Value(array_value=ArrayValue(values=[to_value(item) for item in plain]))
    raise TypeError(f"not a Firestore value: {plain!r}")


def to_plain(value: Pb) -> object:
    kind = value.WhichOneof("value_type")
    match kind:
        case "null_value" | None:
            return None
        case "timestamp_value":
            return value.timestamp_value.ToDatetime(tzinfo=UTC)
        case "reference_value":
            return relative(value.reference_value)
        case "geo_point_value":
            return (value.geo_point_value.latitude, value.geo_point_value.longitude)
        case "array_value":
            return [to_plain(item) for item in value.array_value.values]
        case "map_value":
            return {key: to_plain(item) for key, item in value.map_value.fields.items()}
    return getattr(value, kind)


def order_key(value: Pb) -> tuple[Any, ...]:
    """Sorts values of all types as Firestore does; equal values have equal keys."""
    match value.WhichOneof("value_type"):
        case "null_value":
            return (0,)
        case "boolean_value":
            return (1, value.boolean_value)
        case "integer_value":
            return (2, 1, value.integer_value)
        case "double_value":
            number = value.double_value
            return (2, 0) if math.isnan(number) else (2, 1, number)
        case "timestamp_value":
            return (3, value.timestamp_value.seconds, value.timestamp_value.nanos)
        case "string_value":
            return (4, value.string_value.encode())
        case "bytes_value":
            return (5, value.bytes_value)
        case "reference_value":
            return (6, *map(id_key, value.reference_value.split("/")))
        case "geo_point_value":
            return (7, value.geo_point_value.latitude, value.geo_point_value.longitude)
        case "array_value":
            return (8, tuple(map(order_key, value.array_value.values)))
        case "map_value":
            fields = value.map_value.fields
            return (9, tuple((key.encode(), order_key(fields[key])) for key in sorted(fields)))
    raise invalid("Cannot convert firestore.v1.Value with type unset.")


def id_key(segment: str) -> tuple[int, int, bytes]:
    numeric = NUMERIC_ID.fullmatch(segment)
    return (0, int(numeric[1]), b"") if numeric else (1, 0, segment.encode())


def is_nan(value: Pb) -> bool:
    return math.isnan(value.double_value)


def timestamp(micros: int) -> Timestamp:
    return Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1_000)


def check_value(value: Pb, *, in_array: bool = False) -> None:
    match value.WhichOneof("value_type"):
        case None:
            raise invalid("Cannot convert firestore.v1.Value with type unset.")
        case "array_value":
            if in_array:
                raise invalid("Cannot convert an array value in an array value.")
            for item in value.array_value.values:
                check_value(item, in_array=True)
        case "map_value":
            check_fields(value.map_value.fields)


def check_fields(fields: Mapping[str, Pb]) -> None:
    for key, value in fields.items():
        if not key or RESERVED.fullmatch(key):
            raise invalid(f"field name {key} is reserved")
        check_value(value)


# --- Names and fields ------------------------------------------------------------------------


def relative(name: str) -> str:
    """The path below `documents`, as people write it."""
    found = NAME.fullmatch(name)
    return (found["path"] or "") if found else name


def check_document_name(name: str, database: str) -> str:
    found = NAME.fullmatch(name)
    segments = (found["path"] or "").split("/") if found else []
    if not found or len(segments) % 2:
        raise invalid(f'Document name "{name}" lacks "/" at index {len(name)}.')
    if found["root"] != database:
        raise invalid(f'Document name "{name}" is not in the database "{database}".')
    for segment in segments:
        check_id(segment)
    return name


def check_parent(name: str) -> None:
    """The root, or a document, which need not exist."""
    path = relative(name)
    if path and path.count("/") % 2 == 0:
        raise invalid(f'Document parent name "{name}" lacks "/" at index {len(name)}.')


def check_id(segment: str) -> None:
    if segment in ("", ".", ".."):
        raise invalid(f'Document name contains a resource id "{segment}".')
    if RESERVED.fullmatch(segment) and not NUMERIC_ID.fullmatch(segment):
        raise invalid(f'Resource id "{segment}" is invalid because it is reserved.')
    if len(segment.encode()) > MAX_ID_BYTES:
        raise invalid(f"The key path element name is longer than {MAX_ID_BYTES} bytes.")


@dataclass(frozen=True, slots=True)
class Stored:
    """A document as it is kept: replaced by every write, never changed."""

    name: str
    fields: Mapping[str, Pb]
    created_micros: int
    updated_micros: int

    def at(self, path: Sequence[str]) -> Pb | None:
        if path == NAME_FIELD:
            return Value(reference_value=self.name)
        value = self.fields.get(path[0])
        for part in path[1:]:
            value = value and value.map_value.fields.get(part)
        return value

    def message(self, mask: Iterable[Sequence[str]] | None = None) -> Pb:
        fields: Mapping[str, Pb] = self.fields if mask is None else {}
        for path in mask or ():
            if path != NAME_FIELD and (value := self.at(path)) is not None:
                fields = with_field(fields, path, value)
        return Document(
            name=self.name,
            fields=fields,
            create_time=timestamp(self.created_micros),
            update_time=timestamp(self.updated_micros),
        )


def field_path(text: str) -> tuple[str, ...]:
    try:
        path = tuple(parse_field_path(text)) if text else ()
    except ValueError:
        path = ()
    if not all(path) or not path:
        raise invalid(f'Invalid property path "{text}".')
    if path != NAME_FIELD and any(map(RESERVED.fullmatch, path)):
        raise invalid(f"Invalid reserved name in field path {text}")
    return path


def with_field(fields: Mapping[str, Pb], path: Sequence[str], value: Pb | None) -> dict[str, Pb]:
    """A copy of the fields with the one at `path` set, or removed where `value` is None."""
    head, rest = path[0], path[1:]
    changed = dict(fields)
    if rest:
        inside = fields[head].map_value.fields if head in fields else {}
        if value is None and not inside:
            return changed
        value = Value(map_value=MapValue(fields=with_field(inside, rest, value)))
    if value is None:
        changed.pop(head, None)
    else:
        changed[head] = value
    return changed


# --- Queries ---------------------------------------------------------------------------------

Predicate = Callable[[Stored], bool]


@dataclass(frozen=True)
class Plan:
    """A checked query: where to look, what to keep, in which order."""

    parent: str
    collection: str
    group: bool
    keep: Predicate
    order: tuple[tuple[tuple[str, ...], bool], ...]  # field path, descending?
    offset: int
    limit: int | None
    select: tuple[tuple[str, ...], ...] | None

    def looks_at(self, collection_name: str) -> bool:
        parent, _, collection = collection_name.rpartition("/")
        if self.collection not in ("", collection):
            return False
        return parent == self.parent or (self.group and parent.startswith(f"{self.parent}/"))

    def matches(self, stored: Stored) -> bool:
        # A document without a field that the query sorts by is not in its index.
        return self.keep(stored) and all(
            path == NAME_FIELD or stored.at(path) is not None for path, _ in self.order
        )


def plan_query(parent: str, query: Pb) -> Plan:
    if query.HasField("start_at") or query.HasField("end_at") or query.HasField("find_nearest"):
        raise Refused(StatusCode.UNIMPLEMENTED, "cursors and vectors are not in this fake")
    check_parent(parent)
    source = check_source(query)
    leaves = list(filter_leaves(query.where))
    check_negations(leaves, query.where)
    check_disjunctions(query.where)
    if query.offset < 0 or query.limit.value < 0:
        raise invalid("limit is negative" if query.limit.value < 0 else "offset is negative")
    return Plan(
        parent=parent,
        collection=source.collection_id,
        group=source.all_descendants,
        keep=predicate(query.where),
        order=effective_order(query, leaves),
        offset=query.offset,
        limit=query.limit.value if query.HasField("limit") else None,
        select=selected(query),
    )


def check_source(query: Pb) -> Pb:
    sources = query.from_
    if len(sources) != 1:
        raise invalid("StructuredQuery.from must have exactly one collection selector here.")
    name = sources[0].collection_id
    if "/" in name:
        raise invalid(f'Collection id "{name}" is invalid because it contains "/".')
    if RESERVED.fullmatch(name):
        raise invalid(f'Collection id "{name}" is invalid because it is reserved.')
    return sources[0]


def selected(query: Pb) -> tuple[tuple[str, ...], ...] | None:
    if not query.HasField("select"):
        return None
    return tuple(field_path(reference.field_path) for reference in query.select.fields)


def filter_leaves(where: Pb) -> Iterator[tuple[str, str]]:
    """Field and operator of every filter, however deep."""
    if where.HasField("composite_filter") and where.composite_filter.op not in (AND, OR):
        raise invalid("Unknown CompositeFilter operator.")
    for part in where.composite_filter.filters:
        yield from filter_leaves(part)
    for kind, operators in (("field_filter", FIELD_OPERATORS), ("unary_filter", UNARY_OPERATORS)):
        if where.HasField(kind):
            leaf = getattr(where, kind)
            if leaf.op not in operators:
                raise invalid("Unknown filter operator.")
            yield leaf.field.field_path, operators[leaf.op]


def check_negations(leaves: list[tuple[str, str]], where: Pb) -> None:
    operators = [operator for _, operator in leaves]
    if sum(operator in NEGATIONS for operator in operators) > 1:
        raise invalid(
            "Only a single 'NOT_EQUAL', 'NOT_IN', 'IS_NOT_NAN', or 'IS_NOT_NULL' filter "
            "allowed per query."
        )
    if "not-in" in operators and (
        {"in", "array-contains-any"} & set(operators) or disjunctions(where)[0] > 1
    ):
        raise invalid(
            "'NOT_IN' cannot be used in the same query with 'IN', 'ARRAY_CONTAINS_ANY' or 'OR'."
        )


def check_disjunctions(where: Pb) -> None:
    count, array_filters = disjunctions(where)
    if count > MAX_DISJUNCTIONS:
        raise invalid(
            f"Too many disjunctions after normalization. Result had {count} disjunctions "
            f"which is more than the maximum of {MAX_DISJUNCTIONS}"
        )
    if array_filters > 1:
        raise invalid("A maximum of 1 'ARRAY_CONTAINS' filter is allowed per disjunction.")


def disjunctions(where: Pb) -> tuple[int, int]:
    """In disjunctive normal form: how many terms, and the most array filters in one of them."""
    if where.HasField("composite_filter"):
        parts = [disjunctions(part) for part in where.composite_filter.filters] or [(1, 0)]
        terms, arrays = [part[0] for part in parts], [part[1] for part in parts]
        if where.composite_filter.op == OR:
            return sum(terms), max(arrays)
        return math.prod(terms), sum(arrays)
    operator = FIELD_OPERATORS.get(where.field_filter.op, "")
    values = len(where.field_filter.value.array_value.values)
    terms_here = max(1, values) if operator in ("in", "array-contains-any") else 1
    if operator in LIST_LIMITS and values > LIST_LIMITS[operator]:
        terms_here = 1  # the filter's own limit is the better message
    return terms_here, int(operator.startswith("array-contains"))


def effective_order(
    query: Pb, leaves: list[tuple[str, str]]
) -> tuple[tuple[tuple[str, ...], bool], ...]:
    """The order asked for, then that of the fields compared by inequality, then the name."""
    order = [
        (field_path(item.field.field_path), item.direction == DESCENDING) for item in query.order_by
    ]
    named = [path for path, _ in order]
    if len(set(named)) < len(named):
        raise invalid("order by clause cannot contain duplicate fields")
    if order[:1] == [(NAME_FIELD, True)]:
        raise Refused(StatusCode.FAILED_PRECONDITION, "no index is sorted by descending names")
    descending = bool(order) and order[-1][1]
    inequalities = {field_path(name) for name, op in leaves if op in RANGES | NEGATIONS}
    implied = [*sorted(inequalities - {NAME_FIELD}), NAME_FIELD]
    return (*order, *((path, descending) for path in implied if path not in named))


def predicate(where: Pb) -> Predicate:
    match where.WhichOneof("filter_type"):
        case "composite_filter":
            parts = [predicate(part) for part in where.composite_filter.filters]
            if where.composite_filter.op == OR:
                return lambda stored: any(part(stored) for part in parts)
            return lambda stored: all(part(stored) for part in parts)
        case "field_filter":
            return field_predicate(where.field_filter)
        case "unary_filter":
            return unary_predicate(where.unary_filter)
    return lambda stored: True


def on_field(path: tuple[str, ...], test: Callable[[Pb], bool]) -> Predicate:
    def check(stored: Stored) -> bool:
        value = stored.at(path)
        return value is not None and test(value)

    return check


def unary_predicate(unary: Pb) -> Predicate:
    path = field_path(unary.field.field_path)
    if path == NAME_FIELD:
        raise invalid("__key__ filter value must be a Key")
    tests: dict[str, Callable[[Pb], bool]] = {
        "is-nan": is_nan,
        "is-null": lambda value: value.HasField("null_value"),
        "is-not-nan": lambda value: not is_nan(value) and not value.HasField("null_value"),
        "is-not-null": lambda value: not value.HasField("null_value"),
    }
    return on_field(path, tests[UNARY_OPERATORS[unary.op]])


def field_predicate(leaf: Pb) -> Predicate:
    path = field_path(leaf.field.field_path)
    operator = FIELD_OPERATORS[leaf.op]
    given = [leaf.value]
    if operator in LIST_LIMITS:
        given = check_list(operator.upper().replace("-", "_"), leaf.value, LIST_LIMITS[operator])
    names = all(value.HasField("reference_value") for value in given)
    if path == NAME_FIELD and (operator.startswith("array-") or not names):
        raise invalid("__key__ filter value must be a Key")
    return on_field(path, value_test(operator, given))


def check_list(label: str, value: Pb, limit: int) -> list[Pb]:
    if not value.HasField("array_value"):
        raise invalid(f"'{label}' requires an ArrayValue.")
    values = list(value.array_value.values)
    if not values:
        raise invalid(f"'{label}' requires an non-empty ArrayValue.")
    if len(values) > limit:
        raise invalid(f"'{label}' supports up to {limit} comparison values.")
    return values


def value_test(operator: str, given: list[Pb]) -> Callable[[Pb], bool]:
    """Null and NaN are found by the unary filters only: here they equal nothing."""
    has_null = any(value.HasField("null_value") for value in given)
    keys = {order_key(v) for v in given if not v.HasField("null_value") and not is_nan(v)}
    key = order_key(given[0])
    comparable = key in keys
    # A range stays within the type of its bound, and NaN, the least number, in none.
    least = (2, 1) if key[0] == 2 else key[:1]
    match operator:
        case "==" | "in":
            return lambda value: order_key(value) in keys
        case "!=" | "not-in":
            return lambda value: (
                not has_null and not value.HasField("null_value") and order_key(value) not in keys
            )
        case "array-contains" | "array-contains-any":
            return lambda value: any(order_key(v) in keys for v in value.array_value.values)
        case "<":
            return lambda value: comparable and least <= order_key(value) < key
        case "<=":
            return lambda value: comparable and least <= order_key(value) <= key
        case ">":
            return lambda value: comparable and key < order_key(value) < (key[0] + 1,)
    return lambda value: comparable and key <= order_key(value) < (key[0] + 1,)


# --- Transactions and writes -----------------------------------------------------------------


@dataclass
class Transaction:
    """What it has read: each reading with what it saw, to be repeated at the commit."""

    read_only: bool
    readings: list[tuple[Callable[[], object], object]] = field(default_factory=list)


class Database:
    """The documents of one database by collection, and its open transactions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = f"{name}/documents"
        self.collections: dict[str, dict[str, Stored]] = {}
        self.transactions: dict[bytes, Transaction | None] = {}  # None: closed
        self.ids = itertools.count(1)
        self.last_micros = 0

    def now(self) -> int:
        """Microseconds since 1970, never the same twice: update times tell writes apart."""
        self.last_micros = max(time.time_ns() // 1_000, self.last_micros + 1)
        return self.last_micros

    def get(self, name: str) -> Stored | None:
        return self.collections.get(name.rpartition("/")[0], {}).get(name)

    def store(self, name: str, stored: Stored | None) -> None:
        collection = self.collections.setdefault(name.rpartition("/")[0], {})
        if stored is None:
            collection.pop(name, None)
        else:
            collection[name] = stored

    def matching(self, plan: Plan) -> Iterator[Stored]:
        found = [docs for name, docs in self.collections.items() if plan.looks_at(name)]
        return filter(plan.matches, itertools.chain.from_iterable(map(dict.values, found)))

    def select(self, plan: Plan) -> tuple[list[Stored], int]:
        """The documents in order, and how many the offset skipped."""
        found = list(self.matching(plan))
        for path, descending in reversed(plan.order):
            found.sort(key=lambda stored: order_key(stored.at(path)), reverse=descending)
        end = None if plan.limit is None else plan.offset + plan.limit
        return found[plan.offset : end], min(plan.offset, len(found))

    def count(self, plan: Plan, up_to: int | None) -> int:
        """How many index entries are looked at, those that the offset skips included."""
        caps = [cap for cap in (plan.limit, up_to) if cap is not None]
        end = plan.offset + min(caps) if caps else None
        return sum(1 for _ in itertools.islice(self.matching(plan), end))

    def transaction(self, key: bytes) -> Transaction | None:
        if not key:
            return None
        if transaction := self.transactions.get(key):
            return transaction
        raise invalid("Transaction is invalid or closed.")

    def commit(self, writes: Iterable[Pb], transaction: Transaction | None = None) -> list[Pb]:
        """All writes or none; none where something that the transaction read has changed."""
        if transaction and any(reading() != seen for reading, seen in transaction.readings):
            raise Refused(
                StatusCode.ABORTED,
                "Aborted due to cross-transaction contention. This occurs when multiple "
                "transactions attempt to access the same data, requiring Firestore to abort at "
                "least one in order to enforce serializability.",
            )
        now = self.now()
        before: dict[str, Stored | None] = {}
        results = []
        try:
            for item in writes:
                if not (name := written(item)):
                    raise invalid("empty write operation")
                check_document_name(name, self.name)
                before.setdefault(name, self.get(name))
                results.append(self.apply(item, name, now))
        except Refused:
            for name, stored in before.items():
                self.store(name, stored)
            raise
        return results

    def apply(self, item: Pb, name: str, now: int) -> Pb:
        held = self.get(name)
        check_precondition(item.current_document, held, name)
        if item.HasField("delete"):
            self.store(name, None)
            return write.WriteResult.pb()()
        fields = updated_fields(item, held)
        results = []
        for change in (*item.update_transforms, *item.transform.field_transforms):
            path = field_path(change.field_path)
            value, result = transformed(Stored(name, fields, 0, 0).at(path), change, now)
            fields = with_field(fields, path, value)
            results.append(result)
        if held is None or fields != held.fields:
            held = Stored(name, fields, held.created_micros if held else now, now)
            if held.message().ByteSize() > MAX_DOCUMENT_BYTES:
                raise invalid(f"A document cannot be larger than {MAX_DOCUMENT_BYTES} bytes.")
            self.store(name, held)
        return write.WriteResult.pb()(
            update_time=timestamp(held.updated_micros), transform_results=results
        )


def written(item: Pb) -> str:
    return str(item.update.name or item.delete or item.transform.document)


def check_precondition(condition: Pb, held: Stored | None, name: str) -> None:
    match condition.WhichOneof("condition_type"):
        case "exists" if condition.exists and held is None:
            raise Refused(StatusCode.NOT_FOUND, f"No document to update: {name}")
        case "exists" if not condition.exists and held is not None:
            raise Refused(StatusCode.ALREADY_EXISTS, f"Document already exists: {name}")
        case "update_time":
            wanted = condition.update_time.ToMicroseconds()
            stored = held.updated_micros if held else 0
            if stored != wanted:
                raise Refused(
                    StatusCode.FAILED_PRECONDITION,
                    f"the stored version ({stored}) does not match the required base version "
                    f"({wanted})",
                )


def updated_fields(item: Pb, held: Stored | None) -> dict[str, Pb]:
    given = dict(item.update.fields)
    check_fields(given)
    if item.HasField("update") and not item.HasField("update_mask"):
        return given
    fields = dict(held.fields) if held else {}
    source = Stored("", given, 0, 0)
    for text in item.update_mask.field_paths:
        path = field_path(text)
        fields = with_field(fields, path, source.at(path))
    return fields


def transformed(held: Pb | None, change: Pb, now: int) -> tuple[Pb, Pb]:
    """The field's new value, and what the write reports for it."""
    kind = change.WhichOneof("transform_type")
    if kind == "set_to_server_value":
        value = Value(timestamp_value=timestamp(now // 1_000 * 1_000))
    elif kind in ("append_missing_elements", "remove_all_from_array"):
        elements = list(held.array_value.values) if held is not None else []
        given = {order_key(value): value for value in getattr(change, kind).values}
        if kind == "append_missing_elements":
            present = set(map(order_key, elements))
            elements += [value for key, value in given.items() if key not in present]
        else:
            elements = [value for value in elements if order_key(value) not in given]
        return Value(array_value=ArrayValue(values=elements)), Value(null_value=0)
    else:
        value = arithmetic(kind or "", held, getattr(change, kind or "increment"))
    return value, value


def arithmetic(kind: str, held: Pb | None, given: Pb) -> Pb:
    if held is None or order_key(held)[0] != order_key(given)[0]:
        return given
    if kind == "increment":
        total = to_number(held) + to_number(given)
        if isinstance(total, int):
            total = max(-INT64, min(INT64 - 1, total))
        return to_value(total)
    larger = order_key(given) > order_key(held)
    smaller = order_key(given) < order_key(held)
    return given if (larger if kind == "maximum" else smaller) else held


def to_number(value: Pb) -> int | float:
    number: int | float = getattr(value, value.WhichOneof("value_type"))
    return number

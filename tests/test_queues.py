"""docs/queues.md: every recipe counts what the page says, with the indexes that Firestore needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
import yaml
from google.cloud.firestore import Client

from tests.support.kubernetes_objects import Object
from tests.support.world import REPOSITORY, START, World

PAGE = REPOSITORY / "docs" / "queues.md"
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
INEQUALITIES = ("<", "<=", ">", ">=", "!=", "not-in")
EAGER = {
    "MIN_REPLICAS": "0",
    "MAX_REPLICAS": "20",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}


@dataclass
class Recipe:
    title: str
    settings: dict[str, str]
    jobs: list[tuple[str, Any, str]]  # path, fields, and what it counts as
    indexes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.title


def recipes() -> Iterator[Recipe]:
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        settings = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        indexes = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if not settings:
            continue
        env = {one["name"]: one["value"] for one in yaml.safe_load(settings[0])["env"]}
        rows = re.findall(r"^\| `(\S+)` `(.*)` \| (\w+).* \|$", text, re.MULTILINE)
        jobs = [(path, json.loads(fields), counts) for path, fields, counts in rows]
        yield Recipe(title, env, jobs, json.loads(indexes[0]) if indexes else {})


RECIPES = list(recipes())
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def test_the_page_has_a_dozen_recipes_and_each_has_all_its_parts() -> None:
    assert len(RECIPES) > 12
    text = PAGE.read_text()
    assert text.count("\nIndex: none.\n") + text.count("```json\n") == len(RECIPES)
    assert text.count("\n| `") == sum(len(recipe.jobs) for recipe in RECIPES)
    for recipe in RECIPES:
        kinds = {counts for _, _, counts in recipe.jobs}
        busy = {"busy"} if "BUSY_FILTER" in recipe.settings else set()
        assert kinds == {"waiting", "nothing"} | busy, recipe


# --- On the emulator ----------------------------------------------------------------------------


def plain(value: Any, jobs: Client) -> Any:
    """A value of the page as the client writes it."""
    if isinstance(value, list):
        return [plain(one, jobs) for one in value]
    if not isinstance(value, dict):
        return value
    if "referenceValue" in value:
        return jobs.document(value["referenceValue"])
    if "timestampValue" in value:
        return time(value["timestampValue"])
    return {name: plain(one, jobs) for name, one in value.items()}


def time(text: str) -> datetime:
    number, unit = re.fullmatch(r"now([+-]\d+)([smhd])", text).groups()  # type: ignore[union-attr]
    return START + timedelta(**{UNITS[unit]: int(number)})


def fill(recipe: Recipe, jobs: Client, pods: list[Object], *kinds: str) -> None:
    """The page's jobs of these kinds, the busy ones held by the last pod."""
    name = pods[-1]["metadata"]["name"]
    for path, fields, counts in recipe.jobs:
        if counts in kinds:
            fields = json.loads(json.dumps(fields).replace('"POD"', json.dumps(name)))
            jobs.document(path).set(plain(fields, jobs))


@each_recipe
def test_a_recipe_counts_what_it_says(recipe: Recipe, emulated: World, jobs: Client) -> None:
    emulated.cluster.scale("worker", 3)
    fill(recipe, jobs, emulated.cluster.pods("worker"), "waiting", "busy", "nothing")
    run = emulated.run("--dry-run", **recipe.settings, MAX_REPLICAS="20")
    assert run.exit_code == 0, run
    counts = [kind for _, _, kind in recipe.jobs]
    busy = counts.count("busy") if "BUSY_FILTER" in recipe.settings else None
    assert (run.record["waiting"], run.record["busy"]) == (counts.count("waiting"), busy), run
    if "WAITING_SINCE_FIELD" in recipe.settings:
        assert run.record["oldestWaitingSeconds"] == 720, run


@pytest.mark.parametrize(
    "recipe", [one for one in RECIPES if "BUSY_FILTER" in one.settings], ids=str
)
def test_a_recipe_protects_its_busy_pod(recipe: Recipe, emulated: World, jobs: Client) -> None:
    emulated.cluster.scale("worker", 3)
    before = emulated.cluster.pods("worker")
    fill(recipe, jobs, before, "busy", "nothing")
    run = emulated.run(**recipe.settings, **EAGER)
    assert (run.reason, emulated.replicas) == ("ScaledDown", 1), run
    [left] = emulated.cluster.pods("worker")
    assert left["metadata"]["name"] == before[-1]["metadata"]["name"], run


# --- Indexes: the emulator needs none, so these follow Firestore's rules ------------------------

# Collection, scope, fields with equalities, those with arrays, and those that order, in any order.
Index = tuple[str, str, frozenset[str], frozenset[str], frozenset[str]]


def queries(settings: dict[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Field and operator of every condition of each query, one query for each alternative."""
    pod, since = settings.get("BUSY_POD_FIELD", ""), settings.get("WAITING_SINCE_FIELD")
    for one in alternatives(settings["WAITING_FILTER"]):
        yield one
        if since:
            yield [*one, (since, "order")]
    for one in alternatives(settings["BUSY_FILTER"]) if "BUSY_FILTER" in settings else ():
        yield one
        yield [*one, (pod, "in")]


def alternatives(text: str) -> list[list[tuple[str, str]]]:
    given = json.loads(text)
    nested = given if given and isinstance(given[0][0], list) else [given]
    return [[(name, op) for name, op, _ in one] for one in nested]


def needed(settings: dict[str, str]) -> tuple[set[Index], set[tuple[str, str]]]:
    """The composite indexes, and the fields whose automatic index has to cover groups."""
    group = settings.get("QUEUE_COLLECTION_GROUP") == "true"
    scope = "COLLECTION_GROUP" if group else "COLLECTION"
    composite, single = set(), set()
    for path in settings["QUEUE_COLLECTION"].split(","):
        name = path.rpartition("/")[2]
        for query in queries(settings):
            order = frozenset(one for one, op in query if op in (*INEQUALITIES, "order"))
            arrays = frozenset(one for one, op in query if op.startswith("array-contains"))
            equal = frozenset(one for one, op in query if op in ("==", "in")) - order
            if order and len(order | arrays | equal) > 1:
                composite.add((name, scope, equal, arrays, order))
            elif group:
                single |= {(name, one) for one, _ in query}
    return composite, single


def parse_index(index: dict[str, Any], wanted: set[Index]) -> Index | dict[str, Any]:
    """The one of the wanted that an index on the page serves, else the index itself."""
    assert index.keys() == {"collectionGroup", "queryScope", "fields"}, index
    names = [one["fieldPath"] for one in index["fields"]]
    arrays = frozenset(one["fieldPath"] for one in index["fields"] if "arrayConfig" in one)
    for one in index["fields"]:
        assert one.items() - {("fieldPath", one["fieldPath"])} in (
            {("order", "ASCENDING")},
            {("arrayConfig", "CONTAINS")},
        ), index
    for want in wanted:
        name, scope, equal, in_arrays, order = want
        first = len(equal | in_arrays)
        if (
            (name, scope) == (index["collectionGroup"], index["queryScope"])
            and (frozenset(names[:first]), arrays) == (equal | in_arrays, in_arrays)
            and frozenset(names[first:]) == order
        ):
            return want
    return index


@each_recipe
def test_a_recipe_has_the_indexes_that_it_needs_and_no_others(recipe: Recipe) -> None:
    composite, single = needed(recipe.settings)
    shown = [parse_index(index, composite) for index in recipe.indexes.get("indexes", ())]
    assert sorted(map(str, shown)) == sorted(map(str, composite))
    overrides = recipe.indexes.get("fieldOverrides", [])
    assert {(one["collectionGroup"], one["fieldPath"]) for one in overrides} == single
    for one in overrides:
        kinds = [
            (index["queryScope"], index.get("order") or index["arrayConfig"])
            for index in one["indexes"]
        ]
        automatic = [("COLLECTION", kind) for kind in ("ASCENDING", "DESCENDING", "CONTAINS")]
        assert kinds == [*automatic, ("COLLECTION_GROUP", "ASCENDING")], one

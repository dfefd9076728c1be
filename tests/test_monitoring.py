"""docs/monitoring.md and examples/alerts.yaml: the rules by promtool, the filters of the page
against lines that the script prints, and that each reason is watched as the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import scaler
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_api import Answer, json_answer
from tests.support.needs import need
from tests.support.world import REPOSITORY, Run
from tests.test_manifests import CONTAINER, CRONJOB, VARIABLES, load

PAGE = (REPOSITORY / "docs/monitoring.md").read_text()
[ALERTS], [ALERTS_TEST] = load("examples/alerts.yaml"), load("tests/alerts_test.yaml")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
Object = dict[str, Any]


def blocks(language: str, word: str) -> str:
    """The code blocks of the page in which a word occurs, one after another."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return "".join(block for block in found if word in block)


@pytest.mark.slow
def test_the_alerts_fire_when_they_have_to_and_only_then() -> None:
    command = [need("promtool"), "test", "rules", "tests/alerts_test.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_both_ways_and_stands_on_the_page() -> None:
    names = {rule["alert"] for rule in RULES}
    tried = [one for each in ALERTS_TEST["tests"] for one in each["alert_rule_test"]]
    assert {one["alertname"] for one in tried if one["exp_alerts"]} == names
    assert {one["alertname"] for one in tried if not one["exp_alerts"]} == names
    assert names == set(re.findall(r"^\| `(QueueScaler\w+)` \|", PAGE, re.M))


def test_the_alerts_look_at_what_the_manifests_make() -> None:
    expressions = [rule["expr"] for rule in RULES]
    assert f'deployment="{VARIABLES["DEPLOYMENT"]}"' in expressions[-1]
    assert f">= {VARIABLES['MAX_REPLICAS']} " in expressions[-1]
    [overlay] = load("examples/overlay/kustomization.yaml")
    for suffix in ("", overlay["nameSuffix"]):
        for pattern in re.findall(r'(?:cronjob|owner_name)=~"([^"]*)"', "\n".join(expressions)):
            assert re.fullmatch(pattern, CRONJOB["metadata"]["name"] + suffix)


@pytest.mark.slow
def test_the_operator_gets_the_same_rules() -> None:
    """What the page's command pipes into kubectl, which here only shows it."""
    pasted = "kubectl() { [ \"$*\" = 'apply -f -' ] && cat; }\n" + blocks("bash", "PrometheusRule")
    applied = yaml.safe_load(subprocess.check_output(["bash", "-c", pasted], cwd=REPOSITORY))
    assert (applied["kind"], applied["spec"]) == ("PrometheusRule", ALERTS)


COMMANDS = [
    (command.split(), yaml.safe_load(body))
    for command, body in re.findall(r"^(gcloud [^\n]+)=- <<'EOF'\n(.*?)^EOF$", PAGE, re.M | re.S)
]
METRICS: dict[str, Object] = {words[4]: body for words, body in COMMANDS if words[2] == "metrics"}
POLICIES = [body for words, body in COMMANDS if words[2] == "policies"]
CONDITIONS = {one["displayName"]: one for policy in POLICIES for one in policy["conditions"]}


class TakesAnything(FakeKubernetes):
    """Its server, for Google's APIs: each object is made as it was sent."""

    bodies: tuple[Object, ...] = ()

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, None]:
        body = json.loads(raw)
        self.bodies += (body,)
        kind = target.partition("?")[0].rpartition("/")[2]
        return json_answer(200, {"name": f"projects/my-project/{kind}/1", **body}), None


@pytest.mark.slow
def test_gcloud_takes_the_commands(tmp_path: Path) -> None:
    """The real one, which knows its commands and options, with a server that takes anything."""
    gcloud, commands = need("gcloud"), blocks("bash", "gcloud")
    old = subprocess.run([gcloud, "monitoring", "policies", "--help"], capture_output=True)
    if old.returncode:
        commands = commands.replace("gcloud monitoring", "gcloud alpha monitoring")
    api = TakesAnything()
    with api:
        environ = {
            "PATH": os.environ["PATH"],
            "CLOUDSDK_CONFIG": str(tmp_path),
            "CLOUDSDK_CORE_PROJECT": "my-project",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{api.url}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_MONITORING": f"{api.url}/",
        }
        command = ["bash", "-eu", "-c", commands]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = [body for body in api.bodies if "metricDescriptor" in body]
    assert metrics == [{**metric, "name": name} for name, metric in METRICS.items()]
    policies = [body for body in api.bodies if "conditions" in body]
    channels = {"notificationChannels": ["projects/my-project/notificationChannels/1"]}
    assert policies == [policy | channels for policy in POLICIES]


SEVERITIES = ("DEFAULT", "DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL")


def matches(query: str, entry: Object) -> bool:
    """Whether an entry meets a query of Cloud Logging, as far as the page uses that language: terms
    with AND between them, of which one in parentheses may have OR inside."""
    terms = query.strip().split(" AND ")
    either = [term[1:-1].split(" OR ") if term.startswith("(") else [term] for term in terms]
    return all(any(meets(entry, one) for one in alternatives) for alternatives in either)


def meets(entry: Object, term: str) -> bool:
    """Any field may contain a bare string. A field that is missing or null meets no comparison."""
    if bare := re.fullmatch(r'"([^"]*)"', term):
        return bare[1].lower() in json.dumps(entry, ensure_ascii=False).lower()
    found = re.fullmatch(r'([\w.]+)(=~|>=|=)([\w."^\[\]-]+|\("[\w-]+"(?: OR "[\w-]+")*\))', term)
    assert found, f"this is not in the subset: {term}"
    path, operator, given = found.groups()
    there, wanted = at(path, entry), re.sub('[()"]', "", given).split(" OR ")
    if there is None:
        return False
    if operator == "=~":
        return re.search(wanted[0], there) is not None
    if operator == "=":
        return str(there).lower() in map(str.lower, wanted)
    rank: Callable[[Any], float] = SEVERITIES.index if path == "severity" else float
    return rank(there) >= rank(wanted[0])


def at(path: str, there: Any) -> Any:
    for key in path.split("."):
        there = there.get(key) if isinstance(there, Mapping) else None
    return there


def extracted(extractor: str, entry: Object) -> Any:
    return at(extractor.removeprefix("EXTRACT(").removesuffix(")"), entry)


def entries(run: Run) -> list[Object]:
    """The lines of a run as GKE's logging agent hands them on: `severity` and `time` become the
    entry's own, and where only `message` is left, it becomes text."""
    labels = {"container_name": CONTAINER["name"]}
    found = []
    for line in run.stdout.splitlines():
        payload = json.loads(line)
        entry = {
            "resource": {"type": "k8s_container", "labels": labels},
            "severity": payload.pop("severity"),
            "timestamp": payload.pop("time"),
        }
        text = {"textPayload": payload["message"]}
        found.append(entry | (text if payload.keys() == {"message"} else {"jsonPayload": payload}))
    return found


def fired(entry: Object) -> set[str]:
    return {name for name, condition in CONDITIONS.items() if counts_for(condition, entry)}


def counts_for(condition: Object, entry: Object) -> bool:
    """By itself, or by the reason that the metric takes from it."""
    if by_itself := condition.get("conditionMatchedLog"):
        return matches(by_itself["filter"], entry)
    series = (condition.get("conditionThreshold") or condition["conditionAbsent"])["filter"]
    [name] = re.findall(r'metric\.type="logging\.googleapis\.com/user/(\w+)"', series)
    reasons = re.findall(r'"(\w+)"', series.partition("metric.labels.reason=one_of")[2])
    assert set(reasons) <= set(get_args(scaler.Reason)), reasons
    reason = extracted(METRICS[name]["labelExtractors"]["reason"], entry)
    return reason in reasons and matches(METRICS[name]["filter"], entry)


def test_each_reason_is_watched_as_the_page_says(runs: list[Run]) -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \|(.*?)\|", PAGE.partition("### Each reason")[2], re.M)
    table = {
        reason: set(re.findall(r"`(\w+)`", watched))
        for reasons, watched in rows
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    assert table.keys() == set(get_args(scaler.Reason)) == {run.reason for run in runs}
    for run in runs:
        *warnings, entry = entries(run)
        for each in warnings:
            assert each["severity"] == "WARNING"
            assert fired(each) == ({"person"} if "two masters" in each["textPayload"] else set())
        severity = ("INFO", "WARNING", "ERROR")[run.exit_code]
        assert (entry["jsonPayload"]["reason"], entry["severity"]) == (run.reason, severity), run
        person = {"person"} if severity == "ERROR" else set()
        watched = set() if run.record["dryRun"] else table[run.reason]
        assert fired(entry) == watched | person, run
        found = matches(blocks("text", "jsonPayload"), entry)
        assert found is (run.record["action"] != "none"), "the query to begin with finds scales"
        for name, metric in METRICS.items():
            value = run.record[name.removeprefix("queue_scaler_").replace("reasons", "reason")]
            counts = value is not None and not run.record["dryRun"]
            assert matches(metric["filter"], entry) is counts, (name, run)
            if "valueExtractor" in metric:
                assert extracted(metric["valueExtractor"], entry) == value
            deployment = extracted(metric["labelExtractors"]["deployment"], entry)
            assert deployment == run.record["deployment"]


def test_other_peoples_lines_count_for_nothing(runs: list[Run]) -> None:
    for entry in (entry for run in runs for entry in entries(run)):
        entry["resource"]["labels"]["container_name"] = "worker"
        assert fired(entry) == set()
        assert not any(matches(metric["filter"], entry) for metric in METRICS.values())

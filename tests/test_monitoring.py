"""docs/monitoring.md and examples/alerts.yaml: the rules by promtool, the page's filters on lines
that the script prints, and each reason's alert as in the page's table."""

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
    """The page's code blocks that contain a word, joined."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return "".join(block for block in found if word in block)


@pytest.mark.slow
def test_the_alerts_fire_only_when_they_have_to() -> None:
    command = [need("promtool"), "test", "rules", "tests/alerts_test.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways_and_is_on_the_page() -> None:
    names = {rule["alert"] for rule in RULES}
    tried = [one for each in ALERTS_TEST["tests"] for one in each["alert_rule_test"]]
    assert {one["alertname"] for one in tried if one["exp_alerts"]} == names
    assert {one["alertname"] for one in tried if not one["exp_alerts"]} == names
    assert names == set(re.findall(r"^\| `(QueueScaler\w+)` \|", PAGE, re.M))


def test_the_alerts_match_the_names_in_the_manifests() -> None:
    expressions = [rule["expr"] for rule in RULES]
    assert f'deployment="{VARIABLES["DEPLOYMENT"]}"' in expressions[-1]
    assert f">= {VARIABLES['MAX_REPLICAS']} " in expressions[-1]
    [overlay] = load("examples/overlay/kustomization.yaml")
    for suffix in ("", overlay["nameSuffix"]):
        for pattern in re.findall(r'(?:cronjob|owner_name)=~"([^"]*)"', "\n".join(expressions)):
            assert re.fullmatch(pattern, CRONJOB["metadata"]["name"] + suffix)


@pytest.mark.slow
def test_the_page_loads_the_same_rules_with_the_label_of_kube_prometheus_stack() -> None:
    """What the page's command pipes into kubectl, which is a shell function here."""
    pasted = "kubectl() { [ \"$*\" = 'apply -f -' ] && cat; }\n" + blocks("bash", "PrometheusRule")
    applied = yaml.safe_load(subprocess.check_output(["bash", "-c", pasted], cwd=REPOSITORY))
    assert (applied["kind"], applied["spec"]) == ("PrometheusRule", ALERTS)
    assert applied["metadata"]["labels"] == {"release": "kube-prometheus-stack"}


COMMANDS = [
    (command.split(), yaml.safe_load(body))
    for command, body in re.findall(r"^(gcloud [^\n]+)=- <<'EOF'\n(.*?)^EOF$", PAGE, re.M | re.S)
]
METRICS: dict[str, Object] = {words[4]: body for words, body in COMMANDS if words[2] == "metrics"}
POLICIES = [body for words, body in COMMANDS if words[2] == "policies"]
CONDITIONS = {one["displayName"]: one for policy in POLICIES for one in policy["conditions"]}


class AcceptsAnything(FakeKubernetes):
    """Its server, for Google's APIs: creates each object as sent."""

    bodies: tuple[Object, ...] = ()

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, None]:
        body = json.loads(raw)
        self.bodies += (body,)
        kind = target.partition("?")[0].rpartition("/")[2]
        return json_answer(200, {"name": f"projects/my-project/{kind}/1", **body}), None


@pytest.mark.slow
def test_gcloud_accepts_the_commands(tmp_path: Path) -> None:
    """The real gcloud, which knows its commands and options, and a server that accepts anything."""
    gcloud, commands = need("gcloud"), blocks("bash", "gcloud")
    old = subprocess.run([gcloud, "monitoring", "policies", "--help"], capture_output=True)
    if old.returncode:
        commands = commands.replace("gcloud monitoring", "gcloud alpha monitoring")
    api = AcceptsAnything()
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
    """Whether an entry matches a query of Cloud Logging, in the subset that the page uses: terms
    joined by AND, and alternatives joined by OR in parentheses."""
    terms = query.strip().split(" AND ")
    either = [term[1:-1].split(" OR ") if term.startswith("(") else [term] for term in terms]
    return all(any(meets(entry, one) for one in alternatives) for alternatives in either)


def meets(entry: Object, term: str) -> bool:
    """A bare string matches in any field. A missing or null field matches no comparison."""
    if bare := re.fullmatch(r'"([^"]*)"', term):
        return bare[1].lower() in json.dumps(entry, ensure_ascii=False).lower()
    if pattern := re.fullmatch(r'([\w.]+)=~"([^"]+)"', term):
        return re.search(pattern[2], str(at(pattern[1], entry) or "")) is not None
    found = re.fullmatch(r'([\w.]+)(>=|=)([\w."-]+|\("[\w-]+"(?: OR "[\w-]+")*\))', term)
    assert found, f"this is not in the subset: {term}"
    path, operator, given = found.groups()
    there, wanted = at(path, entry), re.sub('[()"]', "", given).split(" OR ")
    if there is None:
        return False
    if operator == "=":
        return str(there).lower() in map(str.lower, wanted)
    rank: Callable[[Any], float] = SEVERITIES.index if path == "severity" else float
    return bool(rank(there) >= rank(wanted[0]))


def at(path: str, there: Any) -> Any:
    for key in path.split("."):
        there = there.get(key) if isinstance(there, Mapping) else None
    return there


def extracted(extractor: str, entry: Object) -> Any:
    return at(extractor.removeprefix("EXTRACT(").removesuffix(")"), entry)


def entries(run: Run) -> list[Object]:
    """A run's lines as GKE's logging agent forwards them: `severity` and `time` become fields of
    the entry itself."""
    labels = {"container_name": CONTAINER["name"]}
    found = []
    for line in run.stdout.splitlines():
        payload = json.loads(line)
        entry = {
            "resource": {"type": "k8s_container", "labels": labels},
            "severity": payload.pop("severity"),
            "timestamp": payload.pop("time"),
        }
        found.append(entry | {"jsonPayload": payload})
    return found


def fired(entry: Object) -> set[str]:
    return {name for name, condition in CONDITIONS.items() if counts_for(condition, entry)}


def counts_for(condition: Object, entry: Object) -> bool:
    """By itself, by the reason that the metric takes from it, or by the mean of this one value."""
    if by_itself := condition.get("conditionMatchedLog"):
        return matches(by_itself["filter"], entry)
    threshold = condition.get("conditionThreshold") or condition["conditionAbsent"]
    [name] = re.findall(r'metric\.type="logging\.googleapis\.com/user/(\w+)"', threshold["filter"])
    metric = METRICS[name]
    if not matches(metric["filter"], entry):
        return False
    if "valueExtractor" in metric:
        mean, limit = extracted(metric["valueExtractor"], entry), threshold["thresholdValue"]
        return float(mean) > float(limit)
    reasons = re.findall(
        r'"(\w+)"', threshold["filter"].partition("metric.labels.reason=one_of")[2]
    )
    assert set(reasons) <= set(get_args(scaler.Reason)), reasons
    return extracted(metric["labelExtractors"]["reason"], entry) in reasons


# The field of the record from which each metric takes its value.
FIELDS = {
    "queue_scaler_reasons": "reason",
    "queue_scaler_waiting": "waiting",
    "queue_scaler_oldest_waiting": "oldestWaitingSeconds",
    "queue_scaler_replicas": "replicas",
}
SEVERITY = {0: "INFO", 1: "WARNING", 2: "ERROR", 143: "INFO"}


def test_each_reason_fires_the_alert_on_the_page(runs: list[Run]) -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \|(.*?)\|", PAGE.partition("### Reasons")[2], re.M)
    table = {
        reason: set(re.findall(r"`([\w-]+)`", watched))
        for reasons, watched in rows
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    assert table.keys() == set(get_args(scaler.Reason)) == {run.reason for run in runs}
    for run in runs:
        entry = entries(run)[-1]
        assert entry["jsonPayload"]["reason"] == run.reason
        assert entry["severity"] == SEVERITY[run.exit_code], run
        expected = set() if run.record["dryRun"] else set(table[run.reason])
        if entry["severity"] == "ERROR":
            expected.add("action-required")
        assert fired(entry) - {"waiting-too-long"} == expected, run
        found = matches(blocks("text", "jsonPayload"), entry)
        assert found is (run.record["action"] != "none"), "the query to start with finds rescales"


def test_a_warning_names_its_deployment_and_only_a_second_writer_fires(runs: list[Run]) -> None:
    warnings = [(run, each) for run in runs for each in entries(run)[:-1]]
    assert any("two writers" in each["jsonPayload"]["message"] for _, each in warnings)
    for run, each in warnings:
        assert each["severity"] in ("INFO", "WARNING")
        payload = each["jsonPayload"]
        assert payload.keys() == {"namespace", "deployment", "message"}
        assert payload["deployment"] == run.record["deployment"]
        action = {"action-required"} if "two writers" in payload["message"] else set()
        assert fired(each) == action


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_counts_each_decision_with_a_value(name: str, runs: list[Run]) -> None:
    metric, counted = METRICS[name], 0
    for run in runs:
        entry = entries(run)[-1]
        value = run.record.get(FIELDS[name])
        counts = value is not None and not run.record["dryRun"]
        assert matches(metric["filter"], entry) is counts, run
        if "valueExtractor" in metric:
            assert extracted(metric["valueExtractor"], entry) == value
        deployment = extracted(metric["labelExtractors"]["deployment"], entry)
        assert deployment == run.record["deployment"]
        counted += counts
    assert counted, f"no run has a value for {name}"


@pytest.mark.parametrize(("waited", "fires"), [(None, False), (900, False), (901, True)])
def test_jobs_that_wait_too_long_fire(waited: int | None, fires: bool) -> None:
    container = {"type": "k8s_container", "labels": {"container_name": CONTAINER["name"]}}
    payload = {"reason": "AtTarget", "dryRun": False, "oldestWaitingSeconds": waited}
    entry = {"resource": container, "severity": "INFO", "jsonPayload": payload}
    assert ("waiting-too-long" in fired(entry)) is fires


POLICY, BINDING = "validatingadmissionpolicies", "validatingadmissionpolicybindings"


@pytest.mark.parametrize(
    ("resource", "verb", "name", "fires"),
    [
        (POLICY, "delete", "/queue-scaler", True),
        (POLICY, "patch", "/queue-scaler-label", True),
        (BINDING, "update", "/queue-scaler", True),
        (POLICY, "deletecollection", "", True),
        (POLICY, "create", "/queue-scaler", False),
        (POLICY, "delete", "/another", False),
        ("validatingwebhookconfigurations", "delete", "/queue-scaler", False),
    ],
)
def test_a_change_of_the_guardrails_fires(resource: str, verb: str, name: str, fires: bool) -> None:
    """With the names that GKE's audit log gives a method and an object."""
    audited = {
        "methodName": f"io.k8s.admissionregistration.v1.{resource}.{verb}",
        "resourceName": f"admissionregistration.k8s.io/v1/{resource}{name}",
    }
    entry = {"resource": {"type": "k8s_cluster"}, "severity": "NOTICE", "protoPayload": audited}
    assert fired(entry) == ({"guardrails-changed"} if fires else set())


def test_lines_of_other_containers_do_not_count(runs: list[Run]) -> None:
    for entry in (entry for run in runs for entry in entries(run)):
        entry["resource"]["labels"]["container_name"] = "worker"
        assert fired(entry) == set()
        assert not any(matches(metric["filter"], entry) for metric in METRICS.values())

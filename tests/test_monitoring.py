"""docs/monitoring.md and examples/alerts.yaml: the rules by promtool, the filters of the page
against lines that the script prints, and that each reason is watched as the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import scaler
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_api import Answer, json_answer
from tests.support.needs import need
from tests.support.world import REPOSITORY, Run
from tests.test_manifests import container, environment

PAGE = (REPOSITORY / "docs/monitoring.md").read_text()
ALERTS = REPOSITORY / "examples/alerts.yaml"
ALERTS_TEST = REPOSITORY / "tests/alerts_test.yaml"
Object = dict[str, Any]


def blocks(language: str, word: str) -> str:
    """The code blocks of the page in which a word occurs, one after another."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return "".join(block for block in found if word in block)


# --- Prometheus ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_alerts_fire_when_they_have_to_and_only_then() -> None:
    command = [need("promtool"), "test", "rules", str(ALERTS_TEST)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_both_ways_and_stands_on_the_page() -> None:
    names = {rule["alert"] for group in load(ALERTS)["groups"] for rule in group["rules"]}
    tried: dict[bool, set[str]] = {True: set(), False: set()}
    for each in load(ALERTS_TEST)["tests"]:
        for one in each["alert_rule_test"]:
            tried[bool(one["exp_alerts"])].add(one["alertname"])
    assert tried == {True: names, False: names}
    assert names == set(re.findall(r"^\| `(QueueScaler\w+)` \|", PAGE, re.M))


def test_the_alerts_look_at_what_the_manifests_make() -> None:
    cron_job, env = load(REPOSITORY / "cronjob.yaml"), environment()
    at_maximum = load(ALERTS)["groups"][0]["rules"][-1]["expr"]
    assert f'deployment="{env["DEPLOYMENT"]}"' in at_maximum
    assert f">= {env['MAX_REPLICAS']} " in at_maximum
    overlay = load(REPOSITORY / "examples/overlay/kustomization.yaml")
    for suffix in ("", overlay["nameSuffix"]):
        name = cron_job["metadata"]["name"] + suffix
        for pattern in re.findall(r'(?:cronjob|owner_name)=~"([^"]*)"', ALERTS.read_text()):
            assert re.fullmatch(pattern, name)


def test_the_operator_gets_the_same_rules(tmp_path: Path) -> None:
    [call] = run_page(blocks("bash", "PrometheusRule"), "kubectl", tmp_path)
    applied = yaml.safe_load(call["stdin"])
    assert (applied["kind"], applied["spec"]) == ("PrometheusRule", load(ALERTS))


def load(path: Path) -> Object:
    return dict(yaml.safe_load(path.read_text()))


# --- The page's gcloud commands ------------------------------------------------------------------

RECORDER = f"""#!{sys.executable}
import json, pathlib, sys
call = {{"arguments": sys.argv[1:], "stdin": sys.stdin.read()}}
with pathlib.Path(sys.argv[0]).with_suffix(".calls").open("a") as calls:
    print(json.dumps(call), file=calls)
print("projects/my-project/notificationChannels/1")
"""


def run_page(commands: str, tool: str, directory: Path) -> list[Object]:
    """Run commands of the page with a tool that only notes how it was called."""
    recorder = directory / tool
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    path = f"{directory}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-eu", "-c", commands], cwd=REPOSITORY, env={"PATH": path}, check=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return [json.loads(call) for call in recorder.with_suffix(".calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return run_page(blocks("bash", "gcloud"), "gcloud", tmp_path_factory.mktemp("gcloud"))


@pytest.fixture(scope="module")
def metrics(calls: list[Object]) -> dict[str, Object]:
    """The metrics of the page, by name."""
    return {
        call["arguments"][3]: yaml.safe_load(call["stdin"])
        for call in calls
        if call["arguments"][:3] == ["logging", "metrics", "create"]
    }


@pytest.fixture(scope="module")
def conditions(calls: list[Object]) -> dict[str, Object]:
    """The conditions of the page's policies, by name."""
    policies = [
        yaml.safe_load(call["stdin"])
        for call in calls
        if call["arguments"][:3] == ["monitoring", "policies", "create"]
    ]
    return {
        condition.pop("displayName"): condition
        for policy in policies
        for condition in policy["conditions"]
    }


def test_the_policies_notify_the_channel(calls: list[Object]) -> None:
    policies = [call["arguments"] for call in calls if "policies" in call["arguments"]]
    assert len(policies) == 2
    for arguments in policies:
        channel = "projects/my-project/notificationChannels/1"
        assert f"--notification-channels={channel}" in arguments


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
def test_gcloud_takes_the_commands(
    metrics: Mapping[str, Object], conditions: Mapping[str, Object], tmp_path: Path
) -> None:
    """The real one, which knows the fields of the APIs, with a server that takes anything."""
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
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{api.url}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_MONITORING": f"{api.url}/",
        }
        command = ["bash", "-eu", "-c", commands]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = [*(body for body in api.bodies if "metricDescriptor" in body)]
    assert sent == [{**metric, "name": name} for name, metric in metrics.items()]
    sent = [condition for body in api.bodies for condition in body.get("conditions", [])]
    assert sent == [{"displayName": name, **each} for name, each in conditions.items()]


# --- The filters against the script's lines ------------------------------------------------------

Entry = Mapping[str, Any]
SEVERITIES = ("DEFAULT", "DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL")


def matches(query: str, entry: Entry) -> bool:
    """Whether an entry meets a query of Cloud Logging, as far as the page uses that language: terms
    with AND between them, of which one in parentheses may have OR inside."""
    terms = query.strip().split(" AND ")
    either = [term[1:-1].split(" OR ") if term.startswith("(") else [term] for term in terms]
    return all(any(meets(entry, one) for one in alternatives) for alternatives in either)


def meets(entry: Entry, term: str) -> bool:
    """Any field may contain a bare string. A field that is missing or null meets no comparison."""
    if bare := re.fullmatch(r'"([^"]*)"', term):
        return bare[1].lower() in json.dumps(entry, ensure_ascii=False).lower()
    found = re.fullmatch(r'([\w.]+)(=~|>=|=)([\w."^\[\]-]+|\("[\w-]+"(?: OR "[\w-]+")*\))', term)
    assert found, f"this is not in the subset: {term}"
    path, operator, given = found.groups()
    there = at(path, entry)
    if there is None:
        return False
    wanted = [value.strip('"') for value in given.strip("()").split(" OR ")]
    if operator == "=~":
        return re.search(wanted[0], there) is not None
    if operator == "=":
        return str(there).lower() in map(str.lower, wanted)
    if path == "severity":
        return SEVERITIES.index(there) >= SEVERITIES.index(wanted[0])
    return float(there) >= float(wanted[0])


def at(path: str, entry: Entry) -> Any:
    there: Any = entry
    for key in path.split("."):
        there = there.get(key) if isinstance(there, Mapping) else None
    return there


def entries(run: Run) -> list[Object]:
    """The lines of a run as GKE's logging agent hands them on: `severity` and `time` become the
    entry's own, and where only `message` is left, it becomes text."""
    name = container()["name"]
    labels = {"container_name": name, "namespace_name": "default", "pod_name": "q-1-x"}
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


@pytest.fixture(scope="module")
def table() -> dict[str, set[str]]:
    """The page's last table: each reason with its conditions."""
    rows = re.findall(r"^\| (`[A-Z]\w+`.*?) \|(.*?)\|", PAGE[PAGE.index("### Each reason") :], re.M)
    return {
        reason: set(re.findall(r"`(\w+)`", watched))
        for reasons, watched in rows
        for reason in re.findall(r"`(\w+)`", reasons)
    }


def fired(
    entry: Entry, metrics: Mapping[str, Object], conditions: Mapping[str, Object]
) -> set[str]:
    """The conditions that a log entry counts for: by itself, or by the reason that the metric
    takes from it."""
    found = set()
    for name, condition in conditions.items():
        if "conditionMatchedLog" in condition:
            met = matches(condition["conditionMatchedLog"]["filter"], entry)
        else:
            met = counts_for(next(iter(condition.values()))["filter"], entry, metrics)
        if met and "conditionAbsent" not in condition:
            found.add(name)
    return found


def counts_for(time_series: str, entry: Entry, metrics: Mapping[str, Object]) -> bool:
    [name] = re.findall(r'metric\.type="logging\.googleapis\.com/user/(\w+)"', time_series)
    reasons = re.findall(r'"(\w+)"', time_series.partition("metric.labels.reason=one_of")[2])
    assert set(reasons) <= set(get_args(scaler.Reason)), reasons
    extractor = metrics[name]["labelExtractors"]["reason"]
    return matches(metrics[name]["filter"], entry) and extracted(extractor, entry) in reasons


def extracted(extractor: str, entry: Entry) -> Any:
    path = re.fullmatch(r"EXTRACT\((.+)\)", extractor)
    assert path, extractor
    return at(path[1], entry)


def test_each_reason_is_watched_as_the_page_says(
    table: Mapping[str, set[str]],
    metrics: Mapping[str, Object],
    conditions: Mapping[str, Object],
    runs: list[Run],
) -> None:
    assert table.keys() == set(get_args(scaler.Reason)) == {run.reason for run in runs}
    warned = set()
    for run in runs:
        *warnings, entry = entries(run)
        for each in warnings:
            assert each["severity"] == "WARNING"
            warned |= {two := "two masters" in each["textPayload"]}
            assert fired(each, metrics, conditions) == ({"person"} if two else set())
        severity = ("INFO", "WARNING", "ERROR")[run.exit_code]
        assert (entry["jsonPayload"]["reason"], entry["severity"]) == (run.reason, severity), run
        person = {"person"} if severity == "ERROR" else set()
        watched = set() if run.record["dryRun"] else table[run.reason]
        assert fired(entry, metrics, conditions) == watched | person, run
        for name, metric in metrics.items():
            value = run.record[name.removeprefix("queue_scaler_").replace("reasons", "reason")]
            counts = value is not None and not run.record["dryRun"]
            assert matches(metric["filter"], entry) is counts, (name, run)
            if "valueExtractor" in metric:
                assert extracted(metric["valueExtractor"], entry) == value
            deployment = extracted(metric["labelExtractors"]["deployment"], entry)
            assert deployment == run.record["deployment"]
    assert warned == {True, False}, "of two masters, and of other things"
    assert any(run.record["dryRun"] for run in runs)


def test_other_peoples_lines_count_for_nothing(
    metrics: Mapping[str, Object], conditions: Mapping[str, Object], runs: list[Run]
) -> None:
    for entry in (entry for run in runs for entry in entries(run)):
        entry["resource"]["labels"]["container_name"] = "worker"
        assert fired(entry, metrics, conditions) == set()
        assert not any(matches(metric["filter"], entry) for metric in metrics.values())


def test_the_query_to_begin_with_finds_the_scales(runs: list[Run]) -> None:
    for run in runs:
        found = matches(blocks("text", "jsonPayload"), entries(run)[-1])
        assert found is (run.record["action"] != "none"), run

"""docs/monitoring.md and examples/alerts.yaml: the rules by promtool, the filters of the page
against lines that the script prints, and that each reason is watched as the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from tests.support.firestore import Fail, FakeFirestore, missing_index
from tests.support.kubernetes import Match, answer
from tests.support.world import BUSY, REPOSITORY, Run, World

PAGE = (REPOSITORY / "docs/monitoring.md").read_text()
ALERTS = REPOSITORY / "examples/alerts.yaml"
ALERTS_TEST = REPOSITORY / "tests/alerts_test.yaml"
Object = dict[str, Any]


def find(tool: str) -> str:
    """The path of a tool. Without it the test is skipped, but in CI fails."""
    path = shutil.which(tool)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{tool} is not on the PATH")
        pytest.skip(f"{tool} is not on the PATH")
    return path


def blocks(language: str, word: str) -> str:
    """The code blocks of the page in which a word occurs, one after another."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return "".join(block for block in found if word in block)


# --- Prometheus ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_alerts_fire_when_they_have_to_and_only_then() -> None:
    command = [find("promtool"), "test", "rules", str(ALERTS_TEST)]
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
    cron_job = load(REPOSITORY / "cronjob.yaml")
    container = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    env = {each["name"]: each.get("value") for each in container["env"]}
    at_maximum = load(ALERTS)["groups"][0]["rules"][-1]["expr"]
    assert f'deployment="{env["DEPLOYMENT"]}"' in at_maximum
    assert f">= {env['MAX_REPLICAS']} " in at_maximum
    overlay = load(REPOSITORY / "examples/overlay/kustomization.yaml")
    for name in (
        cron_job["metadata"]["name"],
        cron_job["metadata"]["name"] + overlay["nameSuffix"],
    ):
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


@pytest.mark.slow
def test_gcloud_takes_the_commands(
    metrics: Mapping[str, Object], conditions: Mapping[str, Object], tmp_path: Path
) -> None:
    """The real one, which knows the fields of the APIs, with a server that takes anything."""
    gcloud = find("gcloud")
    bodies: list[Object] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            kind = self.path.partition("?")[0].rpartition("/")[2]
            data = json.dumps({"name": f"projects/my-project/{kind}/1", **body}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    commands = blocks("bash", "gcloud")
    old = subprocess.run([gcloud, "monitoring", "policies", "--help"], capture_output=True)
    if old.returncode:
        commands = commands.replace("gcloud monitoring", "gcloud alpha monitoring")
    with HTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        environ = {
            "PATH": os.environ["PATH"],
            "CLOUDSDK_CONFIG": str(tmp_path),
            "CLOUDSDK_CORE_PROJECT": "my-project",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_MONITORING": url,
        }
        command = ["bash", "-eu", "-c", commands]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    sent = [*(body for body in bodies if "metricDescriptor" in body)]
    assert sent == [{**metric, "name": name} for name, metric in metrics.items()]
    sent = [condition for body in bodies for condition in body.get("conditions", [])]
    assert sent == [{"displayName": name, **each} for name, each in conditions.items()]


# --- The Logging query language, as far as the page uses it --------------------------------------

Entry = Mapping[str, Any]
Test = Callable[[Entry], bool]
SEVERITIES = ("DEFAULT", "DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL")
TOKEN = re.compile(r'\s*(?:"([^"]*)"|(\(|\)|>=|=~|=|[\w./-]+))')


def matches(query: str, entry: Entry) -> bool:
    """Whether a log entry meets a query: `=`, `>=`, `=~`, AND, OR, NOT, parentheses, and a bare
    string, which any field may contain. OR binds more tightly than AND, as documented; a field
    that is missing or null meets no comparison."""
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(query.rstrip()):
        found = TOKEN.match(query, at)
        assert found, f"this is not in the subset: {query[at:]}"
        text, other = found.groups()
        tokens.append(("text", text) if text is not None else ("other", other))
        at = found.end()
    test = conjunction(tokens)
    assert not tokens, f"left over: {tokens}"
    return test(entry)


def take(tokens: list[tuple[str, str]], *expected: str) -> bool:
    if tokens and tokens[0][0] != "text" and tokens[0][1] in expected:
        tokens.pop(0)
        return True
    return False


def conjunction(tokens: list[tuple[str, str]]) -> Test:
    tests = [disjunction(tokens)]
    while take(tokens, "AND"):
        tests.append(disjunction(tokens))
    return lambda entry: all(test(entry) for test in tests)


def disjunction(tokens: list[tuple[str, str]]) -> Test:
    tests = [negation(tokens)]
    while take(tokens, "OR"):
        tests.append(negation(tokens))
    return lambda entry: any(test(entry) for test in tests)


def negation(tokens: list[tuple[str, str]]) -> Test:
    if take(tokens, "NOT"):
        test = negation(tokens)
        return lambda entry: not test(entry)
    if take(tokens, "("):
        test = conjunction(tokens)
        assert take(tokens, ")")
        return test
    kind, left = tokens.pop(0)
    if kind == "text":
        return lambda entry: left.lower() in json.dumps(entry, ensure_ascii=False).lower()
    operator = tokens.pop(0)[1]
    assert operator in (">=", "=~", "="), operator
    values = [tokens.pop(0)[1]]
    if values == ["("]:
        values = [tokens.pop(0)[1]]
        while take(tokens, "OR"):
            values.append(tokens.pop(0)[1])
        assert take(tokens, ")")
    return lambda entry: any(compare(left, operator, value, entry) for value in values)


def compare(path: str, operator: str, wanted: str, entry: Entry) -> bool:
    there: Any = entry
    for key in path.split("."):
        there = there.get(key) if isinstance(there, Mapping) else None
    if there is None:
        return False
    if operator == "=~":
        return re.search(wanted, str(there)) is not None
    if operator == "=":
        shown = json.dumps(there) if isinstance(there, bool) else str(there)
        return shown.lower() == wanted.lower()
    if path == "severity":
        return SEVERITIES.index(there) >= SEVERITIES.index(wanted)
    return float(there) >= float(wanted)


@pytest.mark.parametrize(
    ("query", "met"),
    [
        ("a.b=1", True),
        ("a.b>=2", False),
        ("a.none>=0", False),
        ("NOT a.none>=0", True),
        ('a.b=("0" OR "1") AND severity>=WARNING', True),
        ("severity>=CRITICAL", False),
        ("a.b=1 OR a.b=2 AND a.b=2", False),  # (1 OR 2) AND 2
        ('a.t=~"^x"', False),
        ('a.t=~"x$"', True),
        ('"TWO X"', True),
        ("a.yes=true", True),
    ],
)
def test_a_query_is_read_as_documented(query: str, met: bool) -> None:
    entry = {"severity": "ERROR", "a": {"b": 1, "t": "two x", "yes": True, "none": None}}
    assert matches(query, entry) is met


def entries(run: Run) -> list[Object]:
    """The lines of a run as GKE's logging agent hands them on: `severity` and `time` become the
    entry's own, and where only `message` is left, it becomes text."""
    container = load(REPOSITORY / "cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"]["containers"][0]["name"]  # fmt: skip
    labels = {"container_name": container, "namespace_name": "default", "pod_name": "q-1-x"}
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


# --- The filters against the script's lines ------------------------------------------------------

Scene = Callable[[World, FakeFirestore], Mapping[str, str]]


def scene(
    replicas: int = 1, waiting: int = 0, annotations: Mapping[str, str] | None = None,
    **settings: str,
) -> Scene:  # fmt: skip
    """A world with so many pods and jobs, and the settings of a run in it."""

    def build(world: World, queue: FakeFirestore) -> Mapping[str, str]:
        if replicas != 1:
            world.cluster.scale("worker", replicas)
        names = {f"queue-scaler/{name}": value for name, value in (annotations or {}).items()}
        if names:
            world.cluster.annotate("worker", **names)
        queue.fill(waiting)
        return settings

    return build


def all_busy(world: World, queue: FakeFirestore) -> Mapping[str, str]:
    world.cluster.scale("worker", 3)
    for pod in world.cluster.pods("worker"):
        name = pod["metadata"]["name"]
        queue.put(f"jobs/{name}", {"status": "processing", "assignedPodId": name})
    return {"BUSY_FILTER": BUSY, "JOBS_PER_POD": "3", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}


def queue_answers(failure: Fail, **settings: str) -> Scene:
    def build(world: World, queue: FakeFirestore) -> Mapping[str, str]:
        queue.fault("count", failure)
        return settings

    return build


def cluster_answers(code: int, **settings: str) -> Scene:
    def build(world: World, queue: FakeFirestore) -> Mapping[str, str]:
        world.cluster.fault(Match("get"), answer(code), times=None)
        return settings

    return build


JUST_UP = {"last-scale-time": "2025-12-31T23:59:00Z", "last-scale": "up 1->2"}
DOWN = Fail(StatusCode.UNKNOWN, "no answer")
SCENES: Sequence[tuple[str, str, Scene]] = [
    ("ScaledUp", "INFO", scene(waiting=5)),
    ("ScaledDown", "INFO", scene(replicas=3, SCALE_DOWN_STABILIZATION_SECONDS="0")),
    ("AtTarget", "INFO", scene()),
    ("ScaleUpCooldown", "INFO", scene(replicas=2, waiting=5, annotations=JUST_UP)),
    (
        "ScaleDownCooldown",
        "INFO",
        scene(replicas=2, annotations=JUST_UP, SCALE_DOWN_STABILIZATION_SECONDS="0"),
    ),
    ("ScaleUpStabilized", "INFO", scene(waiting=5, SCALE_UP_STABILIZATION_SECONDS="60")),
    ("ScaleDownStabilized", "INFO", scene(replicas=3)),
    ("ScaleUpDisabled", "INFO", scene(waiting=5, annotations={"paused-scale-out": "true"})),
    (
        "ScaleDownDisabled",
        "INFO",
        scene(replicas=3, SCALE_DOWN_STEP="0", SCALE_DOWN_STABILIZATION_SECONDS="0"),
    ),
    ("WorkersBusy", "INFO", all_busy),
    ("Paused", "INFO", scene(annotations={"paused": "true"})),
    ("ScalingDisabled", "INFO", scene(replicas=0)),
    ("TooFewReplicas", "INFO", scene(MIN_REPLICAS="2")),
    ("TooManyReplicas", "INFO", scene(replicas=5)),
    ("Fallback", "WARNING", queue_answers(DOWN, FALLBACK_REPLICAS="2", FALLBACK_AFTER_SECONDS="0")),
    ("QueueUnavailable", "WARNING", queue_answers(DOWN)),
    ("QueueUnavailable", "ERROR", queue_answers(missing_index())),
    ("ClusterUnavailable", "WARNING", cluster_answers(503, TIMEOUT_SECONDS="1")),
    ("ClusterUnavailable", "ERROR", cluster_answers(400)),
    ("Forbidden", "ERROR", cluster_answers(403)),
    ("DeploymentNotFound", "ERROR", scene(DEPLOYMENT="another")),
    ("InvalidSettings", "ERROR", scene(MIN_REPLICAS="none")),
]


@pytest.fixture(scope="module")
def table() -> dict[str, set[str]]:
    """The page's last table: each reason with its conditions."""
    rows = re.findall(r"^\| (`[A-Z]\w+`.*?) \|(.*?)\|", PAGE[PAGE.index("### Each reason") :], re.M)
    return {
        reason: set(re.findall(r"`(\w+)`", watched))
        for reasons, watched in rows
        for reason in re.findall(r"`(\w+)`", reasons)
    }


def test_each_reason_stands_on_the_page(table: Mapping[str, set[str]]) -> None:
    assert set(table) == set(get_args(scaler.Reason)) == {reason for reason, _, _ in SCENES}


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
    there: Any = entry
    for key in path[1].split("."):
        there = there[key]
    return there


@pytest.mark.parametrize(
    ("reason", "severity", "build"), SCENES, ids=[f"{each[0]}-{each[1]}" for each in SCENES]
)
def test_each_reason_is_watched_as_the_page_says(
    reason: str,
    severity: str,
    build: Scene,
    table: Mapping[str, set[str]],
    metrics: Mapping[str, Object],
    conditions: Mapping[str, Object],
    world: World,
    queue: FakeFirestore,
) -> None:
    run = world.run(LOG_FORMAT="json", **build(world, queue))
    [entry] = entries(run)
    assert (entry["jsonPayload"]["reason"], entry["severity"]) == (reason, severity), run
    person = {"person"} if severity == "ERROR" else set()
    assert fired(entry, metrics, conditions) == table[reason] | person

    assert matches(metrics["queue_scaler_reasons"]["filter"], entry)
    for name in ("waiting", "replicas"):
        value = run.record[name]
        metric = metrics[f"queue_scaler_{name}"]
        assert matches(metric["filter"], entry) is (value is not None)
        assert extracted(metric["valueExtractor"], entry) == value
        assert extracted(metric["labelExtractors"]["deployment"], entry) == run.record["deployment"]


def test_a_dry_run_counts_for_no_metric(
    metrics: Mapping[str, Object], world: World, queue: FakeFirestore
) -> None:
    [entry] = entries(world.run("--dry-run", LOG_FORMAT="json"))
    assert {name: matches(metric["filter"], entry) for name, metric in metrics.items()} == {
        "queue_scaler_reasons": False,
        "queue_scaler_waiting": False,
        "queue_scaler_replicas": False,
    }


def test_other_peoples_lines_count_for_nothing(
    metrics: Mapping[str, Object], conditions: Mapping[str, Object], world: World
) -> None:
    [entry] = entries(world.run(LOG_FORMAT="json", MIN_REPLICAS="none"))
    entry["resource"]["labels"]["container_name"] = "worker"
    assert fired(entry, metrics, conditions) == set()
    assert not any(matches(metric["filter"], entry) for metric in metrics.values())


def test_a_second_master_needs_a_person(
    metrics: Mapping[str, Object],
    conditions: Mapping[str, Object],
    world: World,
    queue: FakeFirestore,
) -> None:
    world.cluster.scale("worker", 2, manager="horizontal-pod-autoscaler")
    warning, line = entries(world.run(LOG_FORMAT="json"))
    assert warning["severity"] == "WARNING" and line["severity"] == "INFO"
    assert fired(warning, metrics, conditions) == {"person"}
    assert fired(line, metrics, conditions) == set()


def test_the_query_to_begin_with_finds_the_scales(world: World, queue: FakeFirestore) -> None:
    query = blocks("text", "jsonPayload")
    queue.fill(2)
    found = [entries(world.run(LOG_FORMAT="json"))[0] for _ in range(2)]
    assert [matches(query, entry) for entry in found] == [True, False]

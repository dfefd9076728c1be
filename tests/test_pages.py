"""README.md and README.ko.md say what is so: tables, quoted lines, commands and links are held
against the script, the fakes and the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from tests.support.firestore import Fail, FakeFirestore, missing_index
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_api import Answer, json_answer
from tests.support.world import BUSY, PROJECT, REPOSITORY, START, World

pytestmark = pytest.mark.slow

NAME = "eventstorming-generator"
ENGLISH, KOREAN = REPOSITORY / "README.md", REPOSITORY / "README.ko.md"
BOTH = pytest.mark.parametrize("readme", [ENGLISH, KOREAN], ids=lambda path: path.name)

# --- Reading the pages -------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    lines: tuple[str, ...]


def blocks(readme: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, tuple(body.splitlines())) for language, body in found]


def tables(readme: Path) -> list[list[list[str]]]:
    """Rows of cells, without the header and the line under it."""
    prose = re.sub(r"^```.*?^```$", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:^\|.*\|\n)+", prose, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
        for table in found
    ]


def table_of(readme: Path, first: str) -> list[list[str]]:
    """The table whose first row begins with this cell."""
    return next(table for table in tables(readme) if table[0][0].strip("| ") == f"`{first}`")


def plain(cell: str) -> str:
    return cell.replace("`", "").strip("| ")


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands(readme: Path) -> list[str]:
    """The lines of the bash blocks without their comments, continued ones joined."""
    text = "\n".join("\n".join(block.lines) for block in blocks(readme) if block.language == "bash")
    lines = [re.sub(r"(^|\s+)# .*$", "", line) for line in text.replace("\\\n  ", "").splitlines()]
    return [line for line in lines if line]


def quoted_lines(readme: Path) -> list[str]:
    """What the page says that the script prints, without the time and the level."""
    texts = [line for block in blocks(readme) if block.language == "text" for line in block.lines]
    return [re.sub(r"^\S+Z [A-Z]+ ", "", line) for line in texts]


# --- Tables ------------------------------------------------------------------------------------


def test_the_settings_table_is_that_of_the_code() -> None:
    wanted = [
        [item.name.upper(), item.metadata["shown"], item.metadata["meaning"]]
        for item in fields(scaler.Settings)
    ]
    assert [[plain(cell) for cell in row] for row in table_of(ENGLISH, "DEPLOYMENT")] == wanted


def test_the_korean_settings_table_has_the_same_defaults() -> None:
    english, korean = (table_of(readme, "DEPLOYMENT") for readme in (ENGLISH, KOREAN))
    assert [codes(row[1]) for row in korean] == [codes(row[1]) for row in english]


@BOTH
def test_the_annotations_table_names_every_annotation(readme: Path) -> None:
    wanted = {
        value
        for value in vars(scaler).values()
        if isinstance(value, str) and re.fullmatch(r"queue-scaler/[a-z-]+", value)
    }
    assert {plain(row[0]) for row in table_of(readme, scaler.LAST_SCALE_TIME)} == wanted


def test_both_languages_have_the_same_tables() -> None:
    english, korean = (
        [[codes(row[0]) for row in table] for table in tables(readme)]
        for readme in (ENGLISH, KOREAN)
    )
    assert korean == english


def test_both_languages_have_the_same_code() -> None:
    def uncommented(readme: Path) -> list[list[str]]:
        return [
            [block.language, *(re.sub(r"\s+# .*$", "", line) for line in block.lines)]
            for block in blocks(readme)
        ]

    assert uncommented(KOREAN) == uncommented(ENGLISH)


def test_both_languages_have_the_same_sections() -> None:
    english, korean = (
        re.findall(r"^#+", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
        for path in (ENGLISH, KOREAN)
    )
    assert korean == english


def test_both_languages_give_the_same_figures() -> None:
    english, korean = (
        re.findall(r"<!-- bench: (.*?) -->([\d,.]+)", readme.read_text())
        for readme in (ENGLISH, KOREAN)
    )
    assert korean == english


# --- Links -------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor that a heading gets: letters, digits and hyphens of any language."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@BOTH
def test_every_link_leads_somewhere(readme: Path) -> None:
    text = readme.read_text()
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (REPOSITORY / target).exists(), target


# --- Lines that the script prints --------------------------------------------------------------


@contextmanager
def example(directory: Path, replicas: int = 1, **settings: str) -> Iterator[Situation]:
    """The README's Deployment and an empty queue."""
    with (
        FakeKubernetes(seed=1) as cluster,
        FakeFirestore(project=PROJECT, other_databases=["other"]) as queue,
    ):
        cluster.add_deployment(NAME, replicas=replicas)
        yield Situation(World(cluster, queue.host, NAME, START, settings, directory), queue)


@dataclass(frozen=True)
class Situation:
    world: World
    queue: FakeFirestore

    def fail(self, code: StatusCode, message: str) -> None:
        self.queue.fault("count", Fail(code, message))

    def without_permission(self) -> dict[str, str]:
        """As the scaler's account, by a Role that names another Deployment."""
        manifest = (REPOSITORY / "rbac.yaml").read_text()
        self.world.cluster.load_rbac(manifest.replace(NAME, "another"))
        token = self.world.cluster.service_account("queue-scaler")
        config = self.world.directory / "as-queue-scaler"
        return {"KUBECONFIG": str(self.world.cluster.write_kubeconfig(config, token))}

    def without_credentials(self) -> str:
        environ = {**self.world.environment(), "NO_GCE_CHECK": "true"}
        del environ["FIRESTORE_EMULATOR_HOST"]
        return self.world.run_with(environ).stdout

    def busy(self) -> None:
        for number, pod in enumerate(self.world.cluster.pods(NAME)):
            job = {"status": "processing", "assignedPodId": pod["metadata"]["name"]}
            self.queue.put(f"jobs/{number}", job)

    def annotate(self, **annotations: str) -> None:
        names = {f"queue-scaler/{key.replace('_', '-')}": key for key in annotations}
        self.world.cluster.annotate(NAME, **{n: annotations[key] for n, key in names.items()})


def lines_printed(directory: Path) -> Iterator[str]:
    """Standard output of the script, in each situation that the page describes."""
    with example(directory) as it:
        yield it.world.run().stdout
        it.queue.fill(5)
        yield it.world.run("--dry-run").stdout
        yield it.world.run(MIN_REPLICAS="-1", MAX_REPLICAS="three").stdout
        yield it.world.run(DEPLOYMENT="worker").stdout
        yield it.world.run(**it.without_permission()).stdout
        yield it.without_credentials()
        yield it.world.run(FIRESTORE_DATABASE="missing").stdout
        it.fail(StatusCode.PERMISSION_DENIED, "Missing or insufficient permissions.")
        yield it.world.run().stdout
        it.queue.heal()
        it.queue.fault("count", missing_index())
        yield it.world.run().stdout
        it.queue.heal()
        it.fail(StatusCode.UNAVAILABLE, "failed to connect to all addresses")
        yield it.world.run(TIMEOUT_SECONDS="2").stdout
    with example(directory) as it:
        it.annotate(paused="true")
        yield it.world.run().stdout
        it.annotate(paused="false", last_scale_time="yesterday")
        yield it.world.run().stdout
        it.world.cluster.scale(NAME, 0)
        yield it.world.run().stdout
        it.world.cluster.scale(NAME, 2, manager="horizontal-pod-autoscaler")
        yield it.world.run().stdout
        it.world.cluster.stop_listening()
        yield it.world.run(TIMEOUT_SECONDS="2").stdout
    with example(directory, replicas=2) as it:
        it.queue.fill(5)
        it.annotate(last_scale_time="2025-12-31T23:59:00Z", last_scale="up 1->2")
        yield it.world.run().stdout
    with example(directory, replicas=3) as it:
        yield it.world.run().stdout
        it.busy()
        yield it.world.run(BUSY_FILTER=BUSY).stdout
        waits = {"SCALE_DOWN_STABILIZATION_SECONDS": "0", "JOBS_PER_POD": "2"}
        yield it.world.run(BUSY_FILTER=BUSY, **waits).stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("printed")
    lines = [line for text in lines_printed(directory) for line in text.splitlines()]
    return [re.sub(r"^\S+Z [A-Z]+ ", "", line) for line in lines]


@pytest.mark.parametrize("quoted", quoted_lines(ENGLISH), ids=lambda line: line[11:60])
def test_the_script_prints_the_quoted_line(quoted: str, printed: list[str]) -> None:
    """An ellipsis stands for anything."""
    pattern = re.escape(quoted).replace("…", ".*")
    assert any(re.fullmatch(pattern, line) for line in printed), "\n".join([quoted, "", *printed])


def test_every_line_of_trouble_that_the_code_knows_is_explained() -> None:
    """A new reason needs a line in the page, unless it is good news."""
    explained = {word for line in quoted_lines(ENGLISH) for word in re.findall(r"\w+(?=:)", line)}
    good = {"ScaledDown", "TooFewReplicas", "TooManyReplicas"}
    asked_for = {"ScaleUpDisabled", "ScaleDownDisabled", "ScaleUpStabilized", "Fallback"}
    same = {"ScaleDownCooldown"}
    reasons = set(scaler.Reason.__args__)  # type: ignore[attr-defined]
    assert reasons - good - asked_for - same <= explained


# --- Commands ----------------------------------------------------------------------------------


@BOTH
def test_every_make_target_of_the_page_exists(readme: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"`?\bmake ([a-z0-9]+)\b", "\n".join(commands(readme))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@BOTH
def test_every_variable_that_a_command_sets_is_a_setting(readme: Path) -> None:
    known = {item.name.upper() for item in fields(scaler.Settings)}
    for command in commands(readme):
        if "set env" in command:
            named = set(re.findall(r"\b([A-Z][A-Z_]+)(?==|-$)", command))
            assert named <= known, command
            values = dict(re.findall(r'\b([A-Z][A-Z_]+)="?((?<=")[^"]*|[^\s"]+)', command))
            needed = {"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs"}
            scaler.read_settings({**needed, **values})


def test_the_translated_behaviour_block_is_accepted() -> None:
    found = next(b for b in blocks(ENGLISH) if b.language == "yaml" and b.lines[0] == "env:")
    env = yaml.safe_load("\n".join(found.lines))["env"]
    values = {entry["name"]: entry["value"] for entry in env}
    settings = scaler.read_settings({"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs", **values})
    assert settings.scale_up_step == "100%"
    assert settings.scale_down_step == "50%"


def test_the_bound_that_the_page_names_is_the_guardrails() -> None:
    policies = yaml.safe_load_all((REPOSITORY / "guardrails.yaml").read_text())
    variables = next(policies)["spec"]["variables"]
    bound = next(v["expression"] for v in variables if v["name"] == "maxReplicas")
    for readme in (ENGLISH, KOREAN):
        assert f"({bound}" in readme.read_text()


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on the PATH")

# What kubectl asks an API server about its resources before it does anything.
RESOURCES = {
    "v1": {"pods": "Pod", "events": "Event"},
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet"},
    "batch/v1": {"cronjobs": "CronJob", "jobs": "Job"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
}
SHORT_NAMES = {"horizontalpodautoscalers": ["hpa"]}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class ForKubectl(FakeKubernetes):
    """The fake with what kubectl needs besides: a list of resources, one CronJob. kubectl sends
    its token over TLS only."""

    cronjob: dict[str, Any]

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, Any]:
        path = target.partition("?")[0].rstrip("/")
        found = self._discovery(path) or self._batch(method, path)
        return (
            (json_answer(200, found), None)
            if found
            else super().handle(method, target, raw, headers)
        )

    def _discovery(self, path: str) -> dict[str, Any] | None:
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [
                {"name": version.split("/")[0], "versions": [named], "preferredVersion": named}
                for version in RESOURCES
                if "/" in version
                for named in [{"groupVersion": version, "version": version.split("/")[1]}]
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version not in RESOURCES:
            return None
        listed = [
            {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind,
             "verbs": VERBS, "shortNames": SHORT_NAMES.get(name, [])}
            for name, kind in RESOURCES[version].items()
        ]  # fmt: skip
        return {"kind": "APIResourceList", "groupVersion": version, "resources": listed}

    def _batch(self, method: str, path: str) -> dict[str, Any] | None:
        if not path.startswith(("/apis/batch/", "/apis/autoscaling/", "/apis/networking.k8s.io/")):
            return None
        if method == "DELETE":
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if method == "POST":
            return {"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": "created"}}
        if "/cronjobs/" in path:
            return self.cronjob
        return {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []}


# What needs a kubelet, a whole API server, an editor, or a cluster administrator: kubectl only
# has to understand it.
UNDERSTOOD_ONLY = (
    "kubectl apply",
    "kubectl auth",
    "kubectl create -f",
    "kubectl delete clusterrolebinding",
    "kubectl delete pod POD",
    "kubectl describe",
    "kubectl get deployments --all-namespaces",
    "kubectl kustomize",
    "kubectl logs",
    "kubectl rollout",
    "kubectl wait",
    "--as=",
    "--watch",
)
NOT_UNDERSTOOD = re.compile(r"unknown (shorthand )?(flag|command)|[Uu]sage:|invalid argument")


@contextmanager
def for_kubectl() -> Iterator[ForKubectl]:
    cluster = ForKubectl(seed=1, tls=True)
    with cluster:
        cluster.add_deployment(NAME, replicas=1)
        cluster.cronjob = yaml.safe_load((REPOSITORY / "cronjob.yaml").read_text())
        cluster.cronjob["metadata"] |= {"namespace": "default", "uid": "1", "resourceVersion": "1"}
        yield cluster


def typed(
    command: str, cluster: FakeKubernetes, directory: Path
) -> subprocess.CompletedProcess[str]:
    """What comes of a command that a person types."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "KUBECONFIG": str(cluster.write_kubeconfig(directory / "kubeconfig")),
            "EDITOR": "true",
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_kubectl
@pytest.mark.parametrize("command", [c for c in commands(ENGLISH) if c.startswith("kubectl")])
def test_kubectl_does_what_the_page_tells_it(command: str, tmp_path: Path) -> None:
    only = any(part in command for part in UNDERSTOOD_ONLY)
    with for_kubectl() as cluster:
        cluster.add_pod("queue-scaler-1", {"app": "queue-scaler"})
        done = typed(f"timeout 3 {command}" if only else command, cluster, tmp_path)
    said = f"{command}\n{done.stdout}{done.stderr}"
    assert not NOT_UNDERSTOOD.search(done.stderr), said
    assert only or done.returncode == 0, said


@needs_kubectl
def test_the_run_that_is_only_tried_is_a_dry_one(tmp_path: Path) -> None:
    command = next(c for c in commands(ENGLISH) if "scale-try " in c and "DRY_RUN" in c)
    with for_kubectl() as cluster:
        done = typed(command.rpartition(" | ")[0], cluster, tmp_path)
    job = yaml.safe_load(done.stdout)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "DRY_RUN", "value": "true"} in container["env"]


@needs_kubectl
def test_the_history_table_shows_the_runs_in_their_order(tmp_path: Path) -> None:
    command = next(c for c in commands(ENGLISH) if "custom-columns" in c)
    with for_kubectl() as cluster, FakeFirestore(project=PROJECT) as queue:
        world = World(cluster, queue.host, NAME, START, directory=tmp_path)
        ends = []
        for pod in ("queue-scaler-b", "queue-scaler-a"):
            record = world.run().record
            ends.append(record["time"])
            cluster.add_pod(pod, {"app": "queue-scaler"})
            ended = {"exitCode": 0, "finishedAt": record["time"], "message": json.dumps(record)}
            containers = [{"state": {"terminated": ended}}]
            status = {"startTime": record["time"], "containerStatuses": containers}
            cluster.edit("pods", pod, partial(dict.update, status=status))
            world.pass_time()
        header, first, second = typed(command, cluster, tmp_path).stdout.splitlines()
    assert header.split() == ["ENDED", "EXIT", "RESULT"]
    assert [line.split()[:2] for line in (first, second)] == [[end, "0"] for end in ends]
    assert json.loads(second.split(maxsplit=2)[2])["reason"] == "AtTarget"


@needs_kubectl
def test_a_pause_typed_as_the_page_says_is_obeyed(tmp_path: Path) -> None:
    pause = f"kubectl annotate deployment {NAME} queue-scaler/paused=true"
    resume = f"kubectl annotate deployment {NAME} queue-scaler/paused-"
    assert {pause, resume} <= set(commands(ENGLISH))
    with for_kubectl() as cluster, FakeFirestore(project=PROJECT) as queue:
        queue.fill(5)
        world = World(cluster, queue.host, NAME, START, directory=tmp_path)
        assert typed(pause, cluster, tmp_path).returncode == 0
        assert world.run().reason == "Paused"
        assert typed(resume, cluster, tmp_path).returncode == 0
        assert world.run().reason == "ScaledUp"


@needs_kubectl
def test_the_overlay_is_built_as_the_page_says(tmp_path: Path) -> None:
    clone = tmp_path / "queue-scaler"
    clone.mkdir()
    for name in ("kustomization.yaml", "rbac.yaml", "cronjob.yaml"):
        shutil.copy(REPOSITORY / name, clone)
    shutil.copytree(REPOSITORY / "examples" / "overlay", clone / "examples" / "overlay")
    lines = [c for c in commands(ENGLISH) if "thumbnails" in c and "apply" not in c]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=clone, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = {obj["kind"]: obj for obj in yaml.safe_load_all(done.stdout)}
    assert built["CronJob"]["metadata"]["name"] != "queue-scaler"

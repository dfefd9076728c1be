"""cronjob.yaml, rbac.yaml and the kustomizations, held against Kubernetes' schemas and the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from tests.support.firestore import Fail, FakeFirestore
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_objects import Match, Request
from tests.support.needs import need
from tests.support.world import PROJECT, REPOSITORY, START, World

pytestmark = pytest.mark.slow

MANIFESTS = ("cronjob.yaml", "rbac.yaml", "guardrails.yaml", "examples/networkpolicy.yaml")
OLDEST, NEWEST = "1.30", "1.37"  # of the schemas that kubernetes-validate brings
NAME = "eventstorming-generator"
USER = "system:serviceaccount:default:queue-scaler"


def load(manifest: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((REPOSITORY / manifest).read_text()) if each]


def one(manifest: str, kind: str) -> dict[str, Any]:
    return next(each for each in load(manifest) if each["kind"] == kind)


def cronjob() -> dict[str, Any]:
    return dict(one("cronjob.yaml", "CronJob")["spec"])


def pod() -> dict[str, Any]:
    return dict(cronjob()["jobTemplate"]["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


def environment() -> dict[str, str]:
    return {each["name"]: each["value"] for each in container()["env"]}


def settings() -> scaler.Settings:
    return scaler.read_settings(environment())


def with_key() -> str:
    """cronjob.yaml as someone without Workload Identity edits it: the YAML in comments unlocked."""
    plain, mark, rest = (
        (REPOSITORY / "cronjob.yaml").read_text().partition("# The credentials' own")
    )
    pattern = r"(?m)^( *)# ( *(?:- )?[A-Za-z_]+:(?: [\w./-]+)?)$"
    return plain + mark + re.sub(pattern, r"\1\2", rest)


# The whole life of the scaler, as a process with the rights of rbac.yaml and the settings of
# cronjob.yaml, and everything that it asked of the API server


@dataclass(frozen=True)
class Patch:
    """What a patch met, and its body."""

    resource: str
    before: dict[str, Any]
    body: dict[str, Any]


@dataclass(frozen=True)
class Life:
    reasons: list[str]
    requests: list[Request]
    patches: list[Patch]
    events: list[dict[str, Any]]
    killed: list[str]
    busy: str


@cache
def whole_life() -> Life:
    directory = Path(tempfile.mkdtemp())
    with FakeKubernetes(seed=1) as cluster, FakeFirestore(project=PROJECT) as queue:
        cluster.add_deployment(NAME, replicas=1, annotations={"example.com/owner": "team-a"})
        cluster.load_rbac(REPOSITORY / "rbac.yaml")
        token = cluster.service_account("queue-scaler")
        kubeconfig = cluster.write_kubeconfig(directory / "service-account", token)
        world = World(cluster, queue.host, NAME, START, directory=directory)
        world.settings = {**environment(), "KUBECONFIG": str(kubeconfig)}
        patches: list[Patch] = []

        def remember(request: Request) -> None:
            with cluster.store.lock:
                key = (request.resource, request.namespace, request.name)
                before = cluster.store.objects[key]
            patches.append(Patch(request.resource, before, request.body))

        cluster.hook(Match(verb="patch"), remember, times=None)
        reasons, busy = [], ""

        def run(*arguments: str, **more: str) -> None:
            done = world.run(*arguments, **more)
            assert done.stderr == "", done
            reasons.append(done.reason)
            world.pass_time(60)

        queue.fill(5)
        run("--dry-run")
        run()
        queue.clear()
        busy = cluster.pods(NAME)[0]["metadata"]["name"]
        queue.put("jobs/1", {"status": "processing", "assignedPodId": busy})
        for _ in range(7):  # the windows' and the cooldown's five minutes
            run()
        fallback = {"FALLBACK_REPLICAS": "2", "FALLBACK_AFTER_SECONDS": "60"}
        queue.fault("count", Fail(StatusCode.UNAVAILABLE))
        run(TIMEOUT_SECONDS="3", **fallback)
        run(TIMEOUT_SECONDS="3", **fallback)
        queue.heal()
        run(**fallback)
        cluster.annotate(NAME, **{scaler.PAUSED: "true"})
        run()
        return Life(
            reasons, list(cluster.requests), patches, cluster.events(), cluster.deleted_pods, busy
        )


def test_the_life_that_the_rights_are_held_against_has_everything_in_it() -> None:
    life = whole_life()
    expected = {"ScaledUp", "ScaleDownStabilized", "ScaledDown", "QueueUnavailable", "Fallback"}
    assert life.reasons[:2] == ["ScaledUp", "ScaledUp"], "the dry run and the run after it"
    assert expected < set(life.reasons), life.reasons
    assert life.reasons[-1] == "Paused"
    assert len(life.killed) == 2 and life.busy not in life.killed, "idle pods only"
    assert len(life.events) == 3, life.events


def test_rbac_allows_exactly_what_the_script_asks_for() -> None:
    asked = {
        (each.verb, each.group, each.resource, each.name if each.resource == "deployments" else "")
        for each in whole_life().requests
        if each.user == USER
    }
    allowed = {
        (verb, group, resource, name)
        for rule in one("rbac.yaml", "Role")["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }
    assert asked == allowed


def test_every_request_was_the_accounts_own_and_was_allowed() -> None:
    requests = whole_life().requests
    assert {each.user for each in requests} == {USER}
    refused = [each for each in requests if each.status in (401, 403)]
    assert not refused


def test_without_the_rule_for_pods_a_scaler_that_asks_for_no_busy_pods_still_scales(
    tmp_path: Path,
) -> None:
    """The rule is marked as one that may be deleted."""
    text = (REPOSITORY / "rbac.yaml").read_text()
    rule = '  - apiGroups: [""]\n    resources: [pods]\n    verbs: [list, patch]\n'
    assert rule in text
    with FakeKubernetes(seed=1) as cluster, FakeFirestore(project=PROJECT) as queue:
        cluster.add_deployment(NAME, replicas=3)
        cluster.load_rbac(text.replace(rule, ""))
        token = cluster.service_account("queue-scaler")
        kubeconfig = cluster.write_kubeconfig(tmp_path / "service-account", token)
        world = World(cluster, queue.host, NAME, START, directory=tmp_path)
        world.settings = {**environment(), "KUBECONFIG": str(kubeconfig)}
        plain = {"BUSY_FILTER": "", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
        assert world.run(**plain).reason == "ScaledDown"
        cluster.scale(NAME, 3)
        world.pass_time(600)
        refused = world.run(SCALE_DOWN_STABILIZATION_SECONDS="0")
        assert (refused.exit_code, refused.reason) == (2, "Forbidden"), refused
        assert cluster.replicas(NAME) == 3


def test_rbac_is_about_one_namespace_and_one_account() -> None:
    documents = load("rbac.yaml")
    assert [each["kind"] for each in documents] == ["ServiceAccount", "Role", "RoleBinding"]
    account, role, binding = documents
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", account["metadata"]["name"])
    assert account["automountServiceAccountToken"] is False
    assert pod()["serviceAccountName"] == account["metadata"]["name"]
    assert "*" not in (REPOSITORY / "rbac.yaml").read_text()


# Schemas and style


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_manifests_meet_kubernetes_own_schema(manifest: str, version: str) -> None:
    import kubernetes_validate  # type: ignore[import-untyped]

    for document in load(manifest):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_variant_with_a_key_meets_the_schema_and_mounts_what_it_names() -> None:
    import kubernetes_validate

    document = yaml.safe_load(with_key())
    kubernetes_validate.validate(document, NEWEST, strict=True)
    spec = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (_, volume), (only,) = spec["volumes"], spec["containers"]
    (_, mount) = only["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    variables = {each["name"]: each["value"] for each in only["env"]}
    assert variables["GOOGLE_APPLICATION_CREDENTIALS"] == mount["mountPath"] + "/key.json"
    assert variables["FIRESTORE_PROJECT"]


def test_yamllint_has_nothing_to_say() -> None:
    files = [*REPOSITORY.glob("*.yaml"), REPOSITORY / "examples", REPOSITORY / "tests/e2e"]
    files += [each for each in [REPOSITORY / ".github"] if each.exists()]
    command = [sys.executable, "-m", "yamllint", "--strict", *map(str, files)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# cronjob.yaml


def test_every_variable_is_a_setting_and_its_value_parses() -> None:
    known = {each.name.upper() for each in fields(scaler.Settings)}
    variables = {each["name"] for each in yaml.safe_load(with_key())["spec"]["jobTemplate"]["spec"][
        "template"]["spec"]["containers"][0]["env"]}  # fmt: skip
    assert variables - known == {"GOOGLE_APPLICATION_CREDENTIALS"}
    assert settings().busy_filter, "busy-awareness is switched on"


def test_the_values_in_the_block_to_edit_are_the_defaults_where_there_are_any() -> None:
    shown = settings()
    bare = scaler.read_settings({"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs"})
    differ = {
        each.name
        for each in fields(scaler.Settings)
        if getattr(shown, each.name) != getattr(bare, each.name)
    }
    assert differ == {"busy_filter"}


def test_the_role_names_the_deployment_that_the_cronjob_scales() -> None:
    names = [rule.get("resourceNames") for rule in one("rbac.yaml", "Role")["rules"]]
    assert [environment()["DEPLOYMENT"]] in names


def test_one_run_is_over_before_the_next_begins() -> None:
    spec, job = cronjob(), cronjob()["jobTemplate"]["spec"]
    assert spec["schedule"] == "* * * * *"
    assert spec["concurrencyPolicy"] == "Replace"
    assert settings().timeout_seconds < job["activeDeadlineSeconds"] < 60
    # Below 10 s the CronJob controller, which looks every 10 s, may never start a run.
    assert 10 <= spec["startingDeadlineSeconds"] < 60
    assert job["backoffLimit"] == 0
    assert pod()["restartPolicy"] == "Never"
    left = 60 - job["activeDeadlineSeconds"]
    assert pod()["terminationGracePeriodSeconds"] <= left


def test_the_last_decisions_stay_readable_for_a_scale_down_and_its_cooldown() -> None:
    minutes = settings().scale_down_cooldown_seconds / 60
    for limit in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        assert cronjob()[limit] > 2 * minutes
    assert "ttlSecondsAfterFinished" not in cronjob()["jobTemplate"]["spec"]
    assert container()["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert "terminationMessagePath" not in container(), "the script writes to the default path"


def test_the_pods_meet_the_pod_security_standard_restricted() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, field by field."""
    spec, only, ours = pod(), container(), container()["securityContext"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert set(spec["securityContext"]) == {
        "runAsNonRoot", "runAsUser", "runAsGroup", "seccompProfile",
    }  # fmt: skip
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["runAsGroup"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert ours == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not {"ports", "lifecycle", "livenessProbe"} & set(only)
    volumes = yaml.safe_load(with_key())["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "volumes"]  # fmt: skip
    assert [set(each) - {"name"} for each in volumes] == [{"projected"}, {"secret"}]


def test_the_image_runs_as_the_user_of_the_manifest() -> None:
    user = re.findall(r"(?m)^USER (\d+):(\d+)$", (REPOSITORY / "Dockerfile").read_text())
    ids = pod()["securityContext"]["runAsUser"], pod()["securityContext"]["runAsGroup"]
    assert [tuple(map(int, each)) for each in user] == [ids]


def test_the_resources_are_requests_and_a_memory_limit() -> None:
    resources = container()["resources"]
    assert set(resources["requests"]) == {"cpu", "memory", "ephemeral-storage"}
    assert set(resources["limits"]) == {"memory", "ephemeral-storage"}
    assert pod()["enableServiceLinks"] is False


def test_the_token_lives_ten_minutes_where_every_client_looks_for_it() -> None:
    assert pod()["automountServiceAccountToken"] is False
    (volume,), (mount,) = pod()["volumes"], container()["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    token, authority, namespace = volume["projected"]["sources"]
    assert token == {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}
    assert authority["configMap"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert namespace["downwardAPI"]["items"][0]["path"] == "namespace"


def test_the_cronjob_its_jobs_and_its_pods_tell_whose_they_are() -> None:
    template = cronjob()["jobTemplate"]
    expected = {"app": "queue-scaler", "app.kubernetes.io/instance": NAME}
    for each in (one("cronjob.yaml", "CronJob"), template, template["spec"]["template"]):
        assert each["metadata"]["labels"] == expected


def test_the_block_for_looking_more_often_works_as_it_stands() -> None:
    text = (REPOSITORY / "cronjob.yaml").read_text()
    block = dict(re.findall(r"# - name: (\w+_SECONDS)\n *#   value: \"(\d+)\"", text))
    assert list(block) == ["POLLING_INTERVAL_SECONDS", "TIMEOUT_SECONDS"]
    chosen = scaler.read_settings({**environment(), **block})
    deadline = int(re.findall(r"With POLLING_INTERVAL_SECONDS, (\d+)", text)[0])
    assert chosen.timeout_seconds < 60 < deadline
    assert 86_400 / int(block["POLLING_INTERVAL_SECONDS"]) == 8_640
    assert "8,640" in text


# kustomize


def kustomize(directory: Path) -> list[dict[str, Any]]:
    command = [need("kubectl"), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Path]:
    """The example overlay as its comment says: copied to beside the repository."""
    (tmp_path / "queue-scaler").mkdir()
    for each in REPOSITORY.glob("*.yaml"):
        shutil.copy(each, tmp_path / "queue-scaler")
    shutil.copytree(REPOSITORY / "examples/overlay", tmp_path / "thumbnails")
    yield tmp_path


def test_the_base_is_the_two_manifests() -> None:
    built = kustomize(REPOSITORY)
    named = {(each["kind"], each["metadata"]["name"]): each for each in built}
    expected = [*load("rbac.yaml"), *load("cronjob.yaml")]
    assert named == {(each["kind"], each["metadata"]["name"]): each for each in expected}


def test_an_overlay_shares_no_name_with_the_base(beside: Path) -> None:
    def names(built: list[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in built}

    base, overlay = kustomize(REPOSITORY), kustomize(beside / "thumbnails")
    assert len(overlay) == 4
    assert not names(base) & names(overlay)


@pytest.mark.parametrize("namespace", ["default", "media"])
def test_everything_in_an_overlay_is_about_its_own_deployment(beside: Path, namespace: str) -> None:
    path = beside / "thumbnails/kustomization.yaml"
    path.write_text(path.read_text().replace("namespace: default", f"namespace: {namespace}"))
    built = {each["kind"]: each for each in kustomize(path.parent)}
    assert len(built) == 4
    name, role, binding = "queue-scaler-thumbnails", built["Role"], built["RoleBinding"]
    assert [rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule] == [
        ["thumbnails"]
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"] == name
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    spec = built["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == built["ServiceAccount"]["metadata"]["name"] == name
    variables = {each["name"]: each["value"] for each in spec["containers"][0]["env"]}
    assert variables == {**environment(), "DEPLOYMENT": "thumbnails"}
    assert spec["containers"][0]["image"] == "registry.example.com/queue-scaler:0.2.0"
    instance = {"app": "queue-scaler", "app.kubernetes.io/instance": "thumbnails"}
    job = built["CronJob"]["spec"]["jobTemplate"]
    for each in (built["CronJob"], job, job["spec"]["template"]):
        assert each["metadata"]["labels"] == instance
    guarded = one("rbac.yaml", "ServiceAccount")["metadata"]["labels"].items()
    assert guarded <= built["ServiceAccount"]["metadata"]["labels"].items()

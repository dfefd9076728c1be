"""cronjob.yaml, rbac.yaml and the kustomizations, held against Kubernetes' schemas and the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
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

NAME = "eventstorming-generator"


def load(manifest: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((REPOSITORY / manifest).read_text()) if each]


def one(manifest: str, kind: str) -> dict[str, Any]:
    return next(each for each in load(manifest) if each["kind"] == kind)


def pod_of(cronjob: dict[str, Any]) -> Any:
    return cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def container_of(cronjob: dict[str, Any]) -> Any:
    [only] = pod_of(cronjob)["containers"]
    return only


def variables_of(cronjob: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container_of(cronjob)["env"]}


# cronjob.yaml as it is, and with all YAML in comments enabled; the second deadline replaces the
# first one, and so does the second WAITING_FILTER.
TEXT = (REPOSITORY / "cronjob.yaml").read_text()
IN_COMMENTS = r"(?m)^( *)# ( *(?:- )?(?:value: .+|[A-Za-z_./]+:(?: \S+)?|\[.+))$"
MORE = re.sub(IN_COMMENTS, r"\1\2", TEXT.replace("      activeDeadlineSeconds: 55\n", ""))
CRONJOB, COMMENTED = yaml.safe_load(TEXT), yaml.safe_load(MORE)
JOB = CRONJOB["spec"]["jobTemplate"]["spec"]
POD, CONTAINER, VARIABLES = pod_of(CRONJOB), container_of(CRONJOB), variables_of(CRONJOB)


def settings() -> scaler.Settings:
    return scaler.read_settings(VARIABLES)


@contextmanager
def installed(rbac: str) -> Iterator[tuple[FakeKubernetes, FakeFirestore, World]]:
    """A Deployment, and the scaler with its rights and the settings of cronjob.yaml."""
    with FakeKubernetes(seed=1) as cluster, FakeFirestore(project=PROJECT) as queue:
        cluster.add_deployment(NAME, replicas=1, annotations={"example.com/owner": "team-a"})
        cluster.load_rbac(rbac)
        world = World(cluster, queue, NAME, START)
        token = cluster.service_account("queue-scaler")
        kubeconfig = cluster.write_kubeconfig(world.directory / "service-account", token)
        world.settings = {**VARIABLES, "KUBECONFIG": str(kubeconfig)}
        yield cluster, queue, world


@cache
def whole_life() -> tuple[FakeKubernetes, list[tuple[Request, dict[str, Any]]]]:
    """All that the scaler may ask of an API server: the cluster after it, and each patch with the
    object that it met."""
    patches = []
    with installed((REPOSITORY / "rbac.yaml").read_text()) as (cluster, queue, world):

        def remember(request: Request) -> None:
            met = cluster.store.get(request.resource, request.namespace, request.name)
            patches.append((request, met or {}))

        def run(*arguments: str, **more: str) -> None:
            done = world.run(*arguments, **more)
            assert done.stderr == "", done
            world.pass_time(60)

        cluster.hook(Match(verb="patch"), remember, times=None)
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
        for _ in range(2):
            run(TIMEOUT_SECONDS="3", **fallback)
        queue.heal()
        run(**fallback)
        cluster.annotate(NAME, **{scaler.PAUSED: "true"})
        run()
    return cluster, patches


def test_rbac_allows_exactly_what_the_script_asks_for() -> None:
    requests = whole_life()[0].requests
    assert {each.user for each in requests} == {"system:serviceaccount:default:queue-scaler"}
    assert not [each for each in requests if each.status in (401, 403)]
    asked = {
        (each.verb, each.group, each.resource, each.name if each.resource == "deployments" else "")
        for each in requests
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
    # Nothing else in the file gives rights, and nothing in a Role reaches another namespace.
    kinds = [each["kind"] for each in load("rbac.yaml")]
    assert kinds == ["ServiceAccount", "Role", "RoleBinding"]


def test_without_the_rules_for_pods_a_scaler_that_is_not_busy_aware_still_scales() -> None:
    """The two rules are marked as ones to delete."""
    text = (REPOSITORY / "rbac.yaml").read_text()
    rule = (
        "  - apiGroups: [apps]\n    resources: [replicasets]\n    verbs: [list]\n"
        '  - apiGroups: [""]\n    resources: [pods]\n    verbs: [list, patch]\n'
    )
    assert rule in text
    with installed(text.replace(rule, "")) as (cluster, _, world):
        world.settings["SCALE_DOWN_STABILIZATION_SECONDS"] = "0"
        cluster.scale(NAME, 3)
        refused = world.run()
        assert (refused.exit_code, refused.reason) == (2, "Forbidden"), refused
        assert cluster.replicas(NAME) == 3
        assert world.run(BUSY_FILTER="").reason == "ScaledDown"


@pytest.mark.parametrize("version", ["1.30", "1.37"])  # the oldest and the newest that it knows
def test_the_manifests_meet_kubernetes_own_schema(version: str) -> None:
    manifests = ("cronjob.yaml", "rbac.yaml", "guardrails.yaml", "examples/networkpolicy.yaml")
    for document in [COMMENTED, *(each for manifest in manifests for each in load(manifest))]:
        kubernetes_validate.validate(document, version, strict=True)


def test_every_variable_is_a_setting_that_parses_and_is_the_default_where_there_is_one() -> None:
    variables = variables_of(COMMENTED)
    known = {each.name.upper() for each in fields(scaler.Settings)}
    others = {"GOOGLE_APPLICATION_CREDENTIALS", "https_proxy", "no_proxy"}
    assert variables.keys() - known == others
    commented = scaler.read_settings(variables)
    assert commented.scheduled_min_replicas
    assert len(commented.waiting_filter) == 2, "the waiting jobs, and those of lost workers"
    assert settings().busy_filter, "busy-awareness is switched on"
    bare = scaler.read_settings({"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs"})
    assert replace(settings(), busy_filter=None) == bare


def test_a_run_ends_before_the_next_one_starts_and_a_hanging_one_does_not_prevent_it() -> None:
    spec = CRONJOB["spec"]
    assert spec["schedule"] == "* * * * *"
    assert spec["concurrencyPolicy"] == "Allow"
    assert settings().timeout_seconds < JOB["activeDeadlineSeconds"] < 60
    # Below 10 s the CronJob controller, which looks every 10 s, may never start a run.
    assert 10 <= spec["startingDeadlineSeconds"] < 60
    assert (JOB["backoffLimit"], POD["restartPolicy"]) == (0, "Never")
    assert JOB["activeDeadlineSeconds"] + POD["terminationGracePeriodSeconds"] <= 60


def test_the_last_decisions_stay_readable_for_a_scale_down_and_its_cooldown() -> None:
    minutes = settings().scale_down_cooldown_seconds / 60
    for limit in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        assert CRONJOB["spec"][limit] > 2 * minutes
    assert "ttlSecondsAfterFinished" not in JOB
    assert CONTAINER["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert "terminationMessagePath" not in CONTAINER, "the script writes to the default path"


def test_the_pods_meet_the_standard_restricted_with_the_images_user_and_have_bounds() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, field by field."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    user, group = map(int, re.findall(r"(?m)^USER ([1-9]\d+):([1-9]\d+)$", dockerfile)[0])
    assert POD["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": user, "runAsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }  # fmt: skip
    forbidden = {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
    assert not (forbidden | {"ports", "lifecycle", "livenessProbe"}) & {*POD, *CONTAINER}
    assert pod_of(COMMENTED)["hostUsers"] is POD["enableServiceLinks"] is False
    amounts = CONTAINER["resources"]
    assert amounts["limits"].keys() == {"memory", "ephemeral-storage"}, "none should stretch a run"
    assert amounts["requests"].keys() == {"cpu", *amounts["limits"]}


def test_the_token_and_the_commented_key_are_where_the_clients_look() -> None:
    for each in (POD, one("rbac.yaml", "ServiceAccount")):
        assert each["automountServiceAccountToken"] is False
    token, key = pod_of(COMMENTED)["volumes"]
    path = Path(variables_of(COMMENTED)["GOOGLE_APPLICATION_CREDENTIALS"])
    places = {
        token["name"]: "/var/run/secrets/kubernetes.io/serviceaccount",
        key["name"]: str(path.parent),
    }
    mounts = container_of(COMMENTED)["volumeMounts"]
    assert {mount["name"]: mount["mountPath"] for mount in mounts} == places
    assert all(mount["readOnly"] for mount in mounts)
    assert "secret" in key and path.name == "key.json"
    account, authority, namespace = token["projected"]["sources"]
    assert account == {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}
    assert authority["configMap"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert namespace["downwardAPI"]["items"][0]["path"] == "namespace"


def test_the_instance_label_is_on_the_cronjob_its_jobs_and_its_pods() -> None:
    expected = {"app": "queue-scaler", "app.kubernetes.io/instance": NAME}
    assert labels_of(CRONJOB) == [expected] * 3
    selector = one("examples/networkpolicy.yaml", "NetworkPolicy")["spec"]["podSelector"]
    assert selector["matchLabels"].items() <= expected.items()


def labels_of(cronjob: dict[str, Any]) -> list[dict[str, str]]:
    job = cronjob["spec"]["jobTemplate"]
    return [each["metadata"]["labels"] for each in (cronjob, job, job["spec"]["template"])]


def test_a_polling_run_ends_after_its_successor_has_started() -> None:
    chosen = scaler.read_settings(variables_of(COMMENTED))
    interval, total = chosen.polling_interval_seconds, chosen.timeout_seconds
    deadline = COMMENTED["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert interval and 60 < total < deadline
    # `poll` starts no look in its last second.
    polls = len(range(0, total - 1, interval))
    assert f"Look every {interval} s" in TEXT
    assert f"about {round(polls * 1440, -3):,} looks per day" in TEXT


def kustomize(directory: Path, *options: str) -> list[dict[str, Any]]:
    built = subprocess.check_output([need("kubectl"), "kustomize", str(directory), *options])
    return [*yaml.safe_load_all(built)]


def clone(directory: Path, edits: dict[str, str]) -> None:
    """The base as someone has edited it."""
    shutil.copytree(REPOSITORY / "names", directory / "names")
    for each in REPOSITORY.glob("*.yaml"):
        text = each.read_text()
        for old, new in edits.items():
            text = text.replace(old, new)
        (directory / each.name).write_text(text)


def check_one_scaler(
    documents: list[dict[str, Any]], name: str, namespace: str, target: str, image: str
) -> None:
    """That each name reaches every place where Kubernetes reads it."""
    account, role, binding, cronjob = documents
    assert {each["metadata"]["name"] for each in documents} == {name}
    assert {each["metadata"]["namespace"] for each in documents} == {namespace}
    label = one("rbac.yaml", "ServiceAccount")["metadata"]["labels"]
    assert label.items() <= account["metadata"]["labels"].items(), "the guardrails' label"
    named = [rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule]
    assert named == [[target]]
    assert binding["roleRef"]["name"] == name
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    assert pod_of(cronjob)["serviceAccountName"] == name
    assert variables_of(cronjob) == {**VARIABLES, "DEPLOYMENT": target}
    assert container_of(cronjob)["image"] == image
    assert labels_of(cronjob) == [{"app": "queue-scaler", "app.kubernetes.io/instance": target}] * 3


def test_the_base_takes_each_name_from_one_place(tmp_path: Path) -> None:
    edits = {
        f"value: {NAME}": "value: thumbnails",
        "image: queue-scaler ": "image: example.com/scaler:1 ",
    }
    clone(tmp_path, edits)
    path = tmp_path / "kustomization.yaml"
    path.write_text(path.read_text().replace("namespace: default", "namespace: media"))
    image = "example.com/scaler:1"
    check_one_scaler(kustomize(tmp_path), "queue-scaler", "media", "thumbnails", image)


def test_the_unedited_base_equals_its_files() -> None:
    files = [*load("rbac.yaml"), CRONJOB]
    for each in files:
        each["metadata"] = {**each["metadata"], "namespace": "default"}
    assert kustomize(REPOSITORY) == files


@pytest.mark.parametrize(
    ("naming", "name", "namespace"),
    [
        ("nameSuffix: -thumbnails", "queue-scaler-thumbnails", "default"),
        ('nameSuffix: "2"', "queue-scaler2", "media"),
        ("namePrefix: prod", "prodqueue-scaler", "media"),
    ],
)
def test_an_overlay_takes_each_name_from_one_place(
    tmp_path: Path, naming: str, name: str, namespace: str
) -> None:
    """The example overlay as its comment says: copied to beside a clone, which someone has edited
    for a scaler without kustomize."""
    (tmp_path / "queue-scaler").mkdir()
    edits = {NAME: "edited-deployment", "image: queue-scaler ": "image: example.com/edited:1 "}
    clone(tmp_path / "queue-scaler", edits)
    shutil.copytree(REPOSITORY / "examples/overlay", tmp_path / "thumbnails")
    path = tmp_path / "thumbnails/kustomization.yaml"
    text = path.read_text().replace("namespace: default", f"namespace: {namespace}")
    path.write_text(text.replace("nameSuffix: -thumbnails", naming))
    documents = kustomize(path.parent)
    assert "edited" not in json.dumps(documents)
    image = "registry.example.com/queue-scaler:tag"
    check_one_scaler(documents, name, namespace, "thumbnails", image)


def test_the_generated_file_of_the_playground_is_up_to_date() -> None:
    source = REPOSITORY / "examples/playground/generated"
    generated = kustomize(source, "--load-restrictor=LoadRestrictionsNone")
    assert load("examples/playground/generated.yaml") == generated, f"{source} has the command"


def test_the_playground_meets_kubernetes_own_schema_and_its_parts_use_the_same_queue() -> None:
    documents = kustomize(REPOSITORY / "examples/playground")
    for each in documents:
        kubernetes_validate.validate(each, "1.37", strict=True)
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    cronjob = found["CronJob", "queue-scaler"]
    pods = [pod_of(cronjob)]
    pods += [
        found[key]["spec"]["template"]["spec"] for key in (("Deployment", NAME), ("Job", "jobs"))
    ]
    for pod in pods:
        [container] = pod["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": "queue"}}]
        assert container["image"] == "queue-scaler:latest"
        assert container["imagePullPolicy"] == "IfNotPresent", "a cluster may have it from nowhere"
    queue = found["ConfigMap", "queue"]["data"]
    assert not {each["name"] for pod in pods for each in pod["containers"][0].get("env", [])} & {
        *queue
    }
    chosen = scaler.read_settings({**variables_of(cronjob), **queue})
    assert chosen.polling_interval_seconds and chosen.timeout_seconds > 60
    host, _, port = queue["FIRESTORE_EMULATOR_HOST"].partition(":")
    assert found["Service", host]["spec"]["ports"] == [{"port": int(port)}]

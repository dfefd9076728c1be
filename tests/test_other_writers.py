"""Other writers of the Deployment: a second one is named, and a rollback is not applied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from scaler import ANNOTATION, other_writer, restored, write_time
from tests.support.firestore import Fail
from tests.support.kubernetes import Match
from tests.support.world import START, Run, World

HPA = "kube-controller-manager"
Entry = Mapping[str, Any]  # of managedFields


def warnings(run: Run) -> list[str]:
    """What a run says of a second writer."""
    return [line for line in run.stdout.splitlines() if "two writers" in line]


def set_replicas(world: World, replicas: int, manager: str, subresource: str = "scale") -> None:
    spec = {"replicas": replicas}
    world.cluster.edit(
        "deployments", "worker", lambda d: d["spec"].update(spec), manager, subresource
    )


def owns_replicas(manager: str, subresource: str = "", at: datetime | None = None) -> Entry:
    entry: dict[str, Any] = {"manager": manager, "operation": "Update"}
    entry |= {"subresource": subresource} if subresource else {}
    entry |= {"time": write_time(at)} if at else {}
    return {**entry, "fieldsV1": {"f:spec": {"f:replicas": {}}}}


# --- Two writers ----------------------------------------------------------------------------------

AFTER = START + timedelta(seconds=1)


@pytest.mark.parametrize(
    ("manager", "subresource", "named"),
    [
        (
            HPA,
            "scale",
            "a HorizontalPodAutoscaler (kube-controller-manager through the scale subresource) at "
            "2026-01-01T00:00:01Z",
        ),
        ("keda", "scale", "keda through the scale subresource at 2026-01-01T00:00:01Z"),
        ("argocd-controller", "", "argocd-controller at 2026-01-01T00:00:01Z"),
        ("kustomize-controller", "", "kustomize-controller at 2026-01-01T00:00:01Z"),
        ("Helm", "", "Helm at 2026-01-01T00:00:01Z"),
        ("octopus-operator", "", "octopus-operator at 2026-01-01T00:00:01Z"),
        ("queue-scaler-of-another-team", "", "queue-scaler-of-another-team at 2026-01-01T0"),
        ("OpenAPI-Generator", "scale", "OpenAPI-Generator through the scale subresource at 202"),
    ],
)
def test_a_second_writer_is_named(manager: str, subresource: str, named: str) -> None:
    found = other_writer([owns_replicas(manager, subresource, AFTER)], START)
    assert found is not None and found.startswith(named)


PEOPLE = [
    "kubectl", "kubectl-edit", "kubectl-scale", "kubectl-patch", "kubectl-rollout",
    "kubectl-client-side-apply", "kubectl.exe", "oc", "oc.exe", "k9s", "kubecolor", "Lens",
    "OpenLens", "freelens", "lens-desktop", "dashboard-api", "kubernetes-dashboard", "headlamp",
    "headlamp-server", "rancher", "Mozilla", "node-fetch", "openshift-console",
]  # fmt: skip


@pytest.mark.parametrize("manager", PEOPLE)
def test_a_persons_client_is_no_second_writer(manager: str) -> None:
    for subresource in ("", "scale"):
        assert other_writer([owns_replicas(manager, subresource, AFTER)], START) is None


@pytest.mark.parametrize("scaled", [None, START])
def test_whoever_created_the_deployment_is_no_second_writer(scaled: datetime | None) -> None:
    """Helm and CI write `replicas` once, and own the field until somebody changes it."""
    assert other_writer([owns_replicas("Helm", at=START)], scaled) is None
    assert other_writer([], scaled) is None


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_owners_the_later_one_counts(order: int) -> None:
    """The Deployment was applied with `replicas`, and scaled after that."""
    owners = [owns_replicas("helm", at=START), owns_replicas("keda", "scale", AFTER)][::order]
    assert other_writer(owners, None) == (
        "keda through the scale subresource at 2026-01-01T00:00:01Z"
    )


def test_an_owner_without_a_time_is_named_without_one() -> None:
    named = "keda through the scale subresource"
    assert other_writer([owns_replicas("keda", "scale")], START) == named


def test_of_two_owners_one_without_a_time_comes_first() -> None:
    owners = [owns_replicas("keda", "scale", AFTER), owns_replicas("helm")]
    assert other_writer(owners, None) == (
        "keda through the scale subresource at 2026-01-01T00:00:01Z"
    )


def test_a_change_of_something_else_is_no_second_writer(world: World) -> None:
    world.name, world.now = "created", None
    world.cluster.add_deployment("created", replicas=2, manager="helm")
    world.queue.fill(2)
    later = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    world.cluster.annotate("created", **{ANNOTATION + "last-scale-time": later})
    stopped = {"paused": True}
    world.cluster.edit("deployments", "created", lambda d: d["spec"].update(stopped), "other")
    assert warnings(world.run()) == []


def test_the_second_writer_is_named_even_while_the_queue_is_unreadable(world: World) -> None:
    world.queue.fault("count", Fail(StatusCode.UNKNOWN))
    set_replicas(world, 2, HPA)
    run = world.run()
    assert run.exit_code == 1 and len(warnings(run)) == 1, run


def test_a_second_writer_comes_between_reading_and_patching(world: World) -> None:
    """Its write is a conflict, and the decision is made again on what it left."""
    world.queue.fill(5)
    world.cluster.hook(Match("patch", "deployments"), lambda _: set_replicas(world, 2, HPA))
    run = world.run()
    assert (run.exit_code, run.reason, run.record["current"]) == (0, "ScaledUp", 2), run
    assert world.replicas == 3 and len(warnings(run)) == 1
    assert warnings(world.run()) == [], "after the scaler's own rescale"


# --- Rollbacks ------------------------------------------------------------------------------------

CLIENTS = ["kubectl", "kubectl.exe", "oc", "oc.exe", "k9s"]
OTHER_IMAGE: dict[str, Any] = {"containers": [{"name": "main", "image": "worker:2"}]}
ONE_MORE_FIELD = {"nodeName": "node-a"}  # which the rollback removes, so that nobody owns it


def roll_back(world: World, client: str, change: dict[str, Any], **annotations: str) -> None:
    """The annotations were there beside the template before this change, and come back with it."""
    full = {ANNOTATION + name.replace("_", "-"): value for name, value in annotations.items()}
    world.cluster.store.clock = lambda: datetime.now(UTC) + timedelta(hours=1)  # not at creation
    world.cluster.annotate("worker", **full)
    world.cluster.set_template("worker", **change)
    world.cluster.annotate("worker", **dict.fromkeys(full))
    world.cluster.roll_back("worker", client)
    assert full.items() <= world.cluster.annotations("worker").items()


@pytest.mark.parametrize("change", [OTHER_IMAGE, ONE_MORE_FIELD], ids=["image", "field"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_rollback_is_not_applied(world: World, client: str, change: dict[str, Any]) -> None:
    """By whatever client: last week's paused-replicas comes back."""
    world.cluster.scale("worker", 3)
    roll_back(world, client, change, paused_replicas="0")
    name = ANNOTATION + "paused-replicas"
    for _ in range(2):
        run = world.run()
        assert (run.exit_code, run.reason, world.replicas) == (0, "Paused", 3), run
        said = f"{name}='0': may have been restored by a rollback: not applied; delete it, and"
        assert said in run.stdout
        world.cluster.annotate("worker", **{name: "0"})  # the same value: nothing is written
    for value in (None, "0"):
        world.cluster.annotate("worker", **{name: value})
    run = world.run()
    assert world.replicas == 0 and "restored" not in run.stdout, "deleted and set again, it counts"


def test_a_restored_history_starts_over(world: World) -> None:
    world.cluster.scale("worker", 3)
    roll_back(world, "kubectl", OTHER_IMAGE, recommendations="1767225480:1 1767225540:1")
    run = world.run()
    assert run.reason == "ScaleDownStabilized" and "300 s more" in run.record["message"], run
    assert "recommendations" in run.stdout
    assert "restored" not in world.run().stdout, "it is the scaler's own again"


CREATED, LATER = "2025-12-31T00:00:00Z", "2026-01-01T00:00:00Z"


def wrote(manager: str, *names: str, template: bool = True, **more: str) -> Entry:
    """An entry of managedFields: annotations of ours and, if asked, the pod template."""
    owned: dict[str, object] = {f"f:{ANNOTATION}{name}": {} for name in names}
    fields: dict[str, Any] = {"f:metadata": {"f:annotations": {".": {}, **owned}}}
    fields |= {"f:spec": {"f:template": {"f:spec": {}}}} if template else {}
    return {"manager": manager, "operation": "Update", "time": LATER, "fieldsV1": fields, **more}


BOTH = ("paused-scale-in", "paused-scale-out")
UNDONE = wrote("kubectl", *BOTH, "last-scale-time", "last-scale")
ANNOTATED = wrote("kubectl-annotate", "paused-scale-in", template=False)
OWNERS: dict[str, tuple[list[Entry], set[str]]] = {
    "a rollback by kubectl": ([UNDONE], {*BOTH}),
    "by kubectl on Windows": ([wrote("kubectl.exe", *BOTH)], {*BOTH}),
    "by oc": ([wrote("oc", *BOTH)], {*BOTH}),
    "by k9s": ([wrote("k9s", *BOTH)], {*BOTH}),
    "by any other client": ([wrote("freelens", *BOTH)], {*BOTH}),
    "a client that sets the replicas, too": ([{**wrote("freelens", *BOTH), "fieldsV1": {
        **wrote("freelens", *BOTH)["fieldsV1"], "f:spec": {"f:replicas": {}}}}], set()),
    "one that only removes fields": ([wrote("kubectl", *BOTH, template=False)], {*BOTH}),
    "annotated after it": ([UNDONE, ANNOTATED], {"paused-scale-out"}),
    "applied after it": (
        [UNDONE, wrote("ci", "paused-scale-in", operation="Apply")], {"paused-scale-out"}),
    "annotated only": ([ANNOTATED], set()),
    "annotated by an unknown client": ([wrote("lens", *BOTH, template=False)], set()),
    "kubectl edit": ([wrote("kubectl-edit", *BOTH)], set()),
    "kubectl patch": ([wrote("kubectl-patch", *BOTH)], set()),
    "kubectl replace": ([wrote("kubectl-replace", *BOTH)], set()),
    "kubectl apply": ([wrote("kubectl-client-side-apply", *BOTH)], set()),
    "a server-side apply": ([wrote("argocd-controller", *BOTH, operation="Apply")], set()),
    "the scaler itself": ([wrote("queue-scaler", "recommendations")], set()),
    "whoever created it": ([wrote("Helm", *BOTH, time=CREATED)], set()),
    "a subresource": ([wrote("kubectl", *BOTH, subresource="scale")], set()),
    "other people's annotations": ([{**UNDONE, "fieldsV1": {
        "f:metadata": {"f:annotations": {"f:team": {}}}, "f:spec": {"f:template": {}}}}], set()),
    "an entry without fields": ([{"manager": "old", "operation": "Update"}], set()),
    "an entry without more than a name": ([{"manager": "old"}], set()),
    "nobody": ([], set()),
}  # fmt: skip


@pytest.mark.parametrize(("owners", "expected"), OWNERS.values(), ids=OWNERS)
def test_a_rollback_is_recognized_by_what_it_wrote(owners: list[Entry], expected: set[str]) -> None:
    assert restored(owners, CREATED) == {ANNOTATION + name for name in expected}


def test_a_deployment_without_managed_fields_has_no_rollback(world: World) -> None:
    world.cluster.annotate("worker", **{scaler.PAUSED: "true"})
    stored = world.cluster.store.objects[("deployments", "default", "worker")]
    stored["metadata"]["managedFields"] = None
    run = world.run()
    assert run.reason == "Paused" and not re.search("WARNING", run.stdout), run

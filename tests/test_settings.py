"""Every variable is parsed and checked, and every mistake is named at once."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

import scaler
from tests.support.world import World

NEEDED = {"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"}
HOURS = (
    "expected PODS DAYS HOURS TIMEZONE, such as 5 Mon-Fri 07:30-20:00 Asia/Seoul, "
    "hours from 00:00 to 24:00\n"
)


def problems(**environ: str) -> str:
    with pytest.raises(scaler.Failure) as caught:
        scaler.read_settings({**NEEDED, **environ})
    assert (caught.value.reason, caught.value.exit_code) == ("InvalidSettings", 2)
    return str(caught.value)


def test_the_defaults_are_as_documented() -> None:
    assert scaler.read_settings(NEEDED) == scaler.Settings(
        deployment="worker",
        namespace=None,
        firestore_project=None,
        firestore_database="(default)",
        queue_collection=("jobs",),
        queue_collection_group=False,
        waiting_filter=((("status", "==", "waiting"),),),
        waiting_since_field=None,
        busy_filter=None,
        busy_pod_field="assignedPodId",
        min_replicas=1,
        max_replicas=3,
        scheduled_min_replicas=None,
        jobs_per_pod=1,
        scale_up_cooldown_seconds=120,
        scale_down_cooldown_seconds=300,
        scale_up_stabilization_seconds=0,
        scale_down_stabilization_seconds=300,
        scale_up_step=None,
        scale_down_step=None,
        fallback_replicas=None,
        fallback_after_seconds=180,
        polling_interval_seconds=None,
        timeout_seconds=45,
    )
    assert scaler.read_output({}) == scaler.Output(
        dry_run=False,
        log_level="INFO",
        log_format="text",
        termination_log="/dev/termination-log",
    )


WRONG = [
    ("DEPLOYMENT", "", "expected a Kubernetes name: lower-case letters"),
    ("DEPLOYMENT", "Worker", "Kubernetes name"),
    ("DEPLOYMENT", "a/../b", "Kubernetes name"),
    ("NAMESPACE", "Prod", "Kubernetes name"),
    ("FIRESTORE_DATABASE", " ", "expected a name, not an empty one"),
    ("DEPLOYMENT", "a" * 254, "letters, digits, '-' and '.'"),
    ("DEPLOYMENT", "\ud800", ": expected text in UTF-8\n"),
    ("QUEUE_COLLECTION", "", "none of them empty"),
    ("QUEUE_COLLECTION", "tenants/acme", "expected a collection path such as jobs or tenants/acme"),
    ("QUEUE_COLLECTION", "tenants//jobs", "none of them empty"),
    (
        "QUEUE_COLLECTION",
        "jobs, jobs",
        ": expected each collection once, or its jobs would count twice\n",
    ),
    ("QUEUE_COLLECTION_GROUP", "yes", "expected true or false"),
    (
        "WAITING_FILTER",
        "status=waiting",
        'expected a JSON list of [field, op, value], such as [["status", "==", "waiting"]]; '
        "this is not JSON",
    ),
    ("WAITING_FILTER", '{"status": "waiting"}', '"waiting"]]; this is not a list\n'),
    ("WAITING_FILTER", '["status", "==", "waiting"]', "'status' is not such a triple"),
    ("WAITING_FILTER", '[["status", "=="]]', "is not such a triple"),
    ("WAITING_FILTER", '[["status", "is", "waiting"]]', "'is' is not one of the operators"),
    ("WAITING_FILTER", '[["status", "in", "waiting"]]', "a list of 1 to 30 values"),
    ("WAITING_FILTER", '[["status", "in", []]]', "in takes a list of 1 to 30 values, not []"),
    ("WAITING_FILTER", f'[["n", "in", {[*range(31)]}]]', "a list of 1 to 30 values, not [0, 1"),
    ("WAITING_FILTER", f'[["n", "not-in", {[*range(11)]}]]', "a list of 1 to 10 values"),
    ("WAITING_FILTER", f'[["n", "array-contains-any", {[*range(31)]}]]', "1 to 30 values"),
    ("WAITING_FILTER", "[" * 100_000, "this is not JSON"),
    ("WAITING_FILTER", '[["n", ">", NaN]]', "null goes with == and != only, not with >"),
    ("WAITING_FILTER", '[["status", "<", null]]', "null goes with == and != only"),
    ("WAITING_FILTER", '[[1, "==", "waiting"]]', "1 is not a field path"),
    ("WAITING_FILTER", '[["a..b", "==", 1]]', "'a..b' is not a field path"),
    ("WAITING_FILTER", '[[" status", "==", 1]]', "no space at its ends"),
    ("WAITING_FILTER", '[["status ", "==", 1]]', "no space at its ends"),
    ("WAITING_FILTER", '[["a. b", "==", 1]]', "no space at its ends"),
    ("WAITING_FILTER", f'[["n", "==", {2**63}]]', f"{2**63} cannot be sent: "),
    ("WAITING_FILTER", f'[["n", "==", {{"a": {2**63}}}]]', "at most 64 bits"),
    ("WAITING_FILTER", f'[["n", "==", {-(2**63) - 1}]]', "at most 64 bits"),
    ("WAITING_FILTER", '[["n", "==", {"\\ud800": 1}]]', "text is Unicode"),
    ("WAITING_FILTER", '[["n", "==", "\\ud800"]]', "text is Unicode"),
    ("WAITING_FILTER", f'[["n", "==", {"[" * 21}{"]" * 21}]]', "nested at most 20 deep"),
    ("POLLING_INTERVAL_SECONDS", "0", "less than TIMEOUT_SECONDS, which is '45'"),
    ("POLLING_INTERVAL_SECONDS", "45", "less than TIMEOUT_SECONDS, which is '45'"),
    ("POLLING_INTERVAL_SECONDS", "ten", "whole number of seconds"),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 07:00-08:00 UTC;", f"UTC;': '': {HOURS}"),
    ("SCHEDULED_MIN_REPLICAS", "x Mon 07:00-08:00 UTC", f"'x Mon 07:00-08:00 UTC': {HOURS}"),
    ("SCHEDULED_MIN_REPLICAS", "2 Mo-Fr 07:00-08:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon-Fr 07:00-08:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 07:00-25:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 24:00-24:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 07:00-07:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 07:60-08:00 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 7-8 UTC", HOURS),
    ("SCHEDULED_MIN_REPLICAS", "2 Mon 07:00-08:00", HOURS),
    (
        "SCHEDULED_MIN_REPLICAS",
        "2 Mon 07:00-08:00 Asia/Soul",
        "'Asia/Soul': expected a time zone such as Asia/Seoul or UTC",
    ),
    ("SCHEDULED_MIN_REPLICAS", "4 Mon 07:00-08:00 UTC", "no more than MAX_REPLICAS, which is '3'"),
    (
        "BUSY_FILTER",
        '[["n", "not-in", ["a"]]]',
        "BUSY_FILTER: expected no not-in: Firestore cannot combine it with the query for the pods' "
        "names; list the values that are busy instead\n",
    ),
    ("BUSY_POD_FIELD", "", "expected the name of a field"),
    ("BUSY_POD_FIELD", "worker..pod", "the name of a field"),
    ("MIN_REPLICAS", "one", "whole number of pods from 0"),
    ("MIN_REPLICAS", "-1", "whole number of pods from 0"),
    ("MIN_REPLICAS", "1.5", "whole number of pods from 0"),
    ("MIN_REPLICAS", "4", "no more than MAX_REPLICAS, which is '3'"),
    ("MAX_REPLICAS", "0", "expected a whole number of pods or jobs from 1 to 2147483647"),
    ("MAX_REPLICAS", "9" * 5000, "from 1 to 2147483647"),
    ("JOBS_PER_POD", "0", "from 1 to"),
    ("SCALE_UP_COOLDOWN_SECONDS", "-1", "seconds from 0 to 31536000"),
    ("SCALE_DOWN_COOLDOWN_SECONDS", "5m", "seconds from 0 to 31536000"),
    ("SCALE_UP_STABILIZATION_SECONDS", "", "seconds from 0 to 3600"),
    ("SCALE_UP_STABILIZATION_SECONDS", "3601", "seconds from 0 to 3600"),
    ("SCALE_DOWN_STABILIZATION_SECONDS", "1e3", "seconds from 0 to 3600"),
    ("SCALE_UP_STEP", "half", "a percentage such as 50%"),
    ("SCALE_DOWN_STEP", "-2", "expected a number of pods such as 2, or a percentage such as 50%"),
    ("SCALE_DOWN_STEP", "1234567890", "a percentage such as 50%"),
    ("FALLBACK_REPLICAS", "many", "whole number of pods from 0"),
    ("FALLBACK_REPLICAS", "4", "no more than MAX_REPLICAS, which is '3'"),
    ("FALLBACK_AFTER_SECONDS", "-5", "seconds from 0"),
    ("SCALE_UP_COOLDOWN_SECONDS", "31536001", "seconds from 0 to 31536000"),
    ("TIMEOUT_SECONDS", "0", "seconds from 1 to 3600"),
    ("TIMEOUT_SECONDS", "3601", "seconds from 1 to 3600"),
    ("DRY_RUN", "1", "true or false"),
    ("LOG_LEVEL", "LOUD", "expected DEBUG, INFO, WARNING or ERROR"),
    ("LOG_FORMAT", "xml", "expected text or json"),
]


@pytest.mark.parametrize(("variable", "value", "expected"), WRONG)
def test_a_wrong_value_is_named(variable: str, value: str, expected: str) -> None:
    message = problems(**{variable: value})
    assert message.startswith(f"{variable}=") or message.startswith(f"{variable}:")
    assert expected in f"{message}\n"
    assert len(message) < 600, "a long value is truncated"


ACCEPTED = [
    ("DEPLOYMENT", "a" * 253, "a" * 253),
    ("DEPLOYMENT", " w-1.x ", "w-1.x"),
    ("QUEUE_COLLECTION", "/X/acme corp/X/", ("X/acme corp/X",)),
    ("QUEUE_COLLECTION_GROUP", "TRUE", True),
    ("QUEUE_COLLECTION_GROUP", "False", False),
    ("WAITING_FILTER", "[]", ((),)),
    ("BUSY_FILTER", '[["job-type.x", "==", 1]]', ((("`job-type`.x", "==", 1),),)),
    ("BUSY_POD_FIELD", "a\\b", "`a\\\\b`"),
    ("BUSY_POD_FIELD", "_worker.2nd pod.`a.b`", "_worker.`2nd pod`.`a.b`"),
    ("MAX_REPLICAS", "2147483647", 2**31 - 1),
    ("MAX_REPLICAS", "1", 1),
    ("MIN_REPLICAS", "3", 3),
    ("JOBS_PER_POD", "1", 1),
    ("SCALE_UP_COOLDOWN_SECONDS", "31536000", 31_536_000),
    ("SCALE_DOWN_COOLDOWN_SECONDS", "0", 0),
    ("SCALE_UP_STABILIZATION_SECONDS", "3600", 3600),
    ("SCALE_UP_STEP", "999999999%", "999999999%"),
    ("FALLBACK_REPLICAS", "3", 3),
    ("POLLING_INTERVAL_SECONDS", "1", 1),
    ("POLLING_INTERVAL_SECONDS", "44", 44),
    ("TIMEOUT_SECONDS", "1", 1),
    ("TIMEOUT_SECONDS", "3600", 3600),
    ("LOG_LEVEL", "debug", "DEBUG"),
    ("LOG_LEVEL", "Warning", "WARNING"),
    ("LOG_LEVEL", "ERROR", "ERROR"),
    ("LOG_FORMAT", "JSON", "json"),
]


@pytest.mark.parametrize(("variable", "value", "parsed"), ACCEPTED)
def test_an_accepted_value_is_parsed(variable: str, value: str, parsed: object) -> None:
    environ = {**NEEDED, variable: value}
    settings, output = scaler.read_settings(environ), scaler.read_output(environ)
    name = variable.lower()
    assert getattr(output if hasattr(output, name) else settings, name) == parsed


def test_a_wrong_value_for_the_output_is_reported_with_the_others() -> None:
    """And until then the default applies, or a run could report nothing."""
    wrong = {"DRY_RUN": "?", "LOG_LEVEL": "LOUD", "LOG_FORMAT": "xml", "TERMINATION_LOG": ""}
    assert scaler.read_output(wrong) == scaler.read_output({})
    message = problems(**wrong)
    assert all(f"{variable}=" in message for variable in wrong)


@pytest.mark.parametrize(
    ("op", "value", "read_as"),
    [
        *((op, [1], op) for op in ("==", "!=", "<", "<=", ">", ">=", "in", "not-in")),
        ("==", None, "=="),
        ("!=", None, "!="),
        ("==", {"a": [1.5, "x", True]}, "=="),
        ("==", 2**63 - 1, "=="),
        ("==", -(2**63), "=="),
        ("==", json.loads("[" * 20 + "]" * 20), "=="),
        ("in", [*range(30)], "in"),
        ("not-in", [*range(10)], "not-in"),
        ("array-contains", "a", "array_contains"),
        ("array_contains", "a", "array_contains"),
        ("array-contains-any", [*range(30)], "array_contains_any"),
        ("array_contains_any", ["a"], "array_contains_any"),
    ],
)
def test_each_operator_is_accepted_with_what_it_takes(op: str, value: object, read_as: str) -> None:
    raw = json.dumps([["status", op, value], ["b", "==", 1]])
    settings = scaler.read_settings({**NEEDED, "WAITING_FILTER": raw})
    assert settings.waiting_filter == ((("status", read_as, value), ("b", "==", 1)),)


def test_a_value_is_shown_whole_or_truncated_to_120_characters() -> None:
    assert problems(MIN_REPLICAS="x" * 118).startswith(f"MIN_REPLICAS='{'x' * 118}': expected")
    assert problems(MIN_REPLICAS="x" * 119).startswith(f"MIN_REPLICAS='{'x' * 116}...: expected")


def test_all_mistakes_are_reported_at_once() -> None:
    message = problems(MIN_REPLICAS="x", JOBS_PER_POD="0", DRY_RUN="?", DEPLOYMENT="")
    for variable in ("MIN_REPLICAS='x'", "JOBS_PER_POD='0'", "DRY_RUN='?'", "DEPLOYMENT=''"):
        assert variable in message


def test_a_required_variable_that_is_missing_is_named() -> None:
    with pytest.raises(scaler.Failure) as caught:
        scaler.read_settings({})
    assert str(caught.value) == (
        "DEPLOYMENT is not set: expected the name of the Deployment to scale; QUEUE_COLLECTION is "
        "not set: expected the collection path, such as jobs or tenants/acme/jobs, one document "
        "per job; several, separated by commas, are added up"
    )


def test_a_collection_group_has_a_bare_id() -> None:
    message = problems(QUEUE_COLLECTION="tenants/acme/jobs", QUEUE_COLLECTION_GROUP="true")
    assert message == (
        "QUEUE_COLLECTION='tenants/acme/jobs': expected the bare ID of the collections, such as "
        "jobs, as QUEUE_COLLECTION_GROUP is true"
    )


@pytest.mark.parametrize("host", ["http://127.0.0.1:8080", "https://firestore:8080", "host:80/"])
def test_the_emulator_has_an_address_without_a_scheme(host: str) -> None:
    expected = f"FIRESTORE_EMULATOR_HOST={host!r}: expected HOST:PORT, no scheme"
    assert problems(FIRESTORE_EMULATOR_HOST=host) == expected
    scaler.read_settings({**NEEDED, "FIRESTORE_EMULATOR_HOST": "127.0.0.1:8080"})


@pytest.mark.parametrize("variable", ["BUSY_FILTER", "FALLBACK_REPLICAS", "SCALE_UP_STEP"])
def test_an_empty_value_unsets_a_variable_that_has_no_default(variable: str) -> None:
    settings = scaler.read_settings({**NEEDED, variable: ""})
    assert getattr(settings, variable.lower()) is None


def test_a_count_never_asks_for_more_than_the_range_can_use() -> None:
    def limit(**environ: str) -> int:
        return scaler.read_settings({**NEEDED, **environ}).count_limit

    assert limit() == 1000
    assert limit(MAX_REPLICAS="200", JOBS_PER_POD="10") == 2000
    assert limit(MAX_REPLICAS="2147483647", JOBS_PER_POD="2147483647") == 2**31 - 1


def test_wrong_settings_end_a_run_with_2_a_line_and_a_record(world: World) -> None:
    run = world.run(MAX_REPLICAS="none", TIMEOUT_SECONDS="-1", LOG_FORMAT="xml")
    assert run.exit_code == 2, run
    assert run.record["reason"] == "InvalidSettings" and run.record["action"] == "none"
    for part in ("MAX_REPLICAS='none'", "TIMEOUT_SECONDS='-1'", "LOG_FORMAT='xml'", "AutoScaler"):
        assert part in run.stdout
    assert world.cluster.requests == []


def test_help_describes_every_setting(world: World) -> None:
    text = world.run("--help").stdout
    for setting in (*fields(scaler.Settings), *fields(scaler.Output)):
        shown, meaning = setting.metadata["shown"], setting.metadata["meaning"]
        assert f"\n  {setting.name.upper()}\n      {meaning} [{shown}]\n" in text


def test_version_prints_the_version(world: World) -> None:
    assert world.run("--version").stdout == f"queue-scaler {scaler.__version__}\n"


TYPOS = {
    "MIN_REPLICA": "MIN_REPLICAS",
    "JOB_PER_POD": "JOBS_PER_POD",
    "dry_run": "DRY_RUN",
    "SCALE_UP_COOLDOWN_SECOND": "SCALE_UP_COOLDOWN_SECONDS",
}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_misspelled_variable_is_warned_about(typo: str, meant: str) -> None:
    [warning] = scaler.misspelled({typo: "2", "HOSTNAME": "x", "PYTHONPATH": ""})
    assert warning == f"the variable {typo} is unknown to the scaler: did you mean {meant}?"
    assert [*scaler.misspelled({typo: "2", meant: "2"})] == [warning], "right beside wrong"


def test_an_unknown_argument_is_rejected(world: World) -> None:
    run = world.run("--force")
    assert run.exit_code == 2 and "'--force'" in run.stdout, run


def test_a_deployment_that_does_not_exist_is_named_with_its_namespace(world: World) -> None:
    run = world.run(DEPLOYMENT="nobody", NAMESPACE="nowhere")
    assert (run.exit_code, run.reason) == (2, "DeploymentNotFound"), run
    assert "Deployment nobody in namespace nowhere" in run.record["message"]


def test_without_google_credentials_a_run_says_what_was_looked_for(world: World) -> None:
    environ = world.environment(
        GOOGLE_APPLICATION_CREDENTIALS=str(world.directory / "no-key.json"),
    )
    del environ["FIRESTORE_EMULATOR_HOST"]
    run = world.run_with(environ)
    assert (run.exit_code, run.reason) == (2, "Forbidden"), run
    assert "GOOGLE_APPLICATION_CREDENTIALS" in run.record["message"]
    assert run.record["replicas"] == 1

"""README.md and docs/ are right: their tables, quoted lines, commands and links are compared with
the script, the fakes and the repository."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import scaler
from tests.e2e.__main__ import ENDED
from tests.support.firestore import FakeFirestore
from tests.support.kubectl import ForKubectl, ended_job
from tests.support.needs import need
from tests.support.situations import NAME
from tests.support.world import BUSY, REPOSITORY, START, Run, World

README, KOREAN = REPOSITORY / "README.md", REPOSITORY / "README.ko.md"
DOCS = REPOSITORY / "docs"
OPERATIONS, SETTINGS = DOCS / "operations.md", DOCS / "settings.md"
KOREAN_OPERATIONS = DOCS / "ko" / "operations.md"  # leaves out what is not needed every day
TRANSLATED = {README: KOREAN, DOCS / "troubleshooting.md": DOCS / "ko" / "troubleshooting.md"}
ENGLISH = {page: english for english, page in TRANSLATED.items()} | {KOREAN_OPERATIONS: OPERATIONS}
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def tables(page: Path) -> list[list[list[str]]]:
    """Rows of cells, without the header and the line below it."""
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows.splitlines()[2:]]
        for rows in re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE)
    ]


def table_of(page: Path, first: str) -> list[list[str]]:
    """The table whose first row begins with this cell, in plain text."""
    found = ([[plain(cell) for cell in row] for row in table] for table in tables(page))
    return next(table for table in found if table[0][0] == first)


def plain(cell: str) -> str:
    return re.sub(r"\[(.*?)\]\([^)]*\)", r"\1", cell).replace("`", "").strip("| ")


def commands(page: Path) -> list[str]:
    """What the page's reader types, in order: each ends where its quotes are closed."""
    found: list[str] = []
    for block in blocks(page, "bash"):
        pending = ""
        for line in block.splitlines():
            pending += line + "\n"
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quote is open
                continue
            if not line.endswith("\\"):
                found += [re.sub(r"\s+# .*", "", pending).strip()] if words else []
                pending = ""
    return found


def test_the_settings_table_is_that_of_the_code() -> None:
    wanted = [
        [name, item.metadata["shown"], item.metadata["meaning"]]
        for name, item in scaler.VARIABLES.items()
    ]
    assert table_of(SETTINGS, "DEPLOYMENT") == wanted


@pytest.mark.parametrize("page", [README, KOREAN], ids=lambda page: page.name)
def test_the_readme_shows_settings_and_annotations_that_exist(page: Path) -> None:
    for names, defaults, _ in table_of(page, "DEPLOYMENT"):
        variables = [scaler.VARIABLES[name] for name in names.split(", ")]
        known = [item.metadata["default"] for item in variables]
        assert None in known or ", ".join(known) == defaults, names
    annotations = table_of(page, scaler.PAUSED)
    named = {name for row in annotations for name in row[0].split(", ")}
    assert named == {*scaler.PAUSES, scaler.PAUSED_UNTIL}


def test_the_readme_names_the_image_by_the_version() -> None:
    (tag,) = re.findall(r"queue-scaler:(\d\S*)", README.read_text())
    assert tag == scaler.__version__


def test_the_annotations_table_names_every_annotation() -> None:
    names = [str(value) for value in vars(scaler).values()]
    wanted = {name for name in names if re.fullmatch(r"queue-scaler/[a-z-]+", name)}
    assert {row[0] for row in table_of(SETTINGS, scaler.LAST_SCALE_TIME)} == wanted


def skeleton(page: Path) -> dict[str, list[Any]]:
    """All parts of a page that a translation leaves as they are."""
    text, comments = prose(page), re.compile(r"(^|\s+)# .*$", re.MULTILINE)
    rows = [" ".join(row) for table in tables(page) for row in table]
    paths = [one for one in re.findall(r"\]\(([^)#]+)", text) if not one.startswith("https://")]
    targets = [(page.parent / path).resolve() for path in paths]
    return {
        "sections": re.findall(r"^#+", text, re.MULTILINE),
        "tables": [sorted(re.findall(r"`([^`]+)`", row)) for row in rows],
        "code": [(lang, comments.sub("", body)) for lang, body in FENCE.findall(page.read_text())],
        "links": sorted(ENGLISH.get(target, target) for target in targets),
    }


@pytest.mark.parametrize(("english", "translation"), TRANSLATED.items(), ids=name_of)
def test_both_languages_differ_only_in_words(english: Path, translation: Path) -> None:
    assert skeleton(translation) == skeleton(english)


def test_the_short_page_has_the_code_and_tables_of_the_long_one() -> None:
    short, long = skeleton(KOREAN_OPERATIONS), skeleton(OPERATIONS)
    assert short["tables"] == long["tables"]
    assert short["code"] == [block for block in long["code"] if block in short["code"]]


def test_the_readme_is_read_in_one_sitting() -> None:
    for page in (README, KOREAN):
        assert len(page.read_text().splitlines()) <= 205, page


def anchors(page: Path) -> set[str]:
    """Those of the headings: letters, digits and hyphens of any language."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@every_page
def test_every_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@every_page
def test_the_script_prints_each_quoted_line(page: Path, runs: list[Run]) -> None:
    """An ellipsis stands for anything."""
    printed = [json.loads(line)["message"] for run in runs for line in run.stdout.splitlines()]
    for block in blocks(page, "text"):
        for line in re.findall(r"^(?:\S+Z [A-Z]+ )?(AutoScaler.*)", block, re.MULTILINE):
            pattern = re.compile(re.escape(line).replace("…", ".*"))
            assert any(map(pattern.fullmatch, printed)), "\n".join([line, "", *printed])


@pytest.mark.parametrize("page", [OPERATIONS, KOREAN_OPERATIONS], ids=name_of)
def test_each_reason_has_a_row_with_its_exit_codes(page: Path, runs: list[Run]) -> None:
    table = table_of(page, "ScaledUp")
    documented = {(reason, code) for reason, cell, _ in table for code in re.findall(r"\d+", cell)}
    assert {(run.reason, str(run.exit_code)) for run in runs} == documented
    assert {reason for reason, _ in documented} == set(get_args(scaler.Reason))


def test_the_record_on_the_page_is_one_of_a_run(runs: list[Run]) -> None:
    (shown,) = (json.loads(block) for block in blocks(OPERATIONS, "json"))
    assert shown in [{**run.record, "durationSeconds": shown["durationSeconds"]} for run in runs]


@every_page
def test_a_wait_for_a_job_returns_when_it_fails(page: Path) -> None:
    for command in commands(page):
        assert "kubectl wait job" not in command or ENDED in shlex.split(command), command


@every_page
def test_every_make_target_exists(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    named = re.findall(r"`make ([a-z0-9-]+)", prose(page))
    typed = re.findall(r"^make ([a-z0-9-]+)", "\n".join(commands(page)), re.MULTILINE)
    for target in [*named, *typed]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@every_page
def test_every_setting_of_a_command_or_block_is_accepted(page: Path) -> None:
    chosen = [yaml.safe_load(block).get("env", []) for block in blocks(page, "yaml")]
    for command in commands(page):
        if " set env " in command and "--local" not in command:
            words = [re.fullmatch(r"([A-Z_]+)(?:=(.*)|-)", word) for word in shlex.split(command)]
            chosen.append([{"name": word[1], "value": word[2]} for word in words if word])
    for variables in chosen:
        values = {one["name"]: one["value"] for one in variables}  # None where one is unset
        assert values.keys() <= scaler.VARIABLES.keys()
        given = {name: value for name, value in values.items() if value is not None}
        scaler.read_settings({"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs", **given})


CRONJOB = yaml.safe_load((REPOSITORY / "cronjob.yaml").read_text())
BY_HAND = ("scale-now", "scale-try")
PODS = ("queue-scaler-1", "queue-scaler-0")  # the second is the later run
SCALER_LABELS = CRONJOB["metadata"]["labels"]


@pytest.fixture
def cluster() -> Iterator[ForKubectl]:
    """The pages' Deployment, CronJob and Jobs, for kubectl."""
    need("kubectl")
    cluster = ForKubectl(seed=1, tls=True)
    with cluster:
        cluster.add_deployment(NAME, replicas=1)
        for pod in PODS:
            cluster.add_pod(pod, SCALER_LABELS)
        cronjob = copy.deepcopy(CRONJOB)
        cronjob["metadata"] |= {"namespace": "default", "uid": "1", "resourceVersion": "1"}
        cluster.objects = {
            "cronjobs": {"queue-scaler": cronjob},
            "jobs": {name: ended_job(name) for name in ("queue-scaler-first", *BY_HAND)},
            "horizontalpodautoscalers": {NAME: ended_job(NAME)},
            "networkpolicies": {},
        }
        yield cluster


@pytest.fixture
def world(cluster: ForKubectl, queue: FakeFirestore, tmp_path: Path) -> World:
    """Two jobs wait for the pages' Deployment."""
    queue.fill(2)
    return World(cluster, queue, NAME, START, {"BUSY_FILTER": BUSY}, tmp_path)


def typed(text: str, world: World) -> subprocess.CompletedProcess[str]:
    """The result of typing this, one line or several."""
    command = ["timeout", "60", "bash", "-o", "pipefail", "-c", text]
    environ = world.environment(EDITOR="true")
    return subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True)


# The fake cannot run these: they need an administrator, another API group, a kubelet or another
# clone. kubectl has accepted such a command if it sent a request beyond discovery.
ASKED_ONLY = re.compile(
    r"--as=|--namespace|-n (NAMESPACE|queue-scaler-playground)|--watch|--all-namespaces|logs job/"
    r"|kubectl (apply|describe|rollout|wait)|get mutatingwebhookconfigurations"
    r"|delete (-[fk]|clusterrolebinding|pod POD|scaledobject|validatingadmissionpolicy)"
)
PLAYGROUND = "-n queue-scaler-playground"
ENGLISH_COMMANDS = {
    command: None
    for page in PAGES
    if page not in ENGLISH
    for command in commands(page)
    if command.startswith("kubectl") and "thumbnails" not in command
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ENGLISH_COMMANDS, ids=lambda command: command[8:70])
def test_kubectl_accepts_every_command(command: str, cluster: ForKubectl, world: World) -> None:
    asked_only = ASKED_ONLY.search(command)
    done = typed(f"timeout 3 {command}" if asked_only else command, world)
    said = f"{command}\n{done.stdout}{done.stderr}"
    own = PLAYGROUND not in command
    for selector in re.findall(r" -l (\S+)", command) if own else []:
        assert set(selector.split(",")) <= {f"{k}={v}" for k, v in SCALER_LABELS.items()}, said
    for patch in re.findall(r" -p '([^']*)'", command):
        json.loads(patch)
    refused = r"unknown (shorthand )?(flag|command)|[Uu]sage:|See 'kubectl|invalid|have a resource"
    assert not re.search(refused, said), said
    assert " -l " not in command or "No resources found" not in done.stderr or not own, said
    assert done.returncode == 0 or (asked_only and cluster.asked), said


@pytest.mark.slow
@pytest.mark.parametrize("job", BY_HAND)
def test_a_manual_run_and_a_dry_run(job: str, cluster: ForKubectl, world: World) -> None:
    cluster.objects["jobs"].clear()
    (block,) = (block for block in blocks(OPERATIONS, "bash") if f"create job {job}" in block)
    *lines, delete = block.splitlines()
    done = typed("\n".join(lines), world)
    assert done.returncode == 0 and "AutoScaler says this" in done.stdout, f"{done}"
    dry_run = json.dumps({"name": "DRY_RUN", "value": "true"})
    assert (dry_run in json.dumps(cluster.objects["jobs"][job])) is (job == "scale-try")
    assert typed(delete, world).returncode == 0
    assert not cluster.objects["jobs"]


@pytest.mark.slow
def test_the_history_is_the_table_of_the_page(cluster: ForKubectl, world: World) -> None:
    need("jq")
    for pod in PODS:
        record = world.run().record
        ended = {"exitCode": 0, "finishedAt": record["time"], "message": json.dumps(record)}
        containers = [{"state": {"terminated": ended}}]
        status = {"startTime": record["time"], "containerStatuses": containers}
        cluster.edit("pods", pod, partial(dict.update, status=status))
        world.pass_time()
    with_jq, without = (c for c in commands(OPERATIONS) if "--sort-by=.status.startTime" in c)
    (shown,) = (block for block in blocks(OPERATIONS, "text") if block.startswith("ENDED"))
    assert typed(with_jq, world).stdout == shown
    rows = [row.split("\t") for row in shown.splitlines()[1:]]
    assert typed(without, world).stdout.splitlines() == [f"{row[0]} {row[-1]}" for row in rows]


@pytest.mark.slow
def test_a_pause_typed_as_the_page_says_is_applied(world: World) -> None:
    for annotation, reason in (("paused=true", "Paused"), ("paused-", "ScaledUp")):
        command = f"kubectl annotate deployment {NAME} queue-scaler/{annotation}"
        assert command in commands(OPERATIONS)
        assert typed(command, world).returncode == 0
        assert world.run().reason == reason


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, OPERATIONS], ids=lambda page: page.name)
def test_a_pause_for_two_hours_is_one_command(page: Path, world: World) -> None:
    world.now = None  # the command reads the machine's clock
    (command,) = (c for c in commands(page) if "paused-until=$((" in c)
    begun = datetime.now(UTC)
    assert typed(command, world).returncode == 0
    message = world.run().record["message"]
    (until,) = re.findall(r"paused by annotation until (\S+);", message)
    assert 7199 <= (datetime.fromisoformat(until) - begun).total_seconds() <= 7260


@pytest.mark.slow
def test_a_cooldown_is_extended_and_ended_as_the_page_says(world: World) -> None:
    world.now = None  # the command reads the machine's clock
    end, extend, *_ = (c for c in commands(OPERATIONS) if "queue-scaler/last-scale-time" in c)
    assert typed(extend, world).returncode == 0
    message = world.run().record["message"]
    (left,) = (int(number) for number in re.findall(r"for (\d+) s more", message))
    assert 310 <= left <= 320, message
    assert typed(end, world).returncode == 0
    assert world.run().reason == "ScaledUp"


@pytest.mark.slow
def test_the_overlay_is_built_as_the_page_says(tmp_path: Path) -> None:
    need("kubectl")
    page, clone = DOCS / "several-deployments.md", tmp_path / "queue-scaler"
    for directory in ("examples", "names"):
        shutil.copytree(REPOSITORY / directory, clone / directory)
    for manifest in REPOSITORY.glob("*.yaml"):
        shutil.copy(manifest, clone)
    built = [c for c in commands(page) if "thumbnails" in c and "apply" not in c]
    shown = subprocess.check_output(["bash", "-ec", "\n".join(built)], cwd=clone)
    names = {one["kind"]: one["metadata"]["name"] for one in yaml.safe_load_all(shown)}
    assert f"cronjob/{names['CronJob']}" in page.read_text()

"""The workflows and the files for editors and hooks: what they repeat is the same everywhere, and
the steps of a release do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import scaler
from tests.support.world import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
IMAGE = "ghcr.io/somebody/queue-scaler:1.2.3@sha256:" + 64 * "0"


def load(path: str) -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / path).read_text()))


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def run_step(name: str, directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a step of the release as GitHub does, with the variables that it would set."""
    [step] = [
        one for one in steps(load(".github/workflows/release.yml")) if one.get("name") == name
    ]
    python = directory / "bin/python3"
    if not python.exists():
        python.parent.mkdir()
        python.symlink_to(sys.executable)
    return subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=directory,
        env={"PATH": f"{python.parent}:/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the steps of a release find in the repository."""
    for name in ("scaler.py", "cronjob.yaml", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tag", "right"),
    [(f"v{scaler.__version__}", True), (scaler.__version__, False), ("v99.0.0", False)],
)
def test_a_tag_has_to_be_the_version(tag: str, right: bool, checkout: Path) -> None:
    step = "The tag is the version that the script has"
    done = run_step(step, checkout, GITHUB_REF_NAME=tag)
    assert (done.returncode == 0) is right, done


@pytest.mark.slow
def test_a_release_runs_its_own_image_or_fails(checkout: Path) -> None:
    put_in, manifest = "Put the image into cronjob.yaml", checkout / "cronjob.yaml"
    done = run_step(put_in, checkout, IMAGE=IMAGE)
    assert done.returncode == 0, done
    before, after = load("cronjob.yaml"), yaml.safe_load(manifest.read_text())
    template = before["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    template["containers"][0]["image"] = IMAGE
    assert after == before
    assert run_step(put_in, checkout, IMAGE="another").returncode, "its place is taken"


@pytest.mark.slow
def test_the_notes_of_a_release_are_its_part_of_the_changelog(checkout: Path) -> None:
    step, tag = "Take the notes from CHANGELOG.md", f"v{scaler.__version__}"
    assert run_step(step, checkout, GITHUB_REF_NAME=tag).returncode == 0, "this version's"
    (checkout / "CHANGELOG.md").write_text("## 0.2.0\n\n- new\n\n## 0.1.0\n\n- old\n")
    assert run_step(step, checkout, GITHUB_REF_NAME="v0.2.0").returncode == 0
    assert (checkout / "notes.md").read_text().strip() == "- new"


def test_jobs_write_only_what_they_have_to() -> None:
    found = set()
    for path in WORKFLOWS:
        workflow = load(str(path))
        for name, job in workflow["jobs"].items():
            rights = job.get("permissions", workflow["permissions"])
            assert isinstance(rights, dict), f"{path.name}: {name} has {rights}"
            found |= {(name, what) for what, right in rights.items() if right != "read"}
    assert found == {("image", "packages"), ("release", "contents")}


def test_actions_are_pinned_to_a_version_and_to_the_same_one() -> None:
    used: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, version in re.findall(r"uses: ([\w/-]+)@(\S+)", path.read_text()):
            assert re.fullmatch(r"v\d+\.\d+\.\d+", version), f"{name}@{version}"
            used.setdefault(name, set()).add(version)
    assert used and {name: len(versions) for name, versions in used.items()} == dict.fromkeys(
        used, 1
    )


def test_the_workflow_asks_what_ci_run_asks() -> None:
    script = (REPOSITORY / ".ci/run").read_text()
    assert script.splitlines()[-1] == "make ci"
    commands = [step.get("run") for step in steps(load(".github/workflows/ci.yml"))]
    assert "make ci PYTHON=python" in commands


def test_pre_commit_has_the_versions_of_requirements_dev() -> None:
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)", (REPOSITORY / "requirements-dev.txt").read_text(), re.M)
    )
    found = {
        repo["repo"].rpartition("/")[2]: repo["rev"]
        for repo in load(".pre-commit-config.yaml")["repos"]
        if repo["repo"] != "local"
    }
    assert found == {
        "ruff-pre-commit": f"v{pinned['ruff']}",
        "yamllint": f"v{pinned['yamllint']}",
    }


def test_a_line_is_as_long_for_every_tool() -> None:
    editor = ConfigParser()
    editor.read_string("[top]\n" + (REPOSITORY / ".editorconfig").read_text())
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]
    yamllint = load(".yamllint.yaml")["rules"]["line-length"]["max"]
    assert int(editor["*"]["max_line_length"]) == ruff["line-length"] == yamllint


@pytest.mark.slow
def test_yamllint_has_nothing_to_say_about_any_file() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout

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

IMAGE = "ghcr.io/somebody/queue-scaler:1.2.3@sha256:" + 64 * "0"


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


WORKFLOWS = {path.name: load(path) for path in (REPOSITORY / ".github/workflows").iterdir()}


def steps(workflow: str) -> Iterator[dict[str, Any]]:
    for job in WORKFLOWS[workflow]["jobs"].values():
        yield from job.get("steps", [])


def run_step(name: str, directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a step of the release as GitHub does, with the variables that it would set."""
    [step] = [one for one in steps("release.yml") if one.get("name") == name]
    return subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=directory,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environ},
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
    expected = load(manifest)
    template = expected["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    template["containers"][0]["image"] = IMAGE
    done = run_step(put_in, checkout, IMAGE=IMAGE)
    assert (done.returncode, load(manifest)) == (0, expected), done
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
    for file, workflow in WORKFLOWS.items():
        for name, job in workflow["jobs"].items():
            rights = job.get("permissions", workflow["permissions"])
            assert isinstance(rights, dict), f"{file}: {name} has {rights}"
            found |= {(name, what) for what, right in rights.items() if right != "read"}
    assert found == {("image", "packages"), ("release", "contents")}


def test_actions_are_pinned_to_a_version_and_to_the_same_one() -> None:
    used = {one["uses"] for workflow in WORKFLOWS for one in steps(workflow) if "uses" in one}
    assert used and not [one for one in used if not re.fullmatch(r"[^@]+@v\d+\.\d+\.\d+", one)]
    assert len(used) == len({one.partition("@")[0] for one in used}), sorted(used)


def test_the_workflow_asks_what_ci_run_asks() -> None:
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == "make ci"
    assert "make ci PYTHON=python" in [step.get("run") for step in steps("ci.yml")]


def test_pre_commit_has_the_versions_of_requirements_dev() -> None:
    requirements = (REPOSITORY / "requirements-dev.txt").read_text()
    repos = load(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    found = {one["repo"].rpartition("/")[2]: one.get("rev") for one in repos}
    for repo, package in {"ruff-pre-commit": "ruff", "yamllint": "yamllint"}.items():
        version = found.pop(repo).removeprefix("v")
        assert f"\n{package}=={version} " in requirements
    assert found == {"local": None}


def test_a_line_is_as_long_for_every_tool() -> None:
    editor = ConfigParser()
    editor.read_string("[top]\n" + (REPOSITORY / ".editorconfig").read_text())
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]
    yamllint = load(REPOSITORY / ".yamllint.yaml")["rules"]["line-length"]["max"]
    assert int(editor["*"]["max_line_length"]) == ruff["line-length"] == yamllint


@pytest.mark.slow
def test_yamllint_has_nothing_to_say_about_any_file() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout

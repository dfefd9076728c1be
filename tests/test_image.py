"""The Dockerfile: what the image contains, what it weighs, and that the script runs in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.support.firestore import FakeFirestore
from tests.support.image import (
    IMAGE,
    RATIO,
    Builder,
    Image,
    NoBuilder,
    base_image,
    build_image,
    builder,
    measure,
)
from tests.support.kubernetes import FakeKubernetes
from tests.support.needs import lacking
from tests.support.world import BUSY, REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build() -> Iterator[Builder]:
    try:
        with builder() as build:
            build_image(build)
            yield build
    except NoBuilder as why:
        lacking(f"no image can be built here: {why}")


@pytest.fixture(scope="module")
def image(build: Builder) -> Image:
    return Image(build, build("from", "--pull=never", IMAGE))


@pytest.fixture
def settings(queue: FakeFirestore) -> dict[str, str]:
    """The environment of a busy-aware run that sees two jobs waiting and one pod."""
    queue.fill(2)
    return {
        "DEPLOYMENT": "worker",
        "QUEUE_COLLECTION": "jobs",
        "BUSY_FILTER": BUSY,
        "FIRESTORE_EMULATOR_HOST": queue.host,
        "FIRESTORE_PROJECT": queue.project,
    }


def test_hadolint_passes() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        lacking("hadolint is not installed (see requirements-dev.txt)")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_build_sees_only_what_it_copies() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE)
    first, *others = re.findall(r"(?m)^[^#\n].*", (REPOSITORY / ".dockerignore").read_text())
    assert first == "*"
    assert set(others) == {f"!{name}" for names in copied for name in names.split()}


def test_the_image_has_labels_and_a_non_root_user(image: Image) -> None:
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.config("User"))
    for name in ("title", "description", "licenses"):
        assert image.config("Labels")[f"org.opencontainers.image.{name}"]


def test_a_run_asks_the_plugin_of_a_kubeconfig_and_compiles_and_writes_nothing(
    image: Image, cluster: FakeKubernetes, settings: dict[str, str], tmp_path: Path
) -> None:
    path = cluster.write_kubeconfig(tmp_path / "kubeconfig")
    config = yaml.safe_load(path.read_text())
    version, status = "client.authentication.k8s.io/v1", {"token": cluster.admin_token}
    answer = json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status})
    plugin = {"apiVersion": version, "interactiveMode": "Never", "command": "sh",
              "args": ["-c", f"echo '{answer}'"]}  # fmt: skip
    config["users"][0]["user"] = {"exec": plugin}
    path.write_text(yaml.safe_dump(config))
    path.chmod(0o644)
    before = image.files()
    environ = {**settings, "KUBECONFIG": "/kubeconfig", "PYTHONVERBOSE": "1"}
    done = image.run(environ, {path: "/kubeconfig"})
    assert cluster.replicas("worker") == 2, done.stdout
    loaded = re.findall(r"^# code object from \'?([^\'\n]+)", done.stderr, re.MULTILINE)
    assert len(loaded) > 500, "Python no longer tells what it loads"
    assert [path for path in loaded if not path.endswith(".pyc")] == []
    assert image.files() == before


def test_a_run_is_the_service_account_of_its_pod(
    image: Image, settings: dict[str, str], tmp_path: Path
) -> None:
    cluster = FakeKubernetes(tls=True)
    with cluster:
        cluster.add_deployment("worker", replicas=1)
        inside = cluster.write_service_account(tmp_path / "account")
        mounts = {tmp_path / "account": "/var/run/secrets/kubernetes.io/serviceaccount"}
        done = image.run({**settings, **inside}, mounts)
        assert cluster.replicas("worker") == 2, done.stdout


SIGN_IN = """
import google.auth.aws, google.auth.compute_engine, google.auth.identity_pool
import google.auth.external_account_authorized_user, google.auth.impersonated_credentials
import google.auth.pluggable, google.auth.transport.grpc, google.oauth2.credentials
import google.oauth2.gdch_credentials, google.auth.transport.requests as transport
from google.cloud.firestore import Client
credentials, project = google.auth.default(scopes=["any"])
Client(project, credentials)
try:
    credentials.refresh(transport.Request())
except google.auth.exceptions.TransportError as error:
    print(project, error)
"""


def test_google_credentials_of_any_kind_can_be_loaded(image: Image, tmp_path: Path) -> None:
    """No Google here: a run's first call to Firestore signs a request for a token and sends it, to
    an address where nobody answers."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {
        "type": "service_account", "project_id": "a-project", "private_key": pem,
        "client_email": "scaler@a-project.iam.gserviceaccount.com",
        "token_uri": "http://127.0.0.1:9/token",
    }  # fmt: skip
    path = tmp_path / "key.json"
    path.write_text(json.dumps(account))
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": "/key"}
    done = image.run(environ, {path: "/key"}, "python", "-c", SIGN_IN)
    assert done.stdout.startswith("a-project "), done.stderr
    assert "port=9" in done.stdout and "refused" in done.stdout


def test_nothing_in_the_image_could_install_more(image: Image) -> None:
    installers = re.compile(r"/(pip|setuptools|ensurepip|wheel)([-.\d]*|-[^/]*\.dist-info)(/|$)")
    assert [path for path in image.files() if installers.search(path)] == []


def test_the_image_has_byte_code_for_each_of_its_modules(image: Image) -> None:
    files = image.files()
    version = "".join(re.findall(r"python:(\d)\.(\d+)", base_image())[0])
    places = r"((?:/app|/usr/local/lib/[^/]+/site-packages)/(?:.*/)?)([^/]+)\.py"
    modules = [found for found in (re.fullmatch(places, path) for path in files) if found]
    assert len(modules) > 500
    compiled = {f"{m[1]}__pycache__/{m[2]}.cpython-{version}.pyc" for m in modules}
    assert compiled - files.keys() == set()


def test_the_image_adds_much_less_than_a_plain_install_would(build: Builder) -> None:
    image, plain = measure(build)
    print(f"\n{image / 1e6:.1f} MB instead of {plain / 1e6:.1f} MB: {image / plain:.2f}")
    assert image / plain <= RATIO

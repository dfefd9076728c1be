"""The image, built as far as this machine allows: with buildah, which needs no daemon.

Where the base image cannot be pulled, a stand-in takes its place: a Python of the same version
that this machine has, at the same paths, with a shell and the few tools that the Dockerfile uses.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc._cython import cygrpc  # type: ignore[import-untyped]
from pydantic_core import _pydantic_core

from tests.support.world import REPOSITORY

IMAGE = "localhost/queue-scaler"
RATIO = 0.65  # of what the build adds to the base, to what a plain pip install adds


class NoBuilder(Exception):
    """Nothing can be built on this machine; the message says why."""


@dataclass(frozen=True)
class Builder:
    """buildah, with a storage of its own, so that no stand-in is left under a known name."""

    storage: Path

    def __call__(self, *arguments: str) -> str:
        done = self.attempt(*arguments)
        if done.returncode:
            raise RuntimeError(f"buildah {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def attempt(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        store = ["--root", str(self.storage / "root"), "--runroot", str(self.storage / "run")]
        return subprocess.run(
            ["buildah", *store, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={"BUILDAH_ISOLATION": "chroot", **os.environ},
        )

    def files(self, container: str) -> dict[str, tuple[int, float]]:
        """The size and the time of every file of a container, links not followed."""
        root = Path(self("mount", container))
        found = (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
        stats = {str(path).removeprefix(str(root)): path.lstat() for path in found}
        return {path: (stat.st_size, stat.st_mtime) for path, stat in stats.items()}


@contextmanager
def builder() -> Iterator[Builder]:
    """A builder that has the base image, or the stand-in for it. Raises NoBuilder."""
    if not shutil.which("buildah"):
        raise NoBuilder("buildah is not on the PATH (Debian has a package of that name)")
    storage = Path(tempfile.mkdtemp(prefix="image-"))
    build = Builder(storage)
    try:
        probe = build.attempt("from", "scratch")
        if probe.returncode:
            raise NoBuilder(f"buildah cannot work here: {probe.stderr.strip()}")
        if not pulled(build):
            make_stand_in(build, storage / "stand-in")
        yield build
    finally:
        build.attempt("rm", "--all")
        shutil.rmtree(storage, ignore_errors=True)


def pulled(build: Builder) -> bool:
    with suppress(subprocess.TimeoutExpired):
        return build.attempt("pull", "--quiet", base_image(), timeout=120).returncode == 0
    return False


def base_image() -> str:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    [base] = {*re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)}  # of both stages
    return str(base)


def make_stand_in(build: Builder, root: Path) -> None:
    version = re.findall(r"python:(3\.\d+)", base_image())[0]
    prefix, local, library = find_prefix(version), root / "usr/local", f"lib/python{version}"
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "test", "config-*")
    shutil.copytree(prefix / library, local / library, symlinks=True, ignore=ignored)
    for empty in ("bin", "etc", "tmp", "usr/local/bin", f"usr/local/{library}/site-packages"):
        (root / empty).mkdir()
    python = local / f"bin/python{version}"
    shutil.copy2(prefix / "bin" / python.name, python)
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to(python.name)
    for shared in (prefix / "lib").glob(f"libpython{version}.so*"):
        shutil.copy2(shared, local / "lib")
    for tool in ("sh", "rm", "find"):
        shutil.copy2(Path(shutil.which(tool) or tool).resolve(), root / "bin" / tool)
    # Wheels expect a few more libraries everywhere: those that these are linked with.
    wheels = [Path(str(each.__file__)) for each in (cygrpc, _pydantic_core)]
    binaries = [python, *wheels, *(root / "bin").iterdir(), *root.rglob("*.so*")]
    linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    for path in {*re.findall(r"(?m)(?:=> |^\s*)/(\S+) \(0x", linked)}:
        if "libpython" not in path:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f"/{path}", root / path)
    shutil.copytree("/usr/share/zoneinfo", root / "usr/share/zoneinfo", symlinks=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/ld.so.conf").write_text("/usr/local/lib\n")
    subprocess.run(["/sbin/ldconfig", "-r", str(root)], check=True)
    container = build("from", "scratch")
    build("copy", "--quiet", container, str(root), "/")
    build("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
    # With pip and without byte-code, as the official images come.
    without = "find /usr/local -name __pycache__ -prune -exec rm -r {} +"
    build("run", container, "--", "sh", "-c", f"python -m ensurepip --default-pip && {without}")
    build("commit", "--quiet", "--rm", container, f"docker.io/library/{base_image()}")


def find_prefix(version: str) -> Path:
    """Where this machine keeps a Python of that version, built to stand by itself."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (sys.executable, name, *map(str, pyenv.glob(f"{version}.*/bin/{name}"))):
        with suppress(OSError, subprocess.CalledProcessError):
            asked = [command, "-c", "import sys; print(sys.base_prefix)"]
            answer = subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL)
            prefix = Path(answer.strip())
            # Debian's own lies differently.
            if (prefix / "bin" / name).exists() and prefix != Path("/usr"):
                return prefix
    raise NoBuilder(f"{base_image()} cannot be pulled, and there is no Python {version} here")


def way_out(storage: Path) -> list[str]:
    """Options that let pip inside a build reach its index as it does outside, behind a proxy
    with a certificate of its own, for instance. Nothing of it is left in the image."""
    lines, options = ["[global]"], ["--volume", f"{storage / 'pip.conf'}:/etc/pip.conf:ro"]
    for name in ("index-url", "proxy", "default-timeout", "trusted-host"):
        if value := os.environ.get("PIP_" + name.upper().replace("-", "_")):
            lines.append(f"{name} = {value}")
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if certificates and Path(certificates).is_file():
        lines.append("cert = /etc/pip-certificates.pem")
        options += ["--volume", f"{Path(certificates).resolve()}:/etc/pip-certificates.pem:ro"]
    (storage / "pip.conf").write_text("\n".join([*lines, ""]))
    return options


def build_image(
    build: Builder, tag: str = IMAGE, dockerfile: Path = REPOSITORY / "Dockerfile"
) -> None:
    named = ["--tag", tag, "--file", str(dockerfile)]
    build("build", "--quiet", "--pull=never", *named, *way_out(build.storage), str(REPOSITORY))


def added_bytes(build: Builder, image: str) -> int:
    """What an image's own layers hold: what it removes of the base does not make it smaller."""
    base, own = (build.files(build("from", "--pull=never", name)) for name in (base_image(), image))
    return sum(size for _, (size, _) in own.items() - base.items())


def measure(build: Builder) -> tuple[int, int]:
    """Bytes that the build adds to the base, and that the same requirements add to it where they
    are installed the way that most images have them."""
    tag, plain = "localhost/plain", build.storage / "Dockerfile"
    install = "pip install --no-cache-dir -r /tmp/requirements.txt"
    plain.write_text(f"FROM {base_image()}\nCOPY requirements.txt /tmp/\nRUN {install}\n")
    build_image(build, tag, plain)
    return added_bytes(build, IMAGE), added_bytes(build, tag)


@dataclass(frozen=True)
class Image:
    """A container of the finished image."""

    build: Builder
    container: str

    def run(
        self, environ: Mapping[str, str], mounts: Mapping[Path, str], *command: str
    ) -> subprocess.CompletedProcess[str]:
        """The script, or a command, as the image's own user; `mounts` are paths with those in the
        container."""
        variables = [f"--env={name}={value}" for name, value in environ.items()]
        volumes = [f"--volume={path}:{inside}:ro" for path, inside in mounts.items()]
        options = [*variables, *volumes, "--user", self.config("User"), self.container]
        command = command or tuple(self.config("Entrypoint"))
        done = self.build.attempt("run", *options, "--", *command, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        return done

    def config(self, name: str) -> Any:
        return json.loads(self.build("inspect", self.container))["OCIv1"]["config"][name]

    def files(self) -> dict[str, tuple[int, float]]:
        """But for what the builder itself mounts."""
        mounted = ("/etc/hosts", "/etc/resolv.conf", "/run/", "/kubeconfig")
        files = self.build.files(self.container).items()
        return {path: stamp for path, stamp in files if not path.startswith(mounted)}

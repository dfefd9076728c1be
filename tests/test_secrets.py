"""No token, key, password or kubeconfig in anything that a run writes, whatever goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc import StatusCode  # type: ignore[import-untyped]
from kubernetes.client import ApiClient

from tests.support import kubernetes
from tests.support.firestore import Fail
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.world import BUSY, Run, World

PIECE = 16  # so many characters of a secret in a row are a leak
TOKEN = "swordfish-0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PASSWORD = "correct-horse-battery-staple"
PEM = (
    rsa.generate_private_key(65537, 2048)
    .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    .decode()
)
SECRETS = [TOKEN, TOKEN.upper(), PASSWORD, "".join(PEM.splitlines()[1:-1])]


def check(world: World, run: Run) -> None:
    """All that a run leaves behind: its log, its record, its Events and its annotations."""
    assert run.stdout, "the run said something"
    left = [run.record, world.cluster.events(), world.annotations]
    text = run.stdout + run.stderr + json.dumps(left, ensure_ascii=False)
    plain = re.sub(r"\\+[nr]|\s", "", text)
    for secret in SECRETS:
        for start in range(len(secret) - PIECE + 1):
            piece = secret[start : start + PIECE]
            assert piece not in plain, f"{piece} has been written:\n{text}"


@pytest.fixture(autouse=True)
def verbose(world: World, cluster: FakeKubernetes, one_try: None) -> None:
    """The most talkative run there is, with a token that is easily found."""
    cluster.admin_token = cluster.add_token("scaler", TOKEN, admin=True)
    world.settings = {"LOG_LEVEL": "DEBUG", "TIMEOUT_SECONDS": "3"}


def kubeconfig(world: World, **user: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(
        world.cluster.write_kubeconfig(world.directory / "good").read_text()
    )
    config["users"][0]["user"] = user or {"token": TOKEN}
    return config


def run_with(world: World, config: Mapping[str, Any] | str) -> Run:
    """A run with this kubeconfig, which writes no secret."""
    path = world.directory / "used"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config)))
    run = world.run(KUBECONFIG=str(path))
    check(world, run)
    return run


# ------------------------------------------------------------------------------ ordinary paths


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_run_that_scales(world: World, log_format: str) -> None:
    world.queue.fill(5)
    run = world.run(LOG_FORMAT=log_format, BUSY_FILTER=BUSY)
    assert run.reason == "ScaledUp", run
    check(world, run)


@pytest.mark.parametrize("status", [403, 500])
def test_a_response_that_repeats_the_request_headers(world: World, status: int) -> None:
    """As the error pages of some proxies do, for debugging."""
    echo = f"your request: GET / HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nHost: cluster"
    for text in (echo, echo.upper(), json.dumps({"headers": {"authorization": f"Bearer {TOKEN}"}})):
        world.cluster.clear_faults()
        world.cluster.fault(Match("get"), kubernetes.answer(status, message=text), times=None)
        check(world, world.run(TIMEOUT_SECONDS="1"))


def test_a_queue_that_fails(world: World) -> None:
    refused = f"refused: authorization: Bearer {TOKEN}"
    world.queue.fault("count", Fail(StatusCode.PERMISSION_DENIED, refused))
    check(world, world.run())


@pytest.mark.parametrize("where", ["server", "proxy-url", "http_proxy", "HTTP_PROXY"])
def test_an_address_with_a_password_where_nobody_is(world: World, where: str) -> None:
    """The API server's, or a proxy's, in the kubeconfig or in the environment."""
    nowhere, config = f"http://scaler:{PASSWORD}@127.0.0.1:9", kubeconfig(world)
    place = world.settings if "_" in where else config["clusters"][0]["cluster"]
    place[where] = nowhere
    run = run_with(world, config)
    assert run.reason == "ClusterUnavailable", run


def test_a_crash_shows_where_and_not_what(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(client: ApiClient, *_: object, **__: object) -> None:
        raise RuntimeError(f"made by the test, {client.configuration.api_key}")

    monkeypatch.setattr(ApiClient, "call_api", crash)
    run = world.run()
    assert run.exit_code == 1 and "made by the test" in run.stdout, run
    check(world, run)


# ------------------------------------------------------------ damaged tokens and kubeconfigs

ODD_TOKENS = {
    "with a line end": f"{TOKEN}\n",
    "with a line break in it": f"{TOKEN}\nX-Other: {PASSWORD}",
    "with a zero byte": f"{TOKEN}\0",
    "with a letter that no header takes": f"{TOKEN}é한",
    "in quotes": f'"{TOKEN}"',
}


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize("token", ODD_TOKENS.values(), ids=ODD_TOKENS)
def test_an_odd_token(world: World, token: str, in_a_file: bool) -> None:
    path = world.directory / "token"
    path.write_text(token)
    run = run_with(
        world, kubeconfig(world, **{"tokenFile": str(path)} if in_a_file else {"token": token})
    )
    assert run.exit_code in (0, 2) and world.replicas == 1, run


ODD_KUBECONFIGS: dict[str, Callable[[str], str]] = {
    "with an open quote": lambda text: text.replace(TOKEN, f'"{TOKEN}'),
    "with a tab": lambda text: text.replace("token: ", "\ttoken: "),
    "with an alias": lambda text: text.replace(TOKEN, f"*{TOKEN}"),
    "with a directive": lambda text: f"%{TOKEN}\n{text}",
    "with a list for a token": lambda text: text.replace(TOKEN, f"[{TOKEN}]"),
    "with the user's name wrong": lambda text: text.replace("name: fake", "name: other"),
    "truncated": lambda text: text[: text.index(TOKEN) + 30],
    "that is the token only": lambda _: TOKEN,
    "with a key that is no base64": lambda text: text.replace(
        "token: ",
        f"client-key-data: '{TOKEN}'\n    client-certificate-data: '{TOKEN}'\n    token: ",
    ),
}


@pytest.mark.parametrize("spoil", ODD_KUBECONFIGS.values(), ids=ODD_KUBECONFIGS)
def test_a_damaged_kubeconfig(world: World, spoil: Callable[[str], str]) -> None:
    run_with(world, spoil(yaml.safe_dump(kubeconfig(world))))


def test_a_user_name_and_a_password(world: World) -> None:
    run = run_with(world, kubeconfig(world, username="scaler", password=PASSWORD))
    assert run.exit_code == 2, run


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_a_kubeconfig_where_its_path_should_be(world: World, dump: Callable[..., str]) -> None:
    run = world.run(KUBECONFIG=dump(kubeconfig(world)))
    assert run.exit_code == 2, run
    check(world, run)


VERSION = "client.authentication.k8s.io/v1"


def printing(kind: str, version: str, **status: str) -> str:
    credential = {"kind": kind, "apiVersion": version, "status": {"token": TOKEN, **status}}
    return f"echo '{json.dumps(credential)}'"


HELPERS = {
    "fails": f"echo {TOKEN}; echo {TOKEN} >&2; exit 1",
    "prints no JSON": f"echo {TOKEN}",
    "prints another kind": printing("Other", VERSION),
    "prints another version": printing("ExecCredential", f"{VERSION}alpha1"),
    "prints a bad time": printing("ExecCredential", VERSION, expirationTimestamp="never"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", HELPERS.values(), ids=HELPERS)
def test_no_secret_of_a_login_helper_is_written(world: World, script: str) -> None:
    world.process = True  # what the helper prints goes to the process's own standard error
    helper: dict[str, Any] = {"apiVersion": VERSION, "command": "sh", "args": ["-c", script]}
    password = {"name": "HELPER_PASSWORD", "value": PASSWORD}
    helper |= {"interactiveMode": "Never", "env": [password]}
    run_with(world, kubeconfig(world, exec=helper))


# --------------------------------------------------------------------------- Google credentials

SIGN_IN = "http://127.0.0.1:9/token"
SERVICE_ACCOUNT = {
    "type": "service_account", "project_id": "some-project", "private_key_id": "1",
    "private_key": PEM, "client_email": "scaler@some-project.iam.gserviceaccount.com",
    "token_uri": SIGN_IN,
}  # fmt: skip
AUTHORIZED_USER = {
    "type": "authorized_user", "client_id": "client", "client_secret": PASSWORD,
    "refresh_token": TOKEN, "token_uri": SIGN_IN,
}  # fmt: skip


def account(**changes: str) -> str:
    return json.dumps(
        {name: value for name, value in {**SERVICE_ACCOUNT, **changes}.items() if value}
    )


ODD_CREDENTIALS: dict[str, str] = {
    "are good, but lead nowhere": account(),
    "are a user's": json.dumps(AUTHORIZED_USER),
    "are truncated": account()[:-700],
    "are the key only": PEM,
    "have a damaged key": account(private_key=PEM[:-200]),
    "have a key without line ends": account(private_key=PEM.replace("\n", " ")),
    "are of a type that is none": account(type=PEM),
    "have the key for an address": account(client_email=PEM),
    "have no address": account(client_email=""),
}


@pytest.mark.parametrize("in_place_of_the_path", [False, True])
@pytest.mark.parametrize("content", ODD_CREDENTIALS.values(), ids=ODD_CREDENTIALS)
def test_no_secret_in_google_credentials_is_written(
    world: World, content: str, in_place_of_the_path: bool
) -> None:
    path = world.directory / "credentials.json"
    path.write_text(content)
    given = content if in_place_of_the_path else str(path)
    environ = world.environment(GOOGLE_APPLICATION_CREDENTIALS=given)
    del environ["FIRESTORE_EMULATOR_HOST"]
    # Nothing of a run that has been made to fail is to leave this machine.
    environ |= {"NO_GCE_CHECK": "true", "https_proxy": "http://127.0.0.1:9"}
    run = world.run_with(environ)
    assert run.exit_code in (1, 2) and world.replicas == 1, run
    check(world, run)


@pytest.mark.parametrize(
    "secret", [PEM, account(), f"Bearer {TOKEN}"], ids=["key", "file", "login"]
)
@pytest.mark.parametrize("variable", ["DEPLOYMENT", "NAMESPACE", "MAX_REPLICAS", "WAITING_FILTER"])
def test_a_secret_in_the_wrong_variable(world: World, variable: str, secret: str) -> None:
    """Invalid values are shown, but not what is plainly a secret."""
    run = world.run(**{variable: secret})
    assert run.exit_code == 2, run
    check(world, run)

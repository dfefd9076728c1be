"""Connections of Google's and the Kubernetes client that end in this process: every call goes to
`exchange`, whichever thread makes it, and its answer comes from there."""

from __future__ import annotations

import io
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc  # type: ignore[import-untyped]
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import Client
from grpc import StatusCode
from kubernetes.client import ApiClient, Configuration
from urllib3 import HTTPResponse
from urllib3.exceptions import ProtocolError


@dataclass(frozen=True)
class KubernetesCall:
    """One request of the Kubernetes client."""

    method: str
    target: str
    body: bytes
    headers: Mapping[str, str]

    @property
    def broken(self) -> Exception:
        """What the client meets if the connection breaks."""
        return ProtocolError("Connection aborted.", ConnectionResetError(104, "reset by peer"))

    def __str__(self) -> str:
        path = urllib.parse.urlsplit(self.target).path.partition("/default/")[2]
        return f"{self.method} {path} {self.body.decode()}".strip()


@dataclass(frozen=True)
class FirestoreCall:
    """One request of the Firestore client: "count" or "query", and the message."""

    kind: str
    message: bytes

    @property
    def broken(self) -> Exception:
        return RpcError(StatusCode.UNAVAILABLE, "connection reset by peer")

    def __str__(self) -> str:
        return self.kind


Call = KubernetesCall | FirestoreCall
Exchange = Callable[[Any], Any]  # of a call; HTTPResponse or bytes; or raises


class RpcError(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A call that ended with a status."""

    def __init__(self, code: StatusCode, details: str) -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()

    initial_metadata = trailing_metadata

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: object) -> bool:
        return False


# --- Kubernetes -----------------------------------------------------------------------------------


class _Pool:
    """Stands in for the client's urllib3.PoolManager."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def request(self, method: str, url: str, body: Any = None, **more: Any) -> HTTPResponse:
        headers = {name.lower(): value for name, value in (more.get("headers") or {}).items()}
        raw = body.encode() if isinstance(body, str) else body or b""
        parts = urllib.parse.urlsplit(url)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        found: HTTPResponse = self._exchange(KubernetesCall(method, target, raw, headers))
        return found


def http_response(status: int, body: bytes, headers: Mapping[str, str]) -> HTTPResponse:
    return HTTPResponse(io.BytesIO(body), dict(headers), status, preload_content=False)


def kubernetes_client(exchange: Exchange) -> ApiClient:
    configuration = Configuration()
    configuration.host, configuration.retries = "https://in-process", False
    client = ApiClient(configuration)
    rest: Any = client.rest_client
    rest.pool_manager = _Pool(exchange)
    return client


# --- Firestore ------------------------------------------------------------------------------------

KINDS = {"RunAggregationQuery": "count", "RunQuery": "query"}


class _Stream(grpc.UnaryStreamMultiCallable):  # type: ignore[misc]
    def __init__(self, method: str, pack: Any, unpack: Any, exchange: Exchange) -> None:
        name = method.rpartition("/")[2]
        self._kind, self._pack, self._unpack = KINDS.get(name, name), pack, unpack
        self._exchange = exchange

    def __call__(self, request: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for answer in self._exchange(FirestoreCall(self._kind, self._pack(request))):
            yield self._unpack(answer)


class _Channel(grpc.Channel):  # type: ignore[misc]
    """Server streams only, which is all that the scaler reads."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def unary_stream(self, method: str, pack: Any, unpack: Any, *_: Any, **__: Any) -> Any:
        return _Stream(method, pack, unpack, self._exchange)

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        return self._missing

    stream_unary = stream_stream = unary_unary

    def _missing(self, *_: Any, **__: Any) -> Any:
        raise RpcError(StatusCode.UNIMPLEMENTED, "not in this channel")

    def subscribe(self, *_: Any, **__: Any) -> None:
        """It is always connected."""

    unsubscribe = subscribe

    def close(self) -> None:
        """It holds nothing."""

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def firestore_client(project: str, exchange: Exchange) -> Client:
    client: Any = Client(project, AnonymousCredentials())  # type: ignore[no-untyped-call]
    client._emulator_host = "in-process"
    client._emulator_channel = lambda transport: _Channel(exchange)
    return cast(Client, client)

"""Google's servers on loopback, for a run that finds real credentials and a Firestore of its own.

with GoogleHttp() as google, ConnectProxy({"firestore.googleapis.com": queue.host}) as proxy:
    ...  # a process with {**google.environment(), **proxy.environment(path)}
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

ACCOUNTS = "/computeMetadata/v1/instance/service-accounts/"
EMAIL = "scaler@demo.iam.gserviceaccount.com"
TOKEN = {"access_token": "a-token", "expires_in": 3599, "token_type": "Bearer"}
ISSUED = {**TOKEN, "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}


class GoogleHttp:
    """A metadata server, as a pod on GKE has it, and a token service (STS), at one port.

    It refuses connections until `listen`, and tokens while `denies` is set. `paths` are the
    requests that came in.
    """

    def __init__(self, project: str) -> None:
        self.paths: list[str] = []
        self.denies = threading.Event()
        denies = self.denies
        answers: dict[str, object] = {
            "/": "",
            "/computeMetadata/v1/project/project-id": project,
            "/v1/token": ISSUED,
        }
        for name in ("default", EMAIL):
            account = {"email": EMAIL, "aliases": ["default"]}
            answers |= {f"{ACCOUNTS}{name}/": account, f"{ACCOUNTS}{name}/token": TOKEN}
        paths = self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                paths.append(path)
                denied = denies.is_set() and path.endswith("/token")
                found = None if denied else answers.get(path)
                raw = found if isinstance(found, str) else json.dumps(found)
                self.send_response(404 if found is None else 200)
                self.send_header("Metadata-Flavor", "Google")
                kind = "application/text" if isinstance(found, str) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw.encode())

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Silent: `paths` is the log."""

        self._listening = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.server_bind()  # the port is ours, and nobody listens yet
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> GoogleHttp:
        return self

    def listen(self) -> None:
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self._listening = True

    def __exit__(self, *_: object) -> None:
        if self._listening:
            self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        return dict.fromkeys(
            ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"), self.host
        )


class ConnectProxy:
    """An HTTP proxy: `CONNECT host:443` ends, behind a certificate of that host, at the server that
    `targets` has for it. Any other host is denied. `asked` are the hosts that were asked for."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        self.asked: list[str] = []
        self._targets = targets
        self._authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self._authority.issue_cert(*targets).configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="connect-proxy")

    def __enter__(self) -> ConnectProxy:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.host = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def environment(self, directory: Path, proxy: str = "https_proxy") -> dict[str, str]:
        """With the proxy's variable by this name, and trust in its certificates."""
        path = directory / "google.pem"
        self._authority.cert_pem.write_to_path(str(path))
        roots = dict.fromkeys(("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "REQUESTS_CA_BUNDLE"), str(path))
        return {proxy: f"http://{self.host}", "NO_PROXY": "127.0.0.1", **roots}

    async def _close(self) -> None:
        self._server.close()
        for task in (others := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                head = await reader.readuntil(b"\r\n\r\n")
                host = head.split()[1].decode().partition(":")[0]
                self.asked.append(host)
                if host not in self._targets:
                    writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                    return
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await writer.start_tls(self._context)
                answers, there = await asyncio.open_connection(*self._targets[host].split(":"))
                await asyncio.gather(pump(reader, there), pump(answers, writer))
        finally:
            writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()

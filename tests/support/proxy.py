"""A TCP proxy on loopback that treats what passes through it as a bad network does.

with ChaosProxy(server.host) as proxy:
    ...  # talk to proxy.host
    proxy.become("drip", seconds=0.2)
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal

Mode = Literal["pass", "refuse", "hang", "reset", "drip", "delay"]

CHUNK_BYTES = 65_536
RST_AT_CLOSE = struct.pack("ii", 1, 0)


class ChaosProxy:
    """Counts the bytes of its answers; one mode holds for all connections.

    pass     a good network
    refuse   nobody listens; connections that stand go on
    hang     accepts and reads, and lets nothing through in either direction
    reset    RST once `after_bytes` of a connection's answer have passed: with 0, the server has
             acted and its answer is lost; without, at the connect
    drip     one byte of the answer each `seconds`
    delay    every piece of the answer `seconds` late
    """

    def __init__(self, target: str) -> None:
        self.host = ""
        self.bytes_answered = 0
        self._target = tuple(target.rsplit(":", 1))
        self._mode: Mode = "pass"
        self._seconds = 0.0
        self._after_bytes: int | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy")
        self._server: asyncio.Server | None = None
        self._holder = socket.socket()

    def __enter__(self) -> ChaosProxy:
        self._thread.start()
        # Nobody else gets the port while nobody listens there.
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._holder.getsockname()[1]}"
        self.become("pass")
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._holder.close()

    def become(self, mode: Mode, *, seconds: float = 0, after_bytes: int | None = None) -> None:
        """Treat everything like this from now on, connections that stand included."""
        self._mode, self._seconds, self._after_bytes = mode, seconds, after_bytes
        port = int(self.host.rpartition(":")[2])
        self._do(self._close() if mode == "refuse" else self._listen(port))

    def reset(self) -> None:
        """RST all connections now; new ones are treated as the mode says."""
        self._do(self._drop())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, port: int) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", port, reuse_port=True
            )

    async def _close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None

    async def _drop(self) -> None:
        for task in (others := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._mode == "reset" and self._after_bytes is None:
                raise ConnectionResetError
            answers, there = await asyncio.open_connection(*self._target)
            try:
                await asyncio.gather(self._ask(reader, there), self._answer(answers, writer))
            finally:
                there.close()
            writer.close()
        except (OSError, asyncio.CancelledError):
            with suppress(OSError):
                end = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_AT_CLOSE)
            writer.transport.abort()

    async def _ask(self, reader: asyncio.StreamReader, there: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            if self._mode != "hang":
                there.write(chunk)
                await there.drain()
        there.write_eof()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while chunk := await there.read(CHUNK_BYTES):
            while chunk and self._mode != "hang":
                await asyncio.sleep(self._seconds)
                left = max(0, (self._after_bytes or 0) - passed)
                piece = chunk[: {"reset": left, "drip": 1}.get(self._mode)]
                chunk = chunk[len(piece) :]
                passed += len(piece)
                self.bytes_answered += len(piece)
                writer.write(piece)
                await writer.drain()
                if self._mode == "reset" and passed >= (self._after_bytes or 0):
                    raise ConnectionResetError
        writer.write_eof()

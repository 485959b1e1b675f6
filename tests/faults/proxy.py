"""A TCP proxy that makes a good server look like a bad network: slow, narrow, broken, deaf.

`with Proxy(server_port, Faults(latency=0.05)) as proxy:` serves `proxy.port` from a thread of this process, and
`proxy.counts` says what it did. `python proxy.py PORT --latency 0.05` runs in a process of its own and prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import struct
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, fields

HOST = "127.0.0.1"
CHUNK = 1 << 16


@dataclass(frozen=True)
class Faults:
    """What is wrong with the network; nothing by default."""

    latency: float = 0.0
    """Seconds that a connection takes to open, and that every byte of an answer takes on its way."""
    bytes_per_second: float = 0.0
    """Of the answers on one connection; 0: no limit."""
    refuse: float = 0.0
    """Probability that a connection is closed at once."""
    reset: float = 0.0
    """Probability that a piece of an answer, at most 64 KiB, ends the connection with a reset."""
    cut: float = 0.0
    """Probability that half of a piece arrives before the reset."""
    stall: float = 0.0
    """Probability that a piece of an answer is held up for `stall_seconds`."""
    stall_seconds: float = 1.0
    seed: int = 0


class Proxy:
    """Passes connections on to a port of this machine until it is left."""

    def __init__(self, target_port: int, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        """May be replaced at any time; holds for what comes then."""
        self.counts: Counter[str] = Counter()
        """Connections, pieces and bytes of answers, and each kind of fault, by name."""
        self.planned: deque[str] = deque()
        """What happens to the next pieces of answers, one after the other: "pass", "reset" (the piece is lost),
        "cut" (half of it arrives before the reset) or "stall"; then chance decides again."""
        self.port = 0
        self._target_port = target_port
        self._random = random.Random(self.faults.seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, HOST, 0), self._loop).result()
        self.port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        if self._happens("refuse"):
            _reset(writer)
            return
        await asyncio.sleep(self.faults.latency)
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            _reset(writer)
            return
        there = asyncio.ensure_future(_pass_on(reader, far_writer))
        try:
            await self._answer(far_reader, writer)
        finally:
            there.cancel()
            for end in (writer, far_writer):
                end.close()

    async def _answer(self, far_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass answers on, each piece `latency` after it came, however many are on their way."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        pump = asyncio.ensure_future(self._receive(far_reader, on_the_way))
        try:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not data:
                    return
                self.counts["pieces"] += 1
                planned = self.planned.popleft() if self.planned else ""
                if self._happens("stall", planned):
                    await asyncio.sleep(self.faults.stall_seconds)
                if self._happens("reset", planned):
                    _reset(writer)
                    return
                if self._happens("cut", planned):
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    _reset(writer)
                    return
                if self.faults.bytes_per_second:
                    await asyncio.sleep(len(data) / self.faults.bytes_per_second)
                self.counts["bytes"] += len(data)
                with suppress(OSError):
                    writer.write(data)
                    await writer.drain()
        finally:
            pump.cancel()

    async def _receive(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"more"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            await queue.put((self._loop.time() + self.faults.latency, data))

    def _happens(self, kind: str, planned: str = "") -> bool:
        happens = planned == kind if planned else self._random.random() < getattr(self.faults, kind)
        self.counts[kind] += happens
        return happens


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST and not with FIN, which is what not to linger means."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        writer.close()


def main() -> None:
    """Serve until killed; the first line of output is the port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target_port", type=int)
    for f in fields(Faults):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    args = parser.parse_args()
    faults = {f.name: getattr(args, f.name) for f in fields(Faults)}
    with Proxy(args.target_port, Faults(**faults)) as proxy:
        print(proxy.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

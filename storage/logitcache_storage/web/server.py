"""The server behind the pages: where it listens, what it says, how it ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading

import pyarrow as pa
import uvicorn

from logitcache_storage.errors import InputError
from logitcache_storage.visible import printable
from logitcache_storage.web.app import create_app
from logitcache_storage.web.explorer import load_explorer
from logitcache_storage.web.guard import access_for, is_loopback
from logitcache_storage.web.site import Site

log = logging.getLogger(__name__)

ANY_ADDRESS = ("0.0.0.0", "::")
GRACE_SECONDS = 1
"""How long requests that are under way at the end may take."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        InputError: the port is in use or not ours to take, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as e:
        raise InputError(_described(e, host, port)) from e


def serve(site: Site, listener: socket.socket, host: str) -> None:
    """Answer requests until the process is interrupted (Ctrl-C) or told to end (SIGTERM).

    Args:
        site: what is shown.
        listener: of `bind`.
        host: as it was asked for.
    """
    # Arrow's own allocator takes almost twice the bytes of the tables that are kept among others that come and go.
    pa.set_memory_pool(pa.system_memory_pool())
    port = listener.getsockname()[1]
    access = access_for(host, port)
    config = uvicorn.Config(
        create_app(site, access),
        log_level="critical",  # what goes wrong in a page, the page says and `app` logs
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    print(f"{printable(site.cache.store.url)}: open {_address(host, port, access.token)}", flush=True)
    if not is_loopback(host):
        print(f"Listening at {host}, not at this machine alone: whoever has this address can read the cache.")
    print("Ctrl-C ends it.", flush=True)
    site.start(then=_load_explorer)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has ended in good order, and passes the signal on
        print(flush=True)
        _leave_waiting_requests()
    finally:
        site.stop()


def _load_explorer() -> None:
    """What the target explorer computes with takes seconds to load, for which its first page need not wait."""
    try:
        load_explorer()
    except Exception as e:  # the page says so, too
        log.debug("no target explorer: %s", e)


def _leave_waiting_requests() -> None:
    """End the process now where requests still wait for a store: Python would wait with them, for minutes."""
    names = ("AnyIO worker", "ThreadPoolExecutor")
    workers = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in workers:
        thread.join(GRACE_SECONDS / len(workers))
    if any(thread.is_alive() for thread in workers):
        os._exit(0)  # nothing here is ever written, so nothing is lost


def _address(host: str, port: int, token: str | None) -> str:
    shown = socket.gethostname() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def _described(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; end what listens there, or choose another --port (0: any free one)"
    if isinstance(error, PermissionError):
        return f"port {port} of {host} is not ours to take: ports below 1024 belong to root; choose another --port"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: no address of this machine; give one, 127.0.0.1 for this machine alone, 0.0.0.0 for all"
    return f"cannot listen at {host}, port {port}: {error.strerror or error}"

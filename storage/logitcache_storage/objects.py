"""What a cache asks of an object store, over local files and over fsspec.

A store is a flat namespace of immutable objects below one URL. Two things matter: `create` never replaces an
object and is all or nothing, and reads can ask for a range. Checksums live one layer up, in `committed.py`.

A client may repeat a `create` whose answer was lost, and is then told that its own object is already there: whoever
gets ObjectExistsError reads what is there, and goes on with that.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import fsspec

from logitcache_storage.errors import (
    InputError,
    LogitCacheError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from logitcache_storage.schema import parse_object_path

CONNECT_SECONDS = 10
ANSWER_SECONDS = 20
"""Without a byte from the server for so long, a request has failed. Clients repeat it a few times by themselves: a
server that has stopped answering is given up after two to eight minutes."""
S3_TRIES = 3
"""Of a read, and of each request within it; botocore repeats requests besides. By itself s3fs takes five, of both."""
WRITE_SECONDS = 180
SLOWEST_LINK = 100_000
"""Bytes per second. A write may take so long, all repetitions by the client counted, and on such a link."""

_ASK_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
"""409: of two writes of one object at a time, S3 may refuse one; who asks again is told which object is there."""

_ELSEWHERE = (HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.BAD_REQUEST)
"""What S3 answers to requests that are signed for another region; to those for the head of an object without a word."""

_NO_BUCKET = re.compile(r"NoSuchBucket|(bucket|container) does not exist", re.IGNORECASE)

_SECRET_IN_URL = re.compile(r"//[^/@]*:[^/@]*@|[?&;](sig|X-Amz-Signature|X-Goog-Signature)=", re.IGNORECASE)


class ObjectStore(Protocol):
    """Objects below one URL; paths are relative, with '/' between plain names (`parse_object_path`)."""

    url: str

    def get(self, path: str) -> bytes:
        """All bytes of an object; ObjectNotFoundError where there is none."""

    def get_many(self, paths: list[str]) -> list[bytes]:
        """All bytes of several objects, fetched side by side where the store can."""

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object; fewer, or none, where it ends before."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object, replacing one of the same name."""

    def create(self, path: str, data: bytes) -> None:
        """Write an object whole or not at all; ObjectExistsError where there is one already."""

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below the folder `prefix`, sorted; empty where there is none."""

    def delete(self, path: str) -> None:
        """Remove an object; no error where there is none."""


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> ObjectStore:
    """The store behind a URL: a plain path or file:// is local disk, anything else goes through fsspec.

    Args:
        url: where the cache is, e.g. `./cache`, `s3://bucket/cache`; it stands in records, logs and messages.
        storage_options: handed to fsspec (credentials, endpoint, timeouts); never written anywhere.

    Raises:
        InputError: a password or a signature stands in the URL.
        StoreError: no such protocol, or its client is not installed or refuses the options.
    """
    if "://" not in url or url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    if _SECRET_IN_URL.search(url):
        raise InputError(
            f"{url.split('://')[0]}://...: a URL stands in records and logs, so it must hold no password or signature;"
            " give them as storage options, or through the environment"
        )
    return FsspecStore(url, storage_options)


def check_writable(store: ObjectStore, path: str) -> None:
    """Find out whether a remote store takes objects and gives them up again, before there is work to lose.

    Args:
        store: a local one is not asked: it would get a folder, maybe for a build that is refused for other reasons.
        path: of an object that nobody has; it is written and removed.

    Raises:
        StoreError: there is no such bucket, no credentials, none that may write or delete, or no way to the server.
    """
    if isinstance(store, FsspecStore):
        store.put(path, b"")
        store.delete(path)


class LocalStore(ObjectStore):
    """Objects as files below a folder. A file appears under its name only when all of it is on disk."""

    def __init__(self, root: str) -> None:
        self.url = root
        self._root = Path(root).expanduser().absolute()

    def get(self, path: str) -> bytes:
        """See `ObjectStore`."""
        with _store_errors(self.url, path):
            return self._file(path).read_bytes()

    def get_many(self, paths: list[str]) -> list[bytes]:
        """See `ObjectStore`."""
        return [self.get(path) for path in paths]

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """See `ObjectStore`."""
        with _store_errors(self.url, path), self._file(path).open("rb") as f:
            f.seek(start)
            return f.read(max(0, stop - start))

    def put(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True), self._written(path, data) as temporary:
            temporary.replace(self._file(path))

    def create(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True), self._written(path, data) as temporary:
            os.link(temporary, self._file(path))

    def list(self, prefix: str) -> list[str]:
        """See `ObjectStore`."""
        with _store_errors(self.url, prefix):
            folder = self._file(prefix) if prefix else self._root
            found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            return sorted(p.relative_to(self._root).as_posix() for p in found)

    def delete(self, path: str) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True):
            self._file(path).unlink(missing_ok=True)

    def _file(self, path: str) -> Path:
        return self._root / parse_object_path(path)

    @contextmanager
    def _written(self, path: str, data: bytes) -> Iterator[Path]:
        """A temporary file beside `path` that holds `data` on disk, gone afterwards."""
        folder = self._file(path).parent
        _make_folders(folder)
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            yield temporary
            _fsync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)


class FsspecStore(ObjectStore):
    """Objects on whatever fsspec can reach: S3, GCS, Azure, memory, ..."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self._options = dict(storage_options or {})
        self._connect()

    def get(self, path: str) -> bytes:
        """See `ObjectStore`."""
        with _store_errors(self.url, path):
            return bytes(self._connected().cat_file(self._full(path)))

    def get_many(self, paths: list[str]) -> list[bytes]:
        """See `ObjectStore`."""
        full = [self._full(path) for path in paths]
        with _store_errors(self.url, paths[0] if paths else ""):
            # cat() would read the names as patterns; ranges without bounds are whole objects.
            found = self._connected().cat_ranges(full, [None] * len(full), [None] * len(full), on_error="return")
        for path, result in zip(paths, found, strict=True):
            with _store_errors(self.url, path):
                if isinstance(result, BaseException):
                    raise result
        return [bytes(data) for data in found]

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """See `ObjectStore`."""
        full, fs = self._full(path), self._connected()
        if stop <= start:
            return b""
        with _store_errors(self.url, path):
            try:
                return bytes(fs.cat_file(full, start=start, end=stop))
            except Exception as e:
                if _http_status(e) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # no byte of the object is in it
                    return b""
                raise

    def put(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        self._write(path, data, mode="overwrite")

    def create(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        self._write(path, data, mode="create")

    def list(self, prefix: str) -> list[str]:
        """See `ObjectStore`."""
        return sorted(self.details(prefix))

    def details(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Of every object below the folder `prefix`, in no order, what the file system says: size, times, ..."""
        fs = self._connected()
        with _store_errors(self.url, prefix):
            try:
                found = fs.find(self._full(prefix) if prefix else self._root, detail=True)
            except FileNotFoundError:
                return {}
        base = fs._strip_protocol(self._root).rstrip("/") + "/"
        return {path.removeprefix(base): about for path, about in found.items()}

    def delete(self, path: str) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True), suppress(FileNotFoundError):
            self._connected().rm_file(self._full(path))

    def _write(self, path: str, data: bytes, *, mode: str) -> None:
        fs, full = self._connected(), self._full(path)
        with _store_errors(self.url, path, writing=True):
            if not fs.async_impl:
                fs.pipe_file(full, data, mode=mode)
                return
            # No client bounds the wait for a server that takes no more bytes, or that is to say "100 Continue".
            seconds = WRITE_SECONDS + len(data) / SLOWEST_LINK
            fsspec.asyn.sync(fs.loop, fs._pipe_file, full, data, mode=mode, timeout=seconds)

    def _connect(self) -> None:
        options = {**self._options, **_defaults(self.url, self._options)}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except Exception as e:
            raise StoreError(f"{self.url}: cannot be opened: {_described(e)}") from e
        if self.url.startswith("s3"):
            self._fs.retries = S3_TRIES
        self._pid = os.getpid()

    def _connected(self) -> Any:
        # Asynchronous file systems do not survive a fork, and data loaders fork.
        if self._pid != os.getpid():
            self._connect()
        return self._fs

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{parse_object_path(path)}"


@contextmanager
def _store_errors(url: str, path: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what file systems and clients raise into this project's errors, naming the object."""
    where = f"{url}/{path}"
    try:
        yield
    except FileExistsError as e:
        raise ObjectExistsError(f"{where}: already exists") from e
    except (FileNotFoundError, NotADirectoryError) as e:
        if writing:
            raise StoreError(
                f"{where}: cannot be written, there is no such bucket or folder; make it, or check the URL"
            ) from e
        if _lacks_bucket(e):
            raise StoreError(f"{where}: there is no such bucket; make it, or check the URL") from e
        raise ObjectNotFoundError(f"{where}: no such object") from e
    except LogitCacheError:
        raise
    except Exception as e:  # clients raise what they like: those of botocore, Azure and aiohttp are no OSErrors
        kind = StoreUnavailableError if _is_passing(e) else StoreError
        raise kind(f"{where}: {_described(e)}{_remedy(e, url, writing=writing)}") from e


def _described(error: Exception) -> str:
    """What a client says, in one line: some add the whole answer of the server."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _remedy(error: Exception, url: str, *, writing: bool) -> str:
    status, said = _http_status(error), f"{type(error).__name__} {error}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "; the disk is full"
    if isinstance(error, PermissionError) or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        right = "written" if writing else "read"
        return f"; permission denied: check the credentials, and that they allow {url} to be {right}"
    if "redential" in said:
        return "; give credentials as storage options, or through the environment"
    if status == HTTPStatus.NOT_FOUND:
        return "; there is no such bucket or folder: make it, or check the URL"
    if url.startswith("s3") and status in _ELSEWHERE:
        return "; check that region (AWS_DEFAULT_REGION) and endpoint (AWS_ENDPOINT_URL) are those of the bucket"
    if writing and status == HTTPStatus.NOT_IMPLEMENTED:
        return "; a cache needs a store with create-only writes (If-None-Match), as S3, Azure and Google's have"
    if _is_passing(error):
        return "; check the network and the endpoint, and run the same command again to continue"
    return ""


def _is_passing(error: Exception) -> bool:
    """Whether the store is not there just now, or asks to be left alone: nothing is wrong with what was asked."""
    status, said = _http_status(error), f"{type(error).__name__} {error}"
    if status is not None:
        return status in _ASK_AGAIN or (status >= 500 and status != HTTPStatus.NOT_IMPLEMENTED)
    if isinstance(error, PermissionError) or "redential" in said:
        return False
    return isinstance(error, TimeoutError | ConnectionError) or "Timeout" in said or "onnect" in said


def _lacks_bucket(error: BaseException | None) -> bool:
    """Whether it is the bucket that is not there, and not just an object of it."""
    while error is not None:
        if _NO_BUCKET.search(str(error)):
            return True
        error = error.__cause__
    return False


def _http_status(error: BaseException | None) -> int | None:
    """What the server answered, wherever the client keeps it; None where it does not say."""
    while error is not None:
        answer = getattr(error, "response", None)  # botocore
        if isinstance(answer, dict) and "ResponseMetadata" in answer:
            return int(answer["ResponseMetadata"].get("HTTPStatusCode", 0)) or None
        for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
            value = getattr(error, name, None)
            if isinstance(value, int | str) and str(value).isdecimal():
                return int(value)
        if isinstance(error, OSError) and str(error).startswith("Forbidden:"):  # gcsfs
            return HTTPStatus.FORBIDDEN
        error = error.__cause__
    return None


def _defaults(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options that bound the wait for a server and the number of requests, where the user has not set them.

    By their own defaults s3fs waits seven minutes for a server that does not answer, adlfs five, gcsfs for ever.
    """
    protocol = url.split("://")[0]
    bounds: dict[str, Any] = {}
    given = {**fsspec.config.conf.get(protocol, {}), **options}
    if protocol in ("s3", "s3a"):
        retries = {"mode": "standard", "total_max_attempts": 5}
        config = {"read_timeout": 10, "retries": retries, **given.get("config_kwargs", {})}
        # Else s3fs asks for the size of every object first, to read those of more than 50 MB in pieces side by side.
        return {"max_concurrency": given.get("max_concurrency", 1), "config_kwargs": config}
    if protocol in ("gs", "gcs"):
        import aiohttp

        bounds = {"requests_timeout": aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)}
    elif protocol in ("az", "abfs", "abfss"):
        bounds = {"connection_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
    return {name: value for name, value in bounds.items() if name not in given}


def _make_folders(folder: Path) -> None:
    """Make a folder and what leads to it, all of them on disk afterwards."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:  # a file has the folder's name: it is not the object that is there already
        raise NotADirectoryError(str(e)) from e
    for made in missing:
        _fsync_folder(made.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

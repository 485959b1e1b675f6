"""What a cache asks of an object store, over local files and over fsspec.

A store is a flat namespace of immutable objects below one URL. Two things matter: `create` never replaces an
object and is all or nothing, and reads can ask for a range. Checksums live one layer up, in `committed.py`.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from logitcache_storage.errors import (
    LogitCacheError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from logitcache_storage.schema import parse_object_path


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
        url: where the cache is, e.g. `./cache`, `s3://bucket/cache`.
        storage_options: handed to fsspec (credentials, endpoint); never written anywhere.
    """
    if "://" not in url or url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    return FsspecStore(url, storage_options)


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
        with _store_errors(self.url, path):
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
            except FileNotFoundError:
                raise
            except Exception:
                # Servers refuse a range that holds no byte of the object, each in its own words.
                if start >= fs.size(full):
                    return b""
                raise

    def put(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True):
            self._connected().pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path, writing=True):
            self._connected().pipe_file(self._full(path), data, mode="create")

    def list(self, prefix: str) -> list[str]:
        """See `ObjectStore`."""
        fs = self._connected()
        with _store_errors(self.url, prefix):
            try:
                found = fs.find(self._full(prefix) if prefix else self._root)
            except FileNotFoundError:
                return []
        base = fs._strip_protocol(self._root).rstrip("/") + "/"
        return sorted(path.removeprefix(base) for path in found)

    def delete(self, path: str) -> None:
        """See `ObjectStore`."""
        with _store_errors(self.url, path):
            try:
                self._connected().rm_file(self._full(path))
            except FileNotFoundError:
                return

    def _connect(self) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **self._options)
        except Exception as e:
            raise StoreError(f"{self.url}: cannot be opened: {type(e).__name__}: {e}") from e
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
        raise ObjectNotFoundError(f"{where}: no such object") from e
    except PermissionError as e:
        raise StoreError(f"{where}: permission denied ({e}); check the credentials and the rights on {url}") from e
    except LogitCacheError:
        raise
    except Exception as e:  # clients raise what they like: botocore and aiohttp errors are no OSErrors
        hint = "; the disk is full" if getattr(e, "errno", None) == errno.ENOSPC else ""
        raise StoreError(f"{where}: {type(e).__name__}: {e}{hint}") from e


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

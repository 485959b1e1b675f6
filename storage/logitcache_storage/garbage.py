"""What stands below a cache's URL and belongs to nothing: leavings of writers that died or lost a race.

Garbage is (SPEC.md, section 8) an object of an attempt that neither a plan nor a commit lists; and, beyond that, what
`quarantine/` and `damaged/` say of a shard that has been scored since, and a temporary file of a local writer. What is
not named like one of these is not ours: it is reported and never touched. What is young may be the work of a build
that runs.
"""

from __future__ import annotations

import datetime
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from logitcache_storage import commit
from logitcache_storage.errors import CorruptionError, LogitCacheError, MismatchError, StoreError
from logitcache_storage.objects import FsspecStore, LocalStore, ObjectStore, open_store
from logitcache_storage.plans import PLAN_PATH, load_plans
from logitcache_storage.progress import progress

DEFAULT_HOURS = 24.0
NUM_THREADS = 8

_ATTEMPT_OBJECT = re.compile(
    r"samples/[0-9a-f]{16}-\d{5,}\.(parquet|index)"
    r"|vocabulary/[0-9a-f]{16}\.parquet"
    r"|shards/\d{5,}-[0-9a-f]{16}(\.arrow|\.statistics|/.+)"
)
_RECORD = re.compile(r"(cache|report)\.json|manifest\.(json|parquet)|(plans|commits)/\d{5,}\.json")
_OF_SHARD = re.compile(r"quarantine/(\d{5,})\.json|damaged/(\d{5,})-[0-9a-f]{16}\.json")
_TEMPORARY = re.compile(r"(.*/)?\.[0-9a-f]{32}\.tmp")

_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Under which names file systems say when an object was written: S3, Azure, local and GCS, older GCS, memory."""


@dataclass(frozen=True)
class StoredObject:
    """One object as the store lists it."""

    path: str
    """Below the cache."""
    size: int
    """Bytes."""
    modified: float | None
    """When it was written, in seconds since 1970; None where the store does not say."""


@dataclass(frozen=True)
class Garbage:
    """One object that may be removed."""

    path: str
    size: int
    age_hours: float | None
    kind: str
    """`attempt`: of a plan or shard, listed by no record. `superseded`: what was recorded of a shard that could not be
    scored or read, and was scored since. `temporary`: an unfinished local file."""


@dataclass(frozen=True)
class GarbageReport:
    """What was found; nothing is deleted yet."""

    url: str
    older_than_hours: float
    garbage: tuple[Garbage, ...]
    recent: tuple[Garbage, ...]
    """What would be garbage, but is younger than that, or of unknown age: a running build may be writing it."""
    foreign: tuple[str, ...]
    """Objects that are not named like any of a cache, and links; never touched."""
    num_kept: int
    """Objects that belong to the cache."""


def find_garbage(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    older_than_hours: float = DEFAULT_HOURS,
    quiet: bool = True,
) -> GarbageReport:
    """Look for garbage; deletes nothing.

    Args:
        url: where the cache is.
        storage_options: handed to fsspec.
        older_than_hours: what was written later is left alone; 0 says that no build runs.
        quiet: show no progress.

    Raises:
        CacheNotFoundError: there is no cache.
        CorruptionError: a record cannot be read, so that nobody knows what it lists.
    """
    store = open_store(url, storage_options)
    commit.load_identity(store)
    # Objects before records: what a build writes and commits in between is then listed by its record.
    stored = list(stored_objects(url, storage_options))
    listed, committed = _listed(store, quiet)
    now = time.time()
    garbage: list[Garbage] = []
    recent: list[Garbage] = []
    foreign: list[str] = []
    for item in stored:
        kind = _kind(item.path, listed, committed)
        if kind == "foreign":
            foreign.append(item.path)
        elif kind is not None:
            age = None if item.modified is None else (now - item.modified) / 3600
            is_old = older_than_hours <= 0 or (age is not None and age >= older_than_hours)
            (garbage if is_old else recent).append(Garbage(item.path, item.size, age, kind))
    num_kept = len(stored) - len(garbage) - len(recent) - len(foreign)
    return GarbageReport(url, older_than_hours, tuple(garbage), tuple(recent), tuple(foreign), num_kept)


def delete_garbage(
    report: GarbageReport, storage_options: Mapping[str, Any] | None = None, *, quiet: bool = True
) -> None:
    """Delete what the report calls garbage, and nothing else."""
    store = open_store(report.url, storage_options)
    folder = _local_folder(report.url)

    def delete(item: Garbage) -> Garbage:
        if item.kind == "temporary":
            with _store_errors(f"{report.url}/{item.path}"):
                (folder / item.path).unlink(missing_ok=True)
        else:
            store.delete(item.path)
        return item

    total = sum(item.size for item in report.garbage)
    with progress("deleting", total=total, unit="B", quiet=quiet) as meter, ThreadPoolExecutor(NUM_THREADS) as pool:
        for item in pool.map(delete, report.garbage):
            meter.advance(item.size)
    if isinstance(store, LocalStore):
        _remove_empty_folders(folder, (item.path for item in report.garbage))


def stored_objects(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[StoredObject]:
    """Everything below a URL, hidden files and links included, as the file system lists it; in no order."""
    store = open_store(url, storage_options)
    if isinstance(store, FsspecStore):
        for path, info in store.details("").items():
            yield StoredObject(path, int(info.get("size") or 0), _modified(info))
    else:
        yield from _local_objects(_local_folder(url))


def _kind(path: str, listed: set[str], committed: set[int]) -> str | None:
    """What an object is, `foreign` where it is not ours; None where it belongs to the cache."""
    if path in listed:
        return None
    if _TEMPORARY.fullmatch(path):
        return "temporary"
    if _ATTEMPT_OBJECT.fullmatch(path):
        return "attempt"
    if found := _OF_SHARD.fullmatch(path):
        return "superseded" if int(found[1] or found[2]) in committed else None
    return None if _RECORD.fullmatch(path) else "foreign"


def _listed(store: ObjectStore, quiet: bool) -> tuple[set[str], set[int]]:
    """Paths that a plan, a commit or the manifest lists, and the committed shards."""
    numbers = sorted(commit.committed_shards(store))
    listed: set[str] = set()
    with _readable(), progress("reading records", total=len(numbers), unit="records", quiet=quiet) as meter:
        plans = load_plans(store)
        if plans is None and numbers:
            raise CorruptionError(f"{store.url}/{PLAN_PATH}: missing, and {len(numbers)} shards are committed")
        for plan in [] if plans is None else plans.records:
            listed.update(item.path for item in plan.objects)
        if manifest := commit.load_manifest(store):
            listed.update(item.path for record in manifest.values() for item in record.objects)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for record in pool.map(lambda number: commit.load_commit(store, number), numbers):
                listed.update(item.path for item in record.objects)
                meter.advance()
    return listed, set(numbers)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (CorruptionError, MismatchError) as e:
        raise CorruptionError(f"{e}; {_REFUSED}") from e


def _local_objects(folder: Path) -> Iterator[StoredObject]:
    """Never through a link: what it leads to is not below the cache."""
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *links]:
            path = here / name
            with _store_errors(str(path)):
                try:
                    about = path.lstat()
                except FileNotFoundError:  # a writer's temporary file, gone by now
                    continue
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISREG(about.st_mode):
                yield StoredObject(relative, about.st_size, about.st_mtime)
            else:
                yield StoredObject(f"{relative}@", 0, about.st_mtime)


def _refuse(error: OSError) -> None:
    raise StoreError(f"{error.filename}: cannot be listed: {error}") from error


def _modified(info: Mapping[str, Any]) -> float | None:
    value = next((info[name] for name in _MODIFIED if info.get(name) is not None), None)
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None


def _local_folder(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser().absolute()


def _remove_empty_folders(root: Path, paths: Iterable[str]) -> None:
    """Folders of attempts that hold nothing any more; the cache's own stay."""
    folders = {parent for path in paths for parent in PurePosixPath(path).parents if len(parent.parts) >= 2}
    for folder in sorted(folders, key=lambda parent: -len(parent.parts)):
        try:
            (root / folder).rmdir()
        except OSError:  # not empty, or gone: another process is at work there
            continue


@contextmanager
def _store_errors(where: str) -> Iterator[None]:
    try:
        yield
    except LogitCacheError:
        raise
    except Exception as e:  # clients raise what they like
        raise StoreError(f"{where}: {type(e).__name__}: {e}") from e


_REFUSED = "nothing is deleted while it is not known what a record lists; see 'logitcache verify'"

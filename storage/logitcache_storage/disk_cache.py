"""What was fetched and decoded once, on local disk for every process of a node.

A folder of immutable files, each the result of one `fill`; whoever needs one maps it into memory, so that the pages
are shared. The protocol is made of flock(2) alone, whose locks vanish with their process:

    NAME.part   taken exclusively by whoever fills NAME; a dead process leaves it unlocked, and the next one takes it
    NAME        the part, renamed when it is whole; locked (shared) for as long as somebody has it mapped
    .lock       taken to count bytes and evict: the least recently used file that nobody has locked goes first

A mapping duplicates its file descriptor, and with it the lock, so a file is in use for as long as an array points into
it. What nobody else may touch is never touched here: only files of this folder are removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c

from logitcache_storage.errors import CorruptionError, InputError, StoreError

Fill = Callable[[], Sequence[Any]]
"""Gives the content of a file as buffers, one after the other."""

log = logging.getLogger(__name__)

_PART = ".part"
_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_CHECKSUM_BYTES = 4
_CHECKSUM_BLOCK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskCache:
    """Files of one folder, at most `max_bytes` in all; any number of processes may use the folder at a time."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Make the folder where there is none.

        Args:
            folder: on a disk of this machine.
            max_bytes: bound of the bytes of all files in it, >= 1; the last process to open the folder may change it.

        Raises:
            InputError: a bound below 1, or a folder that cannot be made or locked.
        """
        if max_bytes < 1:
            raise InputError(f"a local cache of {max_bytes} bytes holds nothing; give it at least 1")
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        self._has_warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counting():
                pass
        except OSError as e:
            raise InputError(f"local cache {self.folder}: {e.strerror}; give a folder on a local disk") from e

    def get(self, name: str, fill: Fill, *, source: str, num_bytes: int = 0) -> memoryview:
        """The content of a file, filled by this process unless it is there or another process fills it now.

        The file stays for as long as the memory is pointed to. Where there is no room (the disk is full, or all that
        is there is in use), the content comes back all the same, in this process's own memory, and a warning says so.

        Args:
            name: a plain file name. The content must follow from it: whoever asks for the name gets it.
            fill: see `Fill`; called at most twice.
            source: where the content comes from, for messages.
            num_bytes: of the content, where it is known: then there is room for it before it is fetched.

        Raises:
            CorruptionError: the file was damaged, fetched again, and is damaged again.
            LogitCacheError: whatever `fill` raises.
        """
        content = self._get(name, fill, source, wait=True, num_bytes=num_bytes)
        assert content is not None
        return content

    def get_ahead(self, name: str, fill: Fill, *, source: str, num_bytes: int = 0) -> memoryview | None:
        """As `get`, for what is needed later: None where another process fills the file now, or there is no room.

        Args:
            name: see `get`.
            fill: see `get`.
            source: see `get`.
            num_bytes: see `get`; where there is no room for them, nothing is fetched.
        """
        return self._get(name, fill, source, wait=False, num_bytes=num_bytes)

    def _get(self, name: str, fill: Fill, source: str, *, wait: bool, num_bytes: int) -> memoryview | None:
        if not _NAME.fullmatch(name) or name.endswith(_PART):
            raise InputError(f"local cache {self.folder}: {name!r} is no name for a file in it")
        try:
            for _ in range(2):
                found = self._file(name, fill, wait=wait, num_bytes=num_bytes)
                if not isinstance(found, int):
                    return found
                try:
                    content = _mapped(name, found)
                finally:
                    os.close(found)
                if content is not None:
                    return content
                self._remove_damaged(name)
        except OSError as e:
            raise StoreError(f"{self.folder / name}: {e.strerror}; give the local cache another folder") from e
        raise CorruptionError(
            f"{self.folder / name}: other bytes than were fetched from {source}, twice; check the disk, or put the"
            " local cache elsewhere"
        )

    def _file(self, name: str, fill: Fill, *, wait: bool, num_bytes: int) -> int | memoryview | None:
        """A descriptor of the file, locked as in use; its content where there is no room for it; see `get_ahead`."""
        while True:
            if (file := self._open_file(name)) is not None:
                return file
            part, has_room = None, False
            with _full_disk_is_no_error():
                part, has_room = self._claim_part(name, wait=wait), True
            if part is not None:
                break
            if not wait:
                return None
            if not has_room:
                return self._in_memory(fill())
        filled, buffers = self._filled(name, part, fill, needed=wait, num_bytes=num_bytes)
        if filled is not None:
            return filled
        return self._in_memory(buffers) if wait else None

    def _in_memory(self, buffers: Sequence[Any]) -> memoryview:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "local cache %s: no room (its disk is full, or all of its %d bytes are in use); what does not fit is"
                " read from its source by each process; give it more room",
                self.folder,
                self.max_bytes,
            )
        return memoryview(b"".join(buffers))

    def _open_file(self, name: str) -> int | None:
        """A descriptor of the file, locked as in use; None where there is none."""
        path = self.folder / name
        while True:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is(file, path):
                with suppress(OSError):
                    os.utime(file)  # the time of the last use
                return file
            os.close(file)  # evicted between the two calls

    def _claim_part(self, name: str, *, wait: bool) -> int | None:
        """A descriptor of the part, locked for us to fill; None where another process has filled or fills it."""
        path = self.folder / (name + _PART)
        part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait:
                fcntl.flock(part, fcntl.LOCK_SH)  # until it is whole, or given up
            os.close(part)
            return None
        is_ours = _is(part, path)
        if is_ours and not (self.folder / name).exists():
            return part
        if is_ours:
            path.unlink()
        os.close(part)
        return None

    def _filled(
        self, name: str, part: int, fill: Fill, *, needed: bool, num_bytes: int
    ) -> tuple[int | None, Sequence[Any]]:
        """A descriptor of the file, locked as in use, or None where there is no room; and what was to be written.

        Where it is not needed now, nothing is fetched that is known to have no room.
        """
        path = self.folder / (name + _PART)
        is_done = False
        try:
            has_room = not num_bytes
            with _full_disk_is_no_error():
                has_room = has_room or self._reserve(part, num_bytes + _CHECKSUM_BYTES)
            if not has_room and not needed:
                return None, ()
            buffers = fill()
            if not self._write(name, part, [_bytes_of(buffer) for buffer in buffers]):
                return None, buffers
            with self._counting():  # or it might be counted twice, or not at all
                path.rename(self.folder / name)
            is_done = True
            fcntl.flock(part, fcntl.LOCK_SH)
            return os.dup(part), buffers
        finally:
            if not is_done:
                path.unlink(missing_ok=True)
                fcntl.flock(part, fcntl.LOCK_UN)
            os.close(part)

    def _write(self, name: str, part: int, views: Sequence[memoryview]) -> bool:
        """Write a part with its checksum; False where there is no room."""
        checksum = _checksum(name, views).to_bytes(_CHECKSUM_BYTES, "little")
        offset = 0
        with _full_disk_is_no_error():
            if not self._reserve(part, sum(map(len, views)) + _CHECKSUM_BYTES):
                return False
            for view in (*views, memoryview(checksum)):
                while view:
                    written = os.pwrite(part, view, offset)
                    offset, view = offset + written, view[written:]
            return True
        return False

    def _reserve(self, part: int, num_bytes: int) -> bool:
        """Make a part so long, with zeros, so that its bytes count; False where there is no room for them."""
        with self._counting():
            if os.fstat(part).st_size == num_bytes:
                return True
            os.ftruncate(part, 0)
            if not self._make_room(num_bytes):
                return False
            os.ftruncate(part, num_bytes)
            return True

    def _remove_damaged(self, name: str) -> None:
        """Remove a file whose checksum is wrong, unless somebody has put another in its place since."""
        log.warning("local cache: %s is damaged; it is fetched again", self.folder / name)
        file = self._open_file(name)
        if file is not None:
            if _mapped(name, file) is None:
                (self.folder / name).unlink(missing_ok=True)
            os.close(file)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """One process at a time counts and evicts."""
        lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also for a process forked meanwhile, which has this descriptor, too
            os.close(lock)

    def _make_room(self, num_bytes: int) -> bool:
        """Evict until so many bytes fit, if they do when all is gone that may go; to be called while counting."""
        files = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    if entry.name != _LOCK and entry.is_file(follow_symlinks=False):
                        about = entry.stat(follow_symlinks=False)
                        # What a dead process left goes first.
                        files.append((not entry.name.endswith(_PART), about.st_mtime_ns, entry.name, about.st_size))
        free = self.max_bytes - sum(size for *_, size in files)
        for _, _, name, size in sorted(files):
            if free >= num_bytes:
                return True
            if size and self._evict(name):
                free += size
        return free >= num_bytes

    def _evict(self, name: str) -> bool:
        """Remove a file unless somebody uses or fills it."""
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, path):
                path.unlink()
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(file)


@contextmanager
def _full_disk_is_no_error() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise


def _is(file: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has this name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _bytes_of(buffer: Any) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # nothing cannot be cast


def _mapped(name: str, file: int) -> memoryview | None:
    """The content of a file, as read-only memory that keeps its lock; None where the checksum is wrong."""
    size = os.fstat(file).st_size
    if size < _CHECKSUM_BYTES:
        return None
    whole = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_READ))
    content, checksum = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
    return content if _checksum(name, [content]) == int.from_bytes(checksum, "little") else None


def _checksum(name: str, views: Sequence[memoryview]) -> int:
    """CRC-32C of the name, so that no file is taken for another, and the content."""
    crc = google_crc32c.value(name.encode())
    for view in views:
        for start in range(0, len(view), _CHECKSUM_BLOCK):
            crc = google_crc32c.extend(crc, bytes(view[start : start + _CHECKSUM_BLOCK]))
    return int(crc)

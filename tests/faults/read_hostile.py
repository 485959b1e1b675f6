"""Read caches with little memory: `python read_hostile.py BYTES FUZZED FOLDER...` prints a JSON line for each folder.

Each folder is read as it is; then, if FUZZED is not 0, so many times with a few random bytes of one object changed and
every checksum made good again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

from logitcache_storage import commit, plans
from logitcache_storage.cache import Cache
from logitcache_storage.committed import object_record
from logitcache_storage.errors import LogitCacheError
from logitcache_storage.objects import ObjectStore, open_store
from logitcache_storage.record_json import dump_record
from logitcache_storage.schema import ObjectRecord
from logitcache_storage.status import build_status
from logitcache_storage.verify import verify_cache

SECONDS = 60


def read(url: str) -> None:
    """All that a user of `Cache` may ask for."""
    cache = Cache.open(url)
    for work in (
        lambda: cache.read_tokens(range(len(cache))),
        lambda: [cache.read_shard(shard) for shard in cache.shards],
        lambda: cache.read(range(len(cache))),
        lambda: (cache.samples, cache.keys(), cache.vocabulary, cache.column_names),
    ):
        work()


def outcome(url: str) -> dict[str, str]:
    """What each tool says of a cache: an error of this project, or nothing."""
    found = {"read": "", "status": "", "verify": ""}
    works = {
        "read": lambda: read(url),
        "status": lambda: build_status(open_store(url)),
        "verify": lambda: [f"{item.path}: {item.problem}" for item in verify_cache(url, deep=True).damage],
    }
    for name, work in works.items():
        try:
            said = work()
            found[name] = "; ".join(said) if name == "verify" else ""
        except LogitCacheError as e:
            found[name] = f"{type(e).__name__}: {e}"
        except BaseException as e:
            found[name] = f"UNEXPECTED {type(e).__name__}: {e}"
    return found


def replace_object(store: ObjectStore, record: ObjectRecord, data: bytes) -> None:
    """Put other bytes in an object's place, and make every record that lists it agree."""
    new = object_record(record.path, data)
    store.put(record.path, data)
    store.delete(commit.MANIFEST_PATH)
    plan = plans.load_plan(store)
    assert plan is not None

    def renewed(item: ObjectRecord | None) -> ObjectRecord | None:
        return new if item == record else item

    parts = tuple(
        dataclasses.replace(part, object=renewed(part.object), index=renewed(part.index)) for part in plan.parts
    )
    changed = dataclasses.replace(plan, parts=parts, vocabulary=renewed(plan.vocabulary))
    store.put(plans.PLAN_PATH, dump_record(changed))
    for shard in commit.committed_shards(store):
        found = commit.load_commit(store, shard)
        objects = tuple(renewed(item) for item in found.objects)
        size = sum(item.size for item in objects)
        store.put(commit.commit_path(shard), dump_record(dataclasses.replace(found, objects=objects, num_bytes=size)))


def fuzzed(url: str, count: int) -> dict[str, str]:
    """The outcomes of changed bytes under good checksums, those that are no error of this project alone."""
    store, rng, found = open_store(url), random.Random(0), {}
    plan = plans.load_plan(store)
    assert plan is not None
    originals = {path: store.get(path) for path in store.list("")}
    records = [*plan.objects, *commit.load_commit(store, 0).objects]
    for n in range(count):
        record = records[n % len(records)]
        data = bytearray(originals[record.path])
        for _ in range(rng.choice([1, 1, 2, 8])):
            # The ends hold what describes the rest.
            near = rng.choice([len(data), min(64, len(data))])
            data[rng.choice([1, -1]) * rng.randrange(1, near)] = rng.choice(
                [0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)]
            )
        replace_object(store, record, bytes(data))
        bad = {name: text for name, text in outcome(url).items() if "UNEXPECTED" in text}
        found |= {f"{n} {record.path} {name}": text for name, text in bad.items()}
        for path, original in originals.items():
            store.put(path, original)
    return found


def main() -> None:
    """Each cache in a fork of its own, so that none starts where another has been."""
    num_bytes, num_fuzzed = int(sys.argv[1]), int(sys.argv[2])
    for url in sys.argv[3:]:
        if (child := os.fork()) == 0:
            signal.alarm(SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes,) * 2)
            print(json.dumps(fuzzed(url, num_fuzzed) if num_fuzzed else outcome(url)), flush=True)
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"read": f"UNEXPECTED end with status {status}"}), flush=True)


if __name__ == "__main__":
    main()

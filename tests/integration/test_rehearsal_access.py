"""What a user gets wrong on a cluster, each against a server that asks for credentials: one message, and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from logitcache_pipeline.testing import write_teacher
from logitcache_storage.errors import StoreError
from logitcache_storage.objects import check_writable, open_store
from logitcache_storage.testing import make_identity, make_samples, write_cache

pytestmark = pytest.mark.rehearsal

REHEARSAL = Path(__file__).parents[2] / "deploy" / "rehearsal"
REGION = "eu-central-1"


def load(name: str) -> ModuleType:
    """A module of the rehearsal, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"rehearsal_{name}", REHEARSAL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


class Place:
    """A bucket on a server of one region, and who may do what there."""

    def __init__(self, module: ModuleType, port: int) -> None:
        self.bucket = module.Bucket("bucket", port, REGION)
        self.bucket.create()
        self.writer, self.reader = (self.bucket.add_user(name, name) for name in ("writer", "reader"))
        self.bucket.close_to_strangers()

    def environment(self, user: str, **changes: str | None) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        clean |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "HOME": "/nonexistent"}
        given = {**getattr(self, user).environment(self.bucket), **changes}
        return clean | {name: value for name, value in given.items() if value is not None}


@contextmanager
def served(*, hint: bool) -> Iterator[Place]:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    module = load("bucket")
    port = module.free_port()
    command = module.server_command(port, region=REGION, hint=hint)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        module.wait_until_up(server, port)
        yield Place(module, port)
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Who signs for another region is told the right one, as by AWS."""
    with served(hint=True) as found:
        yield found


@pytest.fixture(scope="module")
def build_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("access")
    corpus = folder / "train.jsonl"
    corpus.write_text("".join(json.dumps({"prompt": f"{n}", "response": f"{n + 1}"}) + "\n" for n in range(20)))
    return ["build", "--teacher", str(write_teacher(folder / "teacher")), "--data", str(corpus), "--k", "4"]


def logitcache(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, and the one line on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "logitcache_storage.cli", *words], env=environment, capture_output=True, text=True
    )
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


NO_KEY = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


@pytest.mark.parametrize(
    ("user", "changes", "expected"),
    [
        ("writer", NO_KEY, r"NoCredentialsError.*; give credentials as storage options, or through the environment"),
        (
            "writer",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            r"permission denied: check the credentials, and that they allow",
        ),
        ("reader", {}, r"permission denied: check the credentials, and that they allow s3://bucket/new to be written"),
    ],
    ids=["no credentials", "wrong credentials", "credentials that may only read"],
)
def test_a_build_is_refused_before_it_reads_the_corpus(place, build_words, user, changes, expected):
    environment = place.environment(user, **changes)
    status, said = logitcache([*build_words, "--cache", "s3://bucket/new"], environment)
    assert status == 1 and re.search(rf"^logitcache build: s3://bucket/new/samples/\S+: .*{expected}", said)
    if changes is NO_KEY:
        status, said = logitcache(["status", "s3://bucket/new"], environment)
        assert status == 1 and re.search(r"^logitcache status: s3://bucket/new/cache\.json: .*(credentials)", said)
    assert place.bucket.objects(place.reader, "new") == {}


def test_a_build_into_a_bucket_that_is_not_there_is_refused_before_it_reads_the_corpus(place, build_words, s3_server):
    endpoint = {"AWS_ENDPOINT_URL": s3_server.storage_options["client_kwargs"]["endpoint_url"]}
    environment = place.environment("writer", **endpoint)
    status, said = logitcache([*build_words, "--cache", "s3://no-such-bucket/new"], environment)
    assert status == 1 and re.search("there is no such bucket or folder; make it, or check the URL", said)


def test_a_student_that_starts_before_the_build_has_ended_is_refused(place, build_words):
    samples, topks = make_samples(30, 4, 50, seed=1)
    writer = {"key": place.writer.access_key, "secret": place.writer.secret_key}
    options = {**writer, "client_kwargs": {"endpoint_url": place.bucket.endpoint, "region_name": REGION}}
    identity = make_identity(k=4, vocab_size=50, shard_rows=50)
    write_cache("s3://bucket/growing", samples, topks, identity=identity, storage_options=options, commit_shards=2)
    words = ["train", "--student", build_words[2], "--cache", "s3://bucket/growing", "--objective", "kd"]
    status, said = logitcache([*words, "--output", "/nonexistent"], place.environment("reader"))
    assert status == 2
    assert re.search(r"s3://bucket/growing is unfinished: \d+ of 30 samples are there; .*--allow_partial", said)


def test_another_region_is_corrected_where_the_server_names_the_right_one(place):
    environment = place.environment("writer", AWS_DEFAULT_REGION="us-west-2")
    status, said = logitcache(["status", "s3://bucket/new"], environment)
    assert status == 2 and "no cache at s3://bucket/new" in said


def test_another_region_is_said_where_the_server_does_not_name_it(build_words):
    remedy = r"; check that region \(AWS_DEFAULT_REGION\) and endpoint \(AWS_ENDPOINT_URL\) are those of the bucket\n$"
    with served(hint=False) as place:
        environment = place.environment("writer", AWS_DEFAULT_REGION="us-west-2")
        status, said = logitcache(["status", "s3://bucket/new"], environment)
        assert status == 1 and re.search(remedy, said)
        status, said = logitcache([*build_words, "--cache", "s3://bucket/new"], environment)
        assert status == 1 and re.search(rf"the region is wrong; expecting '{REGION}'{remedy}", said)


@pytest.mark.parametrize("server", ["s3_server", "azure_server"])
def test_a_missing_bucket_is_no_missing_cache(request: pytest.FixtureRequest, server: str) -> None:
    found = request.getfixturevalue(server)
    store = open_store(f"{found.protocol}://no-such-bucket/cache", found.storage_options)
    for read in (lambda: store.get("cache.json"), lambda: store.get_many(["cache.json"])):
        with pytest.raises(StoreError, match=r"no-such-bucket/cache/cache\.json: .*there is no such bucket; make it"):
            read()


def test_who_may_write_leaves_nothing_by_finding_out(store_location):
    store = open_store(store_location.url, store_location.storage_options)
    check_writable(store, "samples/0123456789abcdef-00000.index")
    assert store.list("") == []
    assert not Path(store_location.url).exists()

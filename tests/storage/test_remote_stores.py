"""What S3, Azure and Google's store refuse, in words that name the object and the remedy; and one cache on each."""

from __future__ import annotations

import datetime
import http.client
import itertools
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from logitcache_storage import commit
from logitcache_storage.cache import Cache
from logitcache_storage.errors import StoreError, StoreUnavailableError
from logitcache_storage.garbage import find_garbage
from logitcache_storage.objects import ANSWER_SECONDS, CONNECT_SECONDS, S3_TRIES, FsspecStore, open_store
from logitcache_storage.samples import target_positions
from logitcache_storage.testing import make_identity, make_samples, write_cache
from logitcache_storage.topk import TopKLogProbs
from logitcache_storage.verify import verify_cache

SAMPLES, TOPKS = make_samples(7, k=3, vocab_size=50, seed=8)
SECRET = "hunter2SECRETmarker"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server on a free port of this machine; yields the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(status: int, code: str) -> Iterator[int]:
    """A server on the loopback interface that answers every request with one S3 error; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # S3 clients ask for "100 Continue"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{code}</Code><Message>{code}.\nRequestId: 7</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as port:
        yield port


@contextmanager
def stumbling(port: int) -> Iterator[tuple[int, list[str]]]:
    """A server in front of another that answers every second request with 500; yields its port and those requests."""
    failed: list[str] = []
    turns = itertools.cycle([True, False])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if next(turns):
                failed.append(f"{self.command} {self.path}")
                status, headers, data = 500, [], b"<Error><Code>InternalError</Code></Error>"
            else:
                behind = http.client.HTTPConnection("127.0.0.1", port)
                behind.request(self.command, self.path, body, dict(self.headers))
                answer = behind.getresponse()
                status, headers, data = answer.status, answer.getheaders(), answer.read()
                behind.close()
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as own_port:
        yield own_port, failed


def operations(store: FsspecStore) -> list[Callable[[], object]]:
    return [
        lambda: store.get("x.json"),
        lambda: store.get_range("x.json", 5, 9),
        lambda: store.get_many(["x.json"]),
        lambda: store.list(""),
        lambda: store.put("x.json", b"{}"),
        lambda: store.create("x.json", b"{}"),
    ]


@pytest.mark.parametrize("write", ["put", "create"])
@pytest.mark.parametrize("server", ["s3_server", "azure_server", "gcs_server"])
def test_writing_into_a_bucket_that_is_not_there(request: pytest.FixtureRequest, server: str, write: str) -> None:
    found = request.getfixturevalue(server)
    url = f"{found.protocol}://no-such-bucket/cache"
    with pytest.raises(StoreError, match=rf"{url}/x\.json: .*there is no such bucket") as e:
        getattr(open_store(url, found.storage_options), write)("x.json", b"{}")
    assert "\n" not in str(e.value)


def test_a_wrong_key_for_azure(azure_server) -> None:
    options = azure_server.storage_options["connection_string"]
    wrong = {"connection_string": re.sub("AccountKey=....", "AccountKey=AAAA", options)}
    key = re.search("AccountKey=([^;]*)", wrong["connection_string"])
    assert key is not None
    for operate in operations(open_store(azure_server.new_url(), wrong)):
        with pytest.raises(StoreError, match=r"az://.*permission denied: check the credentials") as e:
            operate()
        assert key[1] not in str(e.value)


def test_credentials_that_may_only_read(azure_server) -> None:
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    url, owner = azure_server.new_url(), azure_server.storage_options
    open_store(url, owner).put("x.json", b"[]")
    account = dict(part.split("=", 1) for part in owner["connection_string"].rstrip(";").split(";"))
    token = generate_account_sas(
        account["AccountName"],
        account["AccountKey"],
        resource_types=ResourceTypes(service=True, container=True, object=True),
        permission=AccountSasPermissions(read=True, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
        protocol="http",
    )
    store = open_store(
        url, {"connection_string": f"BlobEndpoint={account['BlobEndpoint']};SharedAccessSignature={token}"}
    )
    assert (store.get("x.json"), store.get_range("x.json", 1, 2), store.list("")) == (b"[]", b"]", ["x.json"])
    signature = re.search("sig=([^&]*)", token)
    assert signature is not None
    for write in (store.put, store.create):
        with pytest.raises(StoreError, match=rf"{url}/y\.json: .*check .* that they allow {url} to be written") as e:
            write("y.json", b"{}")
        assert signature[1] not in str(e.value)
    with pytest.raises(StoreError, match=r"x\.json"):
        store.delete("x.json")


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_what_s3_refuses(code: str) -> None:
    pytest.importorskip("s3fs")
    with answering(403, code) as port:
        endpoint = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-west-2"}
        store = open_store("s3://bucket/cache", {"key": "k", "secret": SECRET, "client_kwargs": endpoint})
        for operate in operations(store):
            with pytest.raises(StoreError, match=r"s3://bucket/cache/.*permission denied: check the credentials") as e:
                operate()
            assert SECRET not in str(e.value) and "\n" not in str(e.value)


def test_a_server_that_stumbles_is_asked_again(s3_server) -> None:
    """By the client itself, after a pause that grows: a reader need not be told of one answer of 500.

    No read takes more than one request that goes well: a question for the size (HEAD) would not be answered.
    """
    with stumbling(s3_server.port) as (port, failed):
        endpoint = {**s3_server.storage_options["client_kwargs"], "endpoint_url": f"http://127.0.0.1:{port}"}
        store = open_store(s3_server.new_url(), {**s3_server.storage_options, "client_kwargs": endpoint})
        store.create("a/x", b"0123456789")
        assert store.get_range("a/x", 2, 5) == b"234"
        assert store.get_many(["a/x"]) == [b"0123456789"]
        assert store.list("a") == ["a/x"]
    assert [request.split()[0] for request in failed] == ["PUT", "GET", "GET", "GET"]


def test_a_store_without_create_only_writes_is_told_so() -> None:
    pytest.importorskip("s3fs")
    with answering(501, "NotImplemented") as port:
        endpoint = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-west-2"}
        store = open_store("s3://bucket/cache", {"key": "k", "secret": SECRET, "client_kwargs": endpoint})
        with pytest.raises(StoreError, match=r"x\.json: .*needs a store with create-only writes") as e:
            store.create("x.json", b"{}")
    assert not isinstance(e.value, StoreUnavailableError), "nobody is to wait for it"


def test_no_credentials(s3_server) -> None:
    """In a process without any: those of a machine or a user are found in many places."""
    options = {"client_kwargs": s3_server.storage_options["client_kwargs"]}
    code = (
        "from logitcache_storage.objects import open_store\n"
        f"store = open_store('s3://bucket/cache', {options!r})\n"
        "try: store.get('x.json')\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nowhere = {"HOME": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | nowhere, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"StoreError s3://bucket/cache/x\.json: .*credentials; give credentials as storage options, or .*\n",
        done.stdout,
    )


def test_an_unreachable_server_is_a_store_error() -> None:
    pytest.importorskip("s3fs")
    options = {
        "key": "k",
        "secret": SECRET,
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-west-2"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    store = open_store("s3://bucket/cache", options)
    store._fs.retries = 1
    with pytest.raises(StoreError, match=r"s3://bucket/cache/cache\.json: .*check the network and the endpoint") as e:
        store.get("cache.json")
    assert SECRET not in str(e.value)


def test_no_wait_is_for_ever(s3_server, azure_server, gcs_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client has bounds, but for those that the user gave; tests/faults holds a server that stalls."""
    s3 = open_store(s3_server.new_url(), s3_server.storage_options)._fs
    retries = {"mode": "standard", "total_max_attempts": 5}
    assert s3._prepare_config_kwargs() == {"retries": retries, "connect_timeout": 5, "read_timeout": 10}
    assert (s3.retries, s3.max_concurrency) == (S3_TRIES, 1)
    azure = open_store(azure_server.new_url(), azure_server.storage_options)._fs
    assert azure._timeout_kwargs == {"connection_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
    gcs = open_store(gcs_server.new_url(), gcs_server.storage_options)._fs.requests_timeout
    assert (gcs.sock_connect, gcs.sock_read, gcs.total) == (CONNECT_SECONDS, ANSWER_SECONDS, None)

    own = {**s3_server.storage_options, "config_kwargs": {"read_timeout": 77, "retries": {"max_attempts": 1}}}
    s3 = open_store(s3_server.new_url(), {**own, "max_concurrency": 5})._fs
    assert s3.max_concurrency == 5
    assert s3._prepare_config_kwargs() == {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 77}
    azure = open_store(azure_server.new_url(), {**azure_server.storage_options, "read_timeout": 77})._fs
    assert azure._timeout_kwargs == {"connection_timeout": CONNECT_SECONDS, "read_timeout": 77}

    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "gs", {"requests_timeout": 77})
    assert open_store(gcs_server.new_url(), gcs_server.storage_options)._fs.requests_timeout == 77


@pytest.mark.parametrize("container", ["zarr", "arrow"])
def test_a_cache_on_every_store(store_location, container: str) -> None:
    url, options = store_location.url, store_location.storage_options
    identity = make_identity(k=3, precision="fp32", container=container, shard_rows=30)
    write_cache(url, SAMPLES, TOPKS, identity=identity, storage_options=options, commit_shards=1)
    write_cache(url, SAMPLES, TOPKS, identity=identity, storage_options=options)
    report = verify_cache(url, deep=True, storage_options=options)
    assert (report.is_intact, report.num_shards) == (True, report.num_planned_shards)
    cache = pickle.loads(pickle.dumps(Cache.open(url, options)))
    assert len(cache.plan.shard_num_rows) > 1
    for i in (6, 0, 3):
        assert np.array_equal(cache[i].input_ids, SAMPLES[i][0])
        assert cache[i].topk.equals(TOPKS[i])


def test_a_lost_race_costs_garbage_where_create_only_is_not_enforced(gcs_server) -> None:
    """Whichever commit record stays, what it lists is whole."""
    url, options = gcs_server.new_url(), gcs_server.storage_options
    identity = make_identity(k=3, precision="fp32", container="arrow", shard_rows=30)
    write_cache(url, SAMPLES, TOPKS, identity=identity, storage_options=options)
    store = open_store(url, options)
    sizes = Cache.open(url, options).plan.shard_num_rows
    inside = range(next(n for n in range(len(SAMPLES) + 1) if sum(map(len, TOPKS[:n])) == sizes[0]))
    labels = np.concatenate([SAMPLES[i][0][target_positions(SAMPLES[i][1].ravel())] for i in inside])
    topk = TopKLogProbs.concatenate([TOPKS[i] for i in inside])
    first = commit.load_commit(store, 0)
    second = commit.commit_shard(store, identity, 0, topk, labels, seconds=0.0, worker="late")
    assert commit.load_commit(store, 0).attempt == second.attempt != first.attempt  # what S3 and Azure refuse
    assert not verify_cache(store, deep=True).is_intact  # the manifest says otherwise, and is written again
    commit.write_manifest(store, {**commit.load_commits(store), 0: second})
    assert verify_cache(store, deep=True).is_intact
    assert [sample.topk.equals(topk) for sample, topk in zip(Cache.open(url, options), TOPKS, strict=True)] == [
        True
    ] * 7
    report = find_garbage(url, options, older_than_hours=0)
    assert {item.path for item in report.garbage} == {item.path for item in first.objects}


def test_create_only_is_asked_of_every_server(gcs_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator ignores the condition, but the request carries it."""
    import aiohttp

    asked: list[str] = []
    request = aiohttp.ClientSession._request

    async def watched(self, method, url, **kwargs):  # type: ignore[no-untyped-def]
        asked.append(f"{method} {url} {kwargs.get('params')}")
        return await request(self, method, url, **kwargs)

    monkeypatch.setattr(aiohttp.ClientSession, "_request", watched)
    store = open_store(gcs_server.new_url(), gcs_server.storage_options)
    store.put("x.json", b"{}")
    store.create("y.json", b"{}")
    assert ["ifGenerationMatch" in text for text in asked if text.startswith("POST")] == [False, True]

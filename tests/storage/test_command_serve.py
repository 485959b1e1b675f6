"""`logitcache serve` as a process: what it prints, and how it begins and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitcache_storage.cli import main
from logitcache_storage.fingerprints import tokenizer_identity
from logitcache_storage.testing import make_identity, make_samples, write_cache

pytest.importorskip("uvicorn", reason="pip install 'logitcache[web]'")

STORAGE = Path(__file__).parents[2] / "storage"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("serve"))
    samples, topks = make_samples(5, 4, 50)
    write_cache(folder, samples, topks, identity=make_identity(k=4))
    return folder


@pytest.fixture
def serve(tmp_path):
    processes = []

    def start(*words):
        environment = {**os.environ, "PYTHONPATH": str(STORAGE), "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "logitcache_storage.cli", "serve", *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        return answer.read().decode(), answer.headers


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_its_address_and_ends_cleanly(url, serve, how):
    process = serve(url, "--port", "0")
    line = process.stdout.readline()
    address = re.fullmatch(rf"{re.escape(url)}: open (http://127\.0\.0\.1:\d+/)\n", line)[1]
    page, headers = get(address)
    assert "<h1>Overview</h1>" in page and "server" not in headers
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert err == "" and process.returncode == (0 if how == signal.SIGINT else -signal.SIGTERM)


STUCK = """
import sys, time
from logitcache_storage.cache import Cache
from logitcache_storage.web.server import bind, serve
from logitcache_storage.web.site import Site

class Stuck:
    def __getattr__(self, name):
        return getattr(opened.store, name)
    def get(self, path):
        return self.wait(path) or opened.store.get(path)
    def get_range(self, path, start, stop):
        return self.wait(path) or opened.store.get_range(path, start, stop)
    def wait(self, path):
        if "/codes/" in path:
            print("waiting", flush=True)
            time.sleep(200)

opened = Cache.open(sys.argv[1])
with bind("127.0.0.1", 0) as listener:
    serve(Site(Cache(Stuck(), opened.identity, opened.plan, opened.shards)), listener, "127.0.0.1")
"""


def test_a_request_that_waits_for_a_store_does_not_hold_up_the_end(url, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(STORAGE), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", STUCK, url]
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            # What a shell starts in the background ignores interrupts, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        address = process.stdout.readline().split()[-1]
        process.stdout.readline()
        pool.submit(get, f"{address}samples/0")
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_other_machines_need_the_token_that_is_printed(url, serve):
    process = serve(url, "--port", "0", "--host", "0.0.0.0")
    address = re.search(r"open http://[^:/]+:(\d+)/(\?token=[\w-]{32,})\n", process.stdout.readline())
    assert "not at this machine alone: whoever has this address can read the cache" in process.stdout.readline()
    base = f"http://127.0.0.1:{address[1]}/"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(base)
    page, headers = get(base + address[2])
    assert "<h1>Overview</h1>" in page
    cookie = headers["set-cookie"].split(";")[0]
    assert "<h1>Samples</h1>" in get(f"{base}samples", cookie=cookie)[0]


def test_a_port_in_use_is_named_with_its_remedy(url, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", url, "--port", port]) == 2
    said = f"logitcache serve: port {port} of 127.0.0.1 is in use; end what listens there, or choose another --port"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--port", "70000"], "expected a port from 0 to 65535, found '70000'"),
        (["--port", "x"], "expected a port"),
        (["--host", "203.0.113.7", "--port", "0"], "--host 203.0.113.7: no address of this machine"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host no.such.host.invalid: no address of this machine"),
        (["no/such/cache"], "no cache at no/such/cache"),
    ],
)
def test_wrong_arguments_are_named(url, words, problem, capsys):
    assert main(["serve", url, *words, *([] if "--port" in words else ["--port", "0"])]) == 2
    assert problem in capsys.readouterr().err


def test_two_caches_whose_ids_mean_different_things_are_refused(url, tmp_path, capsys):
    samples, topks = make_samples(5, 4, 50)
    other = tokenizer_identity({"a": 1}, {}, None)
    write_cache(str(tmp_path), samples, topks, identity=make_identity(k=4, tokenizer=other))
    assert main(["serve", url, str(tmp_path), "--port", "0"]) == 2
    assert "their token ids do not mean the same" in capsys.readouterr().err


def test_without_its_packages_it_names_the_extra(url, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "logitcache_storage.web.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", url]) == 1
    assert capsys.readouterr().err == (
        "logitcache serve: needs the package 'uvicorn', which is not installed; run: pip install \"logitcache[web]\"\n"
    )

"""Credentials go to the store and nowhere else: not into a cache, a log, a message, or what Ray keeps of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitcache_pipeline.testing import write_teacher
from logitcache_storage.cli import main
from logitcache_storage.objects import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SECRET, TOKEN = "hunter2SECRETmarker", "hunter2TOKENmarker"


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Short, because the paths of Ray's sockets begin with it."""
    with tempfile.TemporaryDirectory(prefix="lc", ignore_cleanup_errors=True) as folder:
        yield folder


def test_nothing_secret_is_written_or_said(s3_server, tmp_path: Path, ray_folder: str, capfd, caplog) -> None:
    url, copy = s3_server.new_url(), s3_server.new_url()
    options = {**s3_server.storage_options, "secret": SECRET, "token": TOKEN}
    nowhere = {**options["client_kwargs"], "endpoint_url": "http://127.0.0.1:9"}
    wrong = json.dumps({**options, "client_kwargs": nowhere, "config_kwargs": {"retries": {"max_attempts": 0}}})
    corpus, teacher = tmp_path / "train.jsonl", write_teacher(tmp_path / "teacher")
    corpus.write_text("\n".join(json.dumps({"prompt": f"count to {n}", "response": "1 2 3"}) for n in range(12)))
    build = ["build", "--teacher", str(teacher), "--data", str(corpus), "--cache", url, "--k", "4"]

    # The build ends as a process, with all of Ray; as an option, and through the environment of fsspec.
    for words, environment in (
        ([*build, "--storage-options", json.dumps(options)], {"RAY_TMPDIR": ray_folder}),
        (["status", url], {"FSSPEC_S3": json.dumps(options)}),
    ):
        command = [sys.executable, "-m", "logitcache_storage.cli", *words]
        subprocess.run(command, env={**os.environ, **environment}, cwd=tmp_path, check=True)
    for words, given, status in (
        (["status", url], wrong, 1),
        (["status", url], wrong[:-1], 2),
        (["status", url.replace("s3://", f"s3://key:{SECRET}@")], json.dumps(options), 2),
        (["verify", url, "--deep", "--json"], json.dumps(options), 0),
        (["stats", url], json.dumps(options), 0),
        (["inspect", url], json.dumps(options), 0),
        (["gc", url], json.dumps(options), 0),
        (["copy", url, copy], json.dumps(options), 0),
    ):
        assert main([*words, "--storage-options", given]) == status
    said = "".join(capfd.readouterr()) + caplog.text
    assert "check the network" in said and "a URL stands in records and logs" in said

    kept = contents_of(tmp_path) | contents_of(Path(ray_folder))
    assert any("/logs/" in path for path in kept)
    for place in (url, copy):
        store = open_store(place, s3_server.storage_options)
        kept |= {path: store.get(path) for path in store.list("")}
    assert [name for name, data in {**kept, "output": said.encode()}.items() if b"hunter2" in data] == []

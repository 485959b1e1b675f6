"""An S3 server of a benchmark's own, which counts what it hands out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "rehearsal"))
from bucket import Bucket, User, free_port, server_command, wait_until_up

NAME, REGION = "corpus", "eu-central-1"
URL = f"s3://{NAME}/cache"


@contextmanager
def local_bucket() -> Iterator[tuple[Bucket, User, User]]:
    """A bucket while the server runs, with one user who may write and one who may read."""
    port = free_port()
    server = subprocess.Popen(server_command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_up(server, port)
        bucket = Bucket(NAME, port, REGION)
        bucket.create()
        yield bucket, bucket.add_user("writer", "writer"), bucket.add_user("reader", "reader")
    finally:
        server.terminate()
        server.wait(10)

"""An S3 server that asks for credentials and counts what it hands out: moto, with users, in a process of its own.

    python bucket.py --port PORT --region REGION

Who it is that reads is known by the access key, so that the bytes of one reader can be told from those of others. Users
have the policies of deploy/policies, so those are rehearsed, too.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
TRAFFIC_PATH = "/-/traffic"
POLICIES = Path(__file__).parent.parent / "policies"
START_SECONDS = 120

_CREDENTIAL = re.compile(r"Credential=([^/,]+)/\d+/([^/,]+)/([^/,]+)/")


@dataclass(frozen=True)
class User:
    """Who may ask the server for something."""

    access_key: str
    secret_key: str

    def environment(self, bucket: Bucket) -> dict[str, str]:
        """What a process needs to reach the bucket as this user; the names are those that every S3 client reads."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": bucket.endpoint,
            "AWS_DEFAULT_REGION": bucket.region,
        }


class Bucket:
    """A bucket of that name on a server that is running."""

    def __init__(self, name: str, port: int, region: str) -> None:
        self.name, self.endpoint, self.region = name, f"http://{HOST}:{port}", region

    def create(self) -> None:
        """Make the bucket; before `close_to_strangers`, while the server asks for no credentials."""
        self._client("s3").create_bucket(
            Bucket=self.name, CreateBucketConfiguration={"LocationConstraint": self.region}
        )

    def add_user(self, name: str, policy: str) -> User:
        """A user who may do what deploy/policies/`policy`.json says, with this bucket."""
        iam = self._client("iam")
        document = (POLICIES / f"{policy}.json").read_text(encoding="utf-8").replace("BUCKET", self.name)
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName=policy, PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return User(key["AccessKeyId"], key["SecretAccessKey"])

    def close_to_strangers(self) -> None:
        """From now on every request needs the signature of a user, and a policy that allows it."""
        # The number of requests that are still answered without a look at who asks.
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=10).close()

    def objects(self, user: User, prefix: str = "") -> dict[str, int]:
        """Names and sizes of the objects whose names begin so."""
        pages = self._client("s3", user).get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read(self, user: User, key: str) -> bytes:
        """All bytes of an object."""
        return bytes(self._client("s3", user).get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, user: User, key: str, data: bytes) -> None:
        """Write an object."""
        self._client("s3", user).put_object(Bucket=self.name, Key=key, Body=data)

    def bytes_read(self, user: User) -> Counter[str]:
        """Bytes of each object that were sent to this user, by name; of lists and errors under the empty name."""
        with urllib.request.urlopen(self.endpoint + TRAFFIC_PATH, timeout=10) as answer:
            rows = json.load(answer)
        found: Counter[str] = Counter()
        for access_key, path, num_bytes in rows:
            if access_key == user.access_key:
                found[path.removeprefix(f"/{self.name}/") if path.startswith(f"/{self.name}/") else ""] += num_bytes
        return found

    def _client(self, service: str, user: User | None = None) -> Any:
        import boto3

        who = user or User("setup", "setup")
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=who.access_key,
            aws_secret_access_key=who.secret_key,
        )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def server_command(port: int, *, region: str = "", hint: bool = True) -> list[str]:
    """The command line of a server.

    Args:
        port: where it listens.
        region: the only one for which requests may be signed; any where it is empty.
        hint: name the right region to who signed for another, as AWS does.
    """
    words = [sys.executable, str(Path(__file__)), "--port", str(port), "--region", region]
    return words if hint else [*words, "--no-hint"]


def wait_until_up(process: subprocess.Popen[Any], port: int) -> None:
    """Wait for a server to answer.

    Raises:
        RuntimeError: it has ended, or takes more than a minute.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}{TRAFFIC_PATH}", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server on port {port} is not there; is moto installed (pip install 'moto[server]')?")


class CountedApplication:
    """A WSGI application in front of another, which counts bytes and looks at the region of a signature."""

    def __init__(self, application: Callable[..., Iterable[bytes]], region: str, hint: bool) -> None:
        self._application, self._region, self._hint = application, region, hint
        self._lock = threading.Lock()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """See PEP 3333."""
        path = environ["PATH_INFO"]
        if path == TRAFFIC_PATH:
            with self._lock:
                rows = [[*who_and_what, count] for who_and_what, count in self._bytes.items()]
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(rows).encode()]
        signed = _CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
        if signed and signed[3] == "s3" and self._region not in ("", signed[2]):
            return self._other_region(start_response, is_head=environ["REQUEST_METHOD"] == "HEAD")
        return self._counted(self._application(environ, start_response), signed[1] if signed else "", path)

    def _counted(self, body: Iterable[bytes], access_key: str, path: str) -> Iterator[bytes]:
        try:
            for data in body:
                with self._lock:
                    self._bytes[access_key, path] += len(data)
                yield data
        finally:
            getattr(body, "close", lambda: None)()

    def _other_region(self, start_response: Callable[..., Any], *, is_head: bool) -> list[bytes]:
        named = f"<Region>{self._region}</Region>" if self._hint else ""
        message = f"The authorization header is malformed; the region is wrong; expecting '{self._region}'"
        body = f"<Error><Code>AuthorizationHeaderMalformed</Code><Message>{message}</Message>{named}</Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        if self._hint:
            headers.append(("x-amz-bucket-region", self._region))
        start_response("400 Bad Request", headers)
        return [b"" if is_head else body]


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--region", default="")
    parser.add_argument("--no-hint", action="store_true")
    args = parser.parse_args()
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application = CountedApplication(DomainDispatcherApplication(create_backend_app), args.region, not args.no_hint)
    run_simple(HOST, args.port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main()

"""Waiting for a store: which errors are worth it, how often it is asked, and when that ends."""

from __future__ import annotations

import time

import pytest

from logitcache_storage import patience
from logitcache_storage.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from logitcache_storage.objects import LocalStore, ObjectStore
from logitcache_storage.patience import patiently


def http_error(status: int) -> Exception:
    botocore = pytest.importorskip("botocore.exceptions")
    return botocore.ClientError({"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "X"}}, "PutObject")


def failing_store(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: str) -> ObjectStore:
    def fail(self: object, path: str) -> bytes:
        raise error

    monkeypatch.setattr(LocalStore, "_file", fail)
    return LocalStore(str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [TimeoutError("no answer"), ConnectionResetError("by peer"), OSError("Could not connect to the endpoint URL")]
    + [http_error(status) for status in (408, 409, 429, 500, 502, 503, 504)],
    ids=repr,
)
def test_what_may_pass_is_said_to_be_unavailable(error, monkeypatch, tmp_path):
    with pytest.raises(StoreUnavailableError, match="check the network and the endpoint"):
        failing_store(error, monkeypatch, tmp_path).get("a")


@pytest.mark.parametrize(
    "error",
    [PermissionError("no"), OSError(28, "No space left on device"), OSError("Unable to locate credentials")]
    + [http_error(status) for status in (400, 401, 403, 404, 412, 501)],
    ids=repr,
)
def test_what_will_not_pass_is_not(error, monkeypatch, tmp_path):
    with pytest.raises(StoreError) as found:
        failing_store(error, monkeypatch, tmp_path).get("a")
    assert not isinstance(found.value, StoreUnavailableError)


class Action:
    """Fails so often before it goes well."""

    def __init__(self, num_failures: int, error: Exception | None = None) -> None:
        self.num_calls, self._num_failures = 0, num_failures
        self._error = error or StoreUnavailableError("away")

    def __call__(self) -> str:
        self.num_calls += 1
        if self.num_calls <= self._num_failures:
            raise self._error
        return "done"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_SECONDS", 0.04)


def test_it_is_asked_again_until_it_answers():
    action, heard = Action(4), []
    start = time.monotonic()
    assert patiently(action, seconds=60, on_pause=heard.append) == "done"
    assert action.num_calls == 5 and list(map(str, heard)) == ["away"] * 4
    assert time.monotonic() - start >= 0.01 + 0.02 + 0.04 + 0.04


def test_it_is_given_up_after_a_while():
    action = Action(10**6)
    with pytest.raises(StoreUnavailableError, match="away"):
        patiently(action, seconds=0.2)
    assert 3 <= action.num_calls <= 8


def test_other_errors_are_raised_at_once():
    action = Action(1, ObjectNotFoundError("gone"))
    with pytest.raises(ObjectNotFoundError):
        patiently(action, seconds=60)
    assert action.num_calls == 1

"""The driver's loop over real Ray actors that raise, die, hang or never start, as they are told to."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import ray
from faulty_workers import ALWAYS, SLOW, Events, attempts, doing, run
from ray.core.generated import autoscaler_pb2

from logitcache_storage.errors import BuildError, MismatchError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", autouse=True)
def driver(ray_address: str) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules["faulty_workers"])
    ray.init(ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache_pipeline.run.POLL_SECONDS", 0.1)


def test_all_shards_in_order(tmp_path):
    events = run(tmp_path, 7, {})
    assert events.committed_shards == list(range(7))
    assert not events.failures
    assert attempts(tmp_path, "start") == 1


def test_the_longest_shards_come_first_and_equal_ones_in_order(tmp_path):
    tokens = {0: 5, 1: 80, 2: 5, 3: 200, 4: 80}
    assert run(tmp_path, 5, {}, tokens=tokens.__getitem__).committed_shards == [3, 1, 4, 0, 2]


def test_a_worker_that_is_replaced_hands_its_number_on(tmp_path):
    events = Events()
    with doing((tmp_path / "go").touch, when=lambda: max(map(len, events.worker_names.values()), default=0) == 2):
        run(tmp_path, 4, {1: ("exit", 1), 0: ("hold", 1)}, num_workers=2, events=events)
    assert sorted(events.worker_names) == [0, 1]
    assert sorted(map(len, events.worker_names.values())) == [1, 2]


def test_no_tasks_start_no_worker(tmp_path):
    run(tmp_path, 0, {}, num_workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_a_passing_fault_costs_an_attempt(tmp_path, fault):
    events = run(tmp_path, 5, {2: (fault, 1)})
    assert events.failures == [(2, 1)]
    assert sorted(events.committed_shards) == list(range(5))
    assert attempts(tmp_path, 2) == 2


@pytest.mark.parametrize(
    ("fault", "reason"), [("raise", "RuntimeError: 2 is bad"), ("exit", "its worker died or cannot be reached")]
)
def test_a_lasting_fault_is_quarantined_and_the_others_are_done(tmp_path, fault, reason):
    events = run(tmp_path, 5, {2: (fault, ALWAYS)}, max_attempts=2)
    assert events.failures == [(2, 1), (2, 2)]
    # A shard that takes its worker down goes last.
    assert events.committed_shards == [0, 1, 3, 4]
    assert len(events.quarantined[2]) == attempts(tmp_path, 2) == 2
    assert all(found.startswith(reason) and "(on worker " in found for found in events.quarantined[2])


@pytest.mark.slow
@pytest.mark.rehearsal
def test_many_faults_at_once_lose_only_the_shards_that_cannot_be_scored(tmp_path):
    faults = {
        "start": ("exit", 1),
        1: ("raise", 1),
        3: ("exit", 1),
        5: ("exit", ALWAYS),
        6: ("no store", 1),
        8: ("hang", ALWAYS),
        9: ("raise", ALWAYS),
    }
    events = run(tmp_path, 10, faults, num_workers=2, max_attempts=2, shard_deadline=2.0)
    assert sorted(events.quarantined) == [5, 8, 9]
    assert [len(reasons) for reasons in events.quarantined.values()] == [2, 2, 2]
    assert all("no answer within 2 s" in reason for reason in events.quarantined[8])
    assert Counter(shard for shard, _ in events.failures) == {1: 1, 3: 1, 5: 2, 6: 1, 8: 2, 9: 2}
    for shard in range(10):
        numbers = [attempt for failed, attempt in events.failures if failed == shard]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_shard_is_written_while_the_next_one_is_scored(tmp_path):
    """The worker, which knows when it began and ended each, has two in hand at a time, and never a third."""
    faults = {name: ("slow", 1) for shard in range(6) for name in (shard, f"commit {shard}")}
    start, first = time.monotonic(), []
    events = Events()
    with doing(lambda: first.append(time.monotonic()), when=lambda: bool(events.worker_names)):
        run(tmp_path, 6, faults, events=events)
    took = time.monotonic() - first[0]
    assert events.committed_shards == list(range(6))
    assert 7 * SLOW <= took + 0.1 < 12 * SLOW - 1 and start < first[0]


def test_what_was_being_written_is_not_blamed_for_the_shard_that_kills(tmp_path):
    """Shard 0 is on its way into the store when the next one takes the worker down."""
    events = run(tmp_path, 3, {"commit 0": ("hold", 1), 1: ("exit beside a commit", 1)}, max_attempts=2)
    assert (events.failures, events.given_back_shards) == ([(1, 1)], [0])
    assert sorted(events.committed_shards) == [0, 1, 2]


def test_a_shard_whose_commit_kills_is_found_out(tmp_path):
    """It is alone from its second attempt on, and no other shard is lost with it."""
    events = run(tmp_path, 4, {"commit 1": ("exit", ALWAYS)}, max_attempts=3)
    assert list(events.quarantined) == [1]
    assert sorted(events.committed_shards) == [0, 2, 3]


def test_a_bad_sample_is_left_out(tmp_path):
    """One that kills or hangs: see tests/faults."""
    events = run(tmp_path, 3, {"sample 105": ("raise", ALWAYS)}, num_samples=16, max_attempts=2)
    assert sorted(events.committed_shards) == [0, 1, 2] and not events.quarantined
    assert list(events.excluded) == [105]
    assert len(events.failures) <= 2 + 4 and attempts(tmp_path, "sample 105") == len(events.failures)


def test_a_worker_that_is_broken_for_good_is_replaced_and_loses_nothing(tmp_path):
    """As CUDA is after some errors: whatever the process is asked for fails, and at once."""
    events = run(tmp_path, 6, {1: ("break", 1)}, num_samples=8)
    assert sorted(events.committed_shards) == list(range(6)) and not events.excluded
    assert events.leaving == [(0, "3 attempts in a row failed")] and len(events.worker_names[0]) == 2
    assert events.failures == [(1, 1), (1, 2), (1, 3)]


def test_a_worker_that_is_told_to_stop_costs_no_attempt(tmp_path):
    events = run(tmp_path, 3, {1: ("stop", 2)}, max_attempts=1)
    assert events.committed_shards == [0, 1, 2] and not events.failures
    assert (events.given_back_shards, len(events.leaving)) == ([1, 1], 2)
    assert len(events.worker_names[0]) == 3


def test_a_store_that_does_not_answer_costs_no_attempt(tmp_path):
    faults = {"start": ("unavailable", 2), 1: ("unavailable", 3), "commit 2": ("unavailable", 4)}
    events = run(tmp_path, 4, faults, max_attempts=1)
    assert sorted(events.committed_shards) == [0, 1, 2, 3] and not events.failures and not events.lost_workers
    assert events.store_reasons == ["the bucket does not answer"]  # said once a minute
    assert attempts(tmp_path, "start") == 3 and attempts(tmp_path, 2) == 1


def test_a_store_that_stays_away_costs_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("logitcache_pipeline.run.STORE_PATIENCE_SECONDS", 0.0)
    events = run(tmp_path, 2, {"commit 0": ("unavailable", ALWAYS)}, max_attempts=2, num_samples=4)
    assert events.quarantined[0] == [f"the bucket does not answer (on {events.worker_names[0][0]})"] * 2
    assert events.committed_shards == [1]


def test_a_worker_whose_teacher_has_failed_is_replaced_at_once(tmp_path):
    events = run(tmp_path, 3, {0: ("lose", 1)})
    assert sorted(events.committed_shards) == [0, 1, 2]
    assert events.leaving == [(0, "its teacher has failed")] and len(events.worker_names[0]) == 2
    assert len(events.failures) == 1


@pytest.mark.slow
def test_a_node_that_is_drained_is_left(tmp_path, cluster):
    """Its worker goes on with what it has in hand and takes nothing more; one elsewhere takes its place."""
    node = cluster.add_node(num_cpus=1, resources={"second": 1})
    gcs = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")

    def drain() -> None:
        deadline = (time.time_ns() // 10**6) + 60_000
        assert gcs.drain_node(node.node_id, reason, "the spot instance is wanted back", deadline)[0]
        time.sleep(0.5)
        (tmp_path / "go").touch()

    places = iter([{"second": 1}])
    try:
        with doing(drain, when=lambda: bool(attempts(tmp_path, 0))):
            events = run(tmp_path, 4, {0: ("hold", 1)}, places=places)
    finally:
        cluster.remove_node(node)
    assert sorted(events.committed_shards) == [0, 1, 2, 3]
    assert events.leaving == [(0, "its node is being drained")] and len(events.worker_names[0]) == 2
    assert not events.failures and not events.given_back_shards


def test_no_more_workers_than_shards(tmp_path):
    events = run(tmp_path, 2, {0: ("slow", 1), 1: ("slow", 1)}, num_workers=5)
    assert sorted(events.committed_shards) == [0, 1]
    assert attempts(tmp_path, "start") <= 2  # a fast one may have scored both before the other has started


def test_a_worker_that_finds_no_room_is_not_waited_for(tmp_path):
    """Two workers that each want three of the cluster's four cores."""
    events = run(tmp_path, 3, {}, cpus=3, num_workers=2)
    assert events.committed_shards == [0, 1, 2]
    assert attempts(tmp_path, "start") == 1


def test_a_worker_that_never_answers_is_not_waited_for(tmp_path):
    events = run(tmp_path, 3, {"start": ("hang", 1)}, num_workers=2)
    assert events.committed_shards == [0, 1, 2]


def test_a_start_that_hangs_is_killed_and_counts_as_failed(tmp_path):
    """The only core is its own: where it was not killed, nothing could take its place."""
    workers = iter([{"start": ("hang", ALWAYS)}])
    events = run(tmp_path, 2, lambda: next(workers, {}), cpus=4, start_deadline=1.0)
    assert events.committed_shards == [0, 1]
    (reason,) = events.lost_workers
    assert reason == "it has not loaded the teacher within 1 s; allow more with --start-deadline"


def test_waiting_for_room_is_no_start(tmp_path):
    """The second worker finds room when the first has nothing left to do, long after the deadline of a start."""
    slow = dict.fromkeys(range(3), ("slow", 1))
    events = run(tmp_path, 3, slow, cpus=3, num_workers=2, start_deadline=1.0)
    assert events.committed_shards == [0, 1, 2] and not events.lost_workers


def test_a_run_says_that_no_worker_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr("logitcache_pipeline.run.WAITING_NOTE_SECONDS", 0.1)
    events = run(tmp_path, 1, {"start": ("slow", 1), 0: ("slow", 1)})
    assert events.num_waiting >= 2
    assert events.committed_shards == [0]


@pytest.mark.parametrize("fault", ["exit", "no store"])
def test_a_worker_that_starts_at_the_second_attempt(tmp_path, fault):
    events = run(tmp_path, 3, {"start": (fault, 1)})
    assert events.committed_shards == [0, 1, 2]
    assert (len(events.lost_workers), attempts(tmp_path, "start")) == (1, 2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raise", "RuntimeError: start is bad"), ("no store", "the bucket cannot be reached")],
)
def test_a_worker_that_never_starts_ends_the_run(tmp_path, fault, reason):
    with pytest.raises(BuildError, match=f"no worker can start, 2 attempts in a row failed: {reason}"):
        run(tmp_path, 3, {"start": (fault, ALWAYS)}, max_attempts=2)
    assert attempts(tmp_path, "start") == 2


def test_a_run_goes_on_without_a_worker_that_never_starts(tmp_path):
    """The first worker is the only good one, and is held until the other has been given up."""
    good, bad = {0: ("hold", 1)}, {"start": ("raise", ALWAYS)}
    workers, events = iter([good]), Events()
    with doing(lambda: (tmp_path / "go").touch(), when=lambda: len(events.lost_workers) == 2):
        run(tmp_path, 3, lambda: next(workers, bad), events=events, num_workers=2, max_attempts=2)
    assert events.committed_shards == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.rehearsal
def test_a_lost_node_costs_its_shard_an_attempt(tmp_path, cluster):
    """One worker on each of two nodes; the second node goes for good while it is scoring."""
    node = cluster.add_node(num_cpus=1, resources={"second": 1})

    def pull_the_plug() -> None:
        cluster.remove_node(node, allow_graceful=False)
        (tmp_path / "go").touch()

    bad, good = (dict.fromkeys(range(4), fault) for fault in (("hang", ALWAYS), ("hold", 1)))
    places, workers = iter([{"second": 1}]), iter([bad])
    with doing(pull_the_plug, when=lambda: (tmp_path / "hanging").exists()):
        events = run(tmp_path, 4, lambda: next(workers, good), num_workers=2, places=places)
    assert sorted(events.committed_shards) == [0, 1, 2, 3]
    assert [attempt for _, attempt in events.failures] == [1]


def test_a_worker_that_is_told_to_stop_while_it_starts_is_replaced(tmp_path):
    events = run(tmp_path, 2, {"start": ("stop", 2)}, max_attempts=1)
    assert events.committed_shards == [0, 1] and not events.lost_workers
    assert events.leaving == [(0, "told to stop")] * 2 and attempts(tmp_path, "start") == 3


def test_what_a_later_start_says_of_the_input_ends_nothing(tmp_path):
    """Another node may lack the teacher; there are shards in the cache already that were scored with it."""
    workers = iter([{1: ("stop", 1)}, {"start": ("other teacher", 2)}])
    events = run(tmp_path, 3, lambda: next(workers, {}))
    assert sorted(events.committed_shards) == [0, 1, 2]
    assert events.lost_workers == ["another checkpoint"]


def test_what_the_first_start_says_of_the_input_is_raised_as_it_is(tmp_path):
    with pytest.raises(MismatchError, match=r"^another checkpoint$"):
        run(tmp_path, 3, {"start": ("other teacher", 1)})

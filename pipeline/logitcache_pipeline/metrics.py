"""What a running build tells Prometheus, through Ray: each node of a Ray cluster serves the metrics of its processes.

The driver counts what workers report, so that a shard is counted once and a worker that dies takes no count with it.
Without anybody who scrapes, an update costs microseconds. Ray puts `ray_` before each name, and `_total` behind
counters.

    logitcache_target_tokens, logitcache_tokens       counters: scored, and read by the teacher    cache, node
    logitcache_shards                                 counter: committed                            cache, node
    logitcache_failed_attempts                        counter: at shards                            cache
    logitcache_quarantined_shards                     counter                                       cache
    logitcache_quarantined_samples                    counter: left out of committed shards         cache
    logitcache_failed_starts                          counter: of workers                           cache
    logitcache_target_tokens_left                     gauge: still to be scored                     cache
    logitcache_store_seconds                          histogram: encode, write and commit a shard   cache, node
"""

from __future__ import annotations

from logitcache_pipeline.worker import ShardOutcome

STORE_SECONDS = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Upper bounds of the histogram's buckets."""


class BuildMetrics:
    """The metrics of one build; made where Ray is connected."""

    def __init__(self, cache: str, target_tokens_left: int) -> None:
        """`cache` is the value of the tag by which builds are told apart."""
        from ray.util.metrics import Counter, Gauge, Histogram

        of_cache, of_node = ("cache",), ("cache", "node")

        def counter(name: str, meaning: str, tags: tuple[str, ...]) -> Counter:
            return Counter(f"logitcache_{name}", meaning, tags).set_default_tags({"cache": cache})

        self._target_tokens = counter("target_tokens", "Target tokens scored", of_node)
        self._tokens = counter("tokens", "Tokens the teacher has read", of_node)
        self._shards = counter("shards", "Shards committed", of_node)
        self._failed_attempts = counter("failed_attempts", "Attempts at shards that failed", of_cache)
        self._quarantined = counter("quarantined_shards", "Shards that used up their attempts", of_cache)
        self._excluded = counter("quarantined_samples", "Samples that committed shards lack", of_cache)
        self._failed_starts = counter("failed_starts", "Workers that could not start", of_cache)
        self._left = Gauge("logitcache_target_tokens_left", "Target tokens still to be scored", of_cache)
        self._left.set_default_tags({"cache": cache})
        self._store_seconds = Histogram(
            "logitcache_store_seconds", "Time to encode, write and commit a shard", STORE_SECONDS, of_node
        )
        self._store_seconds.set_default_tags({"cache": cache})
        self._num_left = target_tokens_left
        self._left.set(target_tokens_left)

    def committed(self, outcome: ShardOutcome, worker: str) -> None:
        """A shard is in the store; `worker` is HOST:PID."""
        self._num_left -= outcome.num_rows + sum(sample.num_rows for sample in outcome.excluded)
        self._left.set(self._num_left)
        if not outcome.scored:
            return
        node = {"node": worker.rpartition(":")[0]}
        self._shards.inc(1, node)
        if outcome.excluded:
            self._excluded.inc(sum(len(sample.source_ids) for sample in outcome.excluded))
        self._target_tokens.inc(outcome.num_rows, node)
        self._tokens.inc(outcome.num_tokens, node)
        self._store_seconds.observe(outcome.store_seconds, node)

    def attempt_failed(self) -> None:
        """An attempt at a shard has failed."""
        self._failed_attempts.inc()

    def quarantined(self) -> None:
        """A shard has used up its attempts."""
        self._quarantined.inc()

    def start_failed(self) -> None:
        """A worker could not start."""
        self._failed_starts.inc()

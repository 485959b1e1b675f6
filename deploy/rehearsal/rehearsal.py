"""`make rehearsal`: the whole line on one machine as it runs on a cluster, without Docker and without a cloud.

    an S3 server with users       moto, in a process of its own, with the policies of deploy/policies
    a Ray cluster                 a head and two workers as separate processes, asking for a token
    the build                     by `ray job submit`; one of the workers is killed in the middle of it
    status, verify --deep         from outside, with credentials that may only read
    the student                   two ranks under torchrun, in an environment without ray, with credentials of its own
    evaluate, report

Only the bucket is between them. It takes a few minutes on two cores; whatever it started is gone afterwards, however it
ends. Exit status 1 with the output of the step that failed, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from bucket import Bucket, User, free_port, server_command, wait_until_up
from processes import Interrupted, Processes, RehearsalError, Steps, fail, own_processes, wait_until, without
from ray_nodes import RayNodes, lost_node
from student_environment import make_environment

LIMIT_SECONDS = 900
BUCKET, REGION = "rehearsal", "eu-central-1"
CACHE = f"s3://{BUCKET}/cache"
NUM_RECORDS, NUM_HELD_OUT, PRETRAINING_STEPS = 1500, 50, 150
TEACHER_TOP_K, SHARD_ROWS = 32, 800
KILL_AT = 0.15
"""Share of the shards that are committed when a node is killed."""
NUM_EPOCHS, NUM_RANKS = 2, 2
MOST_READ = 1.05
"""Bytes that a node may read of the shards in an epoch, in bytes of the shards that it needs."""
LOGITCACHE = (sys.executable, "-m", "logitcache_storage.cli")
NOT_FOR_STUDENTS = ("ray", "vllm")


class Rehearsal:
    """One run; each method is a step, and stands on those before it."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes, self._folder, self._steps = processes, folder, Steps()
        # One thread each: ranks and workers share the cores. Credentials and settings of whoever runs this stay out.
        self._environment = without("AWS_ RAY_ PYTHONPATH") | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._environment |= {"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
        self._results: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns what was measured, as JSON values."""
        step = self._steps.step
        with step("an S3 server; one user writes, two only read"):
            self._start_bucket()
        with step("a small corpus in the bucket; a teacher and a base student, pre-trained for a moment"):
            self._make_models()
        with step("a Ray cluster: a head and two workers, each a process, with token authentication"):
            self._start_ray()
        with step("submit the build; kill a node in the middle of it; submit it again; ask for its status"):
            self._build()
        with step("verify every byte, with credentials that may only read"):
            self._logitcache("verify", CACHE, "--deep", user=self._watcher)
        with step("an environment without ray for the student"):
            self._make_student_environment()
        with step(f"train a student: {NUM_RANKS} ranks, {NUM_EPOCHS} epochs, reading from the bucket"):
            self._train()
        with step("evaluate the student"):
            self._evaluate()
        with step("a report of the cache in one file"):
            self._report()
        return {"steps_seconds": self._steps.seconds, **self._results}

    def _start_bucket(self) -> None:
        port = free_port()
        server = self._processes.start("S3 server", server_command(port, region=REGION), self._environment)
        wait_until_up(server.process, port)
        self._bucket = Bucket(BUCKET, port, REGION)
        self._bucket.create()
        self._builder = self._bucket.add_user("builder", "writer")
        self._watcher, self._student = (self._bucket.add_user(name, "reader") for name in ("watcher", "student"))
        self._bucket.close_to_strangers()
        self._steps.say(f"s3://{BUCKET} at {self._bucket.endpoint}, region {REGION}")

    def _make_models(self) -> None:
        from logitcache_train.demo import task
        from logitcache_train.demo.models import Pretraining, pretrain_in_parallel

        held_out = task.HELD_OUT.records(NUM_HELD_OUT, seed=0)
        prompts = frozenset(record["prompt"] for record in held_out)
        task.write_jsonl(self._folder / "held_out.jsonl", held_out)
        corpus = task.CORPUS.records(NUM_RECORDS, seed=1, exclude=prompts)
        self._bucket.write(self._builder, "train.jsonl", "".join(json.dumps(r) + "\n" for r in corpus).encode())
        authors = {"teacher": task.TEACHER, "base": task.BASE}
        made = pretrain_in_parallel(
            [Pretraining(author, seed=2, exclude=prompts, num_steps=PRETRAINING_STEPS) for author in authors.values()],
            [self._folder / name for name in authors],
        )
        for name, model in zip(authors, made, strict=True):
            self._steps.say(f"{name}: {model.num_parameters:,} parameters, loss {model.loss:.2f} nats a token")

    def _start_ray(self) -> None:
        self._ray = RayNodes(self._processes, self._folder, self._as_user(self._builder))
        self._ray.start_head()
        for name in ("worker 1", "worker 2"):
            self._ray.start_worker(name)
        if not self._ray.refuses_strangers():
            raise RehearsalError("the head answers who has no token, or a wrong one")
        self._steps.say(f"{self._ray.num_alive()} nodes are alive, and who has no token is turned away")

    def _build(self) -> None:
        words = ["logitcache", "build", "--teacher", self._folder / "teacher", "--data", f"s3://{BUCKET}/train.jsonl"]
        words += ["--cache", CACHE, "--k", TEACHER_TOP_K, "--shard-rows", SHARD_ROWS, "--workers", 2]
        words += ["--ray-address", "auto"]
        self._steps.command("ray", "job", "submit", "--address", self._ray.dashboard, "--", *words)
        submit = self._ray.submit_command(*LOGITCACHE, *words[1:])
        job = self._processes.start("the build", submit, self._ray.environment)
        num_shards = wait_until("the plan", self._num_planned, seconds=120, while_running=[job])
        few = max(3, round(KILL_AT * num_shards))
        before = wait_until("the first commits", lambda: self._commits(at_least=few), seconds=120, while_running=[job])
        num_processes = lost_node(self._ray, "worker 2")
        if len(before) >= num_shards:
            raise RehearsalError(f"all {num_shards} shards were committed before a node was killed; make more of them")
        self._steps.say(f"{len(before)} of {num_shards} shards are in: killed worker 2, {num_processes} processes")
        again = self._processes.start("the same build again", submit, self._ray.environment)
        self._logitcache("status", CACHE, user=self._watcher)
        self._steps.say(_of_build(job.wait(240)), last=8)
        self._check_nothing_was_lost(before, num_shards)
        said = _of_build(again.wait(120))
        if not any(line.startswith("complete: ") for line in said):
            raise RehearsalError(f"the same job, submitted again meanwhile, does not say that all is in: {said}")
        self._steps.say(f"the same job, submitted again meanwhile, says: {said[-1]}")

    def _num_planned(self) -> int:
        found = self._bucket.objects(self._watcher, "cache/plans/")
        plans = [json.loads(self._bucket.read(self._watcher, key)) for key in found]
        return len(plans[0]["shard_num_rows"]) if plans else 0

    def _commits(self, at_least: int = 0) -> dict[str, bytes]:
        """The commit records; none where there are fewer."""
        names = list(self._bucket.objects(self._watcher, "cache/commits/"))
        return {name: self._bucket.read(self._watcher, name) for name in names} if len(names) >= at_least else {}

    def _check_nothing_was_lost(self, before: dict[str, bytes], num_shards: int) -> None:
        after = self._commits()
        changed = [name for name, data in before.items() if after.get(name) != data]
        if changed or len(after) != num_shards:
            raise RehearsalError(f"{len(after)} of {num_shards} shards are in; of those before, other now: {changed}")
        run = json.loads(self._bucket.read(self._watcher, "cache/report.json"))["runs"][-1]
        attempts = f"attempts that failed and were repeated: {run['failed_attempts']}"
        self._steps.say(f"nothing lost: {len(before)} commits as they were, all {num_shards} shards in; {attempts}")
        self._results["build"] = {
            "shards": num_shards,
            "shards_committed_when_a_node_was_killed": len(before),
            "failed_attempts": run["failed_attempts"],
            "target_tokens": run["target_tokens"],
            "bytes": run["bytes"],
            "seconds": run["seconds"],
        }

    def _make_student_environment(self) -> None:
        self._python = make_environment(self._folder / "student-environment", ("train", "s3"))
        code = f"from importlib.util import find_spec; print([n for n in {NOT_FOR_STUDENTS!r} if find_spec(n)])"
        found = self._processes.run("imports", [self._python, "-c", code], self._environment)
        if found.strip() != "[]":
            raise RehearsalError(f"the student's environment has {found}")
        self._steps.say(f"logitcache[train,s3]; {' and '.join(NOT_FOR_STUDENTS)} cannot be imported there")

    def _train(self) -> None:
        words = ["--student", self._folder / "base", "--cache", CACHE, "--objective", "target_sft", "--eta", 0.5]
        words += ["--output", self._folder / "student", "--num_train_epochs", NUM_EPOCHS, "--learning_rate", "1e-3"]
        words += ["--per_device_train_batch_size", 16, "--window_shards", 4, "--logging_steps", 25]
        words += ["--local_cache", self._folder / "local"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", NUM_RANKS]
        self._steps.command("torchrun", *launcher[2:], "-m", "logitcache_train", *words)
        command = [self._python, *launcher, "-m", "logitcache_train", *words]
        said = self._processes.run("the student", command, self._as_user(self._student), 240)
        self._steps.say("\n".join(line for line in said.splitlines() if line.startswith(("training", "step", "saved"))))
        self._check_traffic()

    def _check_traffic(self) -> None:
        from logitcache_storage.commit import load_commits
        from logitcache_storage.objects import open_store

        endpoint = {"endpoint_url": self._bucket.endpoint, "region_name": REGION}
        options = {"key": self._watcher.access_key, "secret": self._watcher.secret_key, "client_kwargs": endpoint}
        records = load_commits(open_store(CACHE, options)).values()
        needed = sum(o.size for r in records for o in r.objects if o.path.startswith("shards/"))
        read = self._bucket.bytes_read(self._student)
        of_shards = sum(n for name, n in read.items() if name.startswith("cache/shards/"))
        besides: Counter[str] = Counter()
        for name, num_bytes in read.items():
            if not name.startswith("cache/shards/"):
                besides[name.removeprefix("cache/").split("/")[0] or "lists"] += num_bytes
        ratio = of_shards / needed
        self._steps.say(
            f"read {of_shards:,} bytes of shards in {NUM_EPOCHS} epochs, {ratio:.3f}x those of the shards (at most"
            f" {MOST_READ} an epoch), and {besides.total():,} of all else: samples, plan, manifest"
        )
        self._results["student"] = {
            "ranks": NUM_RANKS,
            "nodes": 1,
            "epochs": NUM_EPOCHS,
            "bytes_of_shards": needed,
            "bytes_read_of_shards": of_shards,
            "bytes_read_of_shards_over_bytes_of_shards": round(ratio, 4),
            "bytes_read_besides": dict(sorted(besides.items())),
        }
        if not 0 < ratio <= MOST_READ:
            raise RehearsalError(
                f"the student read {ratio:.3f}x the bytes of the shards, expected at most {MOST_READ}x"
            )

    def _evaluate(self) -> None:
        words = ["evaluate", "--model", self._folder / "student", "--data", self._folder / "held_out.jsonl"]
        words += ["--samples", 4, "--max-new-tokens", 32, "--output", self._folder / "evaluation.json"]
        self._logitcache(*words, python=self._python)
        found = json.loads((self._folder / "evaluation.json").read_text())
        self._results["evaluation"] = {name: round(found[name], 4) for name in ("average", "greedy")}

    def _report(self) -> None:
        page = self._folder / "report.html"
        self._logitcache("report", CACHE, "--output", page, user=self._watcher)
        self._results["report_bytes"] = page.stat().st_size

    def _logitcache(self, *words: object, user: User | None = None, python: Path | None = None) -> None:
        """Run a command as a user would, and show what it says."""
        self._steps.command("logitcache", *words)
        program = [*LOGITCACHE] if python is None else [python, *LOGITCACHE[1:]]
        environment = self._environment if user is None else self._as_user(user)
        self._steps.say(self._processes.run(str(words[0]), [*program, *words], environment))

    def _as_user(self, user: User) -> dict[str, str]:
        return self._environment | user.environment(self._bucket)


def _of_build(said: str) -> list[str]:
    """The lines that are the build's own: those of Ray, some of them coloured, begin with a date or a bracket."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in said.splitlines()]
    return [line for line in lines if line and not re.match(r"20\d\d-|\[|Running|\(", line)]


def machine() -> dict[str, Any]:
    """What it ran on."""
    names = ("ray", "torch", "transformers", "s3fs", "moto")
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
    }


def main() -> int:
    """Rehearse; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write times and bytes there")
    parser.add_argument(
        "--limit", type=int, metavar="SECONDS", default=LIMIT_SECONDS, help="give up after so long (%(default)s)"
    )
    args = parser.parse_args()
    try:
        with own_processes(args.limit) as (processes, folder):
            found = Rehearsal(processes, folder).run()
    except RehearsalError as e:
        return fail(str(e))
    except Interrupted as e:
        fail(f"{e}; everything that was started is gone")
        return e.exit_status
    total = sum(found["steps_seconds"].values())
    print(f"\nThe rehearsal went well; it took {total:.0f} s.")
    if args.output is not None:
        today = datetime.date.today().isoformat()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        times = {"seconds": round(total, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
        document = {"date": today, "machine": machine(), **times, **found}
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"Times and bytes are in {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Data and models to try a cluster with, made on the spot: `python -m logitcache_train.demo.toy DIR [STEPS]`.

DIR/train.jsonl DIR/held_out.jsonl   the demo's task          DIR/teacher DIR/base   checkpoints of 0.23M parameters

With the demo's 1,000 steps (the default) the teacher knows the task; a few are enough to see the line run.
"""

import sys
from pathlib import Path

from logitcache_train.demo import task
from logitcache_train.demo.models import Pretraining, pretrain_in_parallel

NUM_RECORDS, NUM_HELD_OUT = 1500, 200


def make_toy(folder: Path, num_steps: int = 1000) -> None:
    """Write the corpus, the held-out problems, and a teacher and a base student; a folder that has all is left alone.

    Args:
        folder: made where it is missing.
        num_steps: of pre-training, for either model.
    """
    done = folder / "made"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    held_out = task.HELD_OUT.records(NUM_HELD_OUT, seed=0)
    prompts = frozenset(record["prompt"] for record in held_out)
    task.write_jsonl(folder / "held_out.jsonl", held_out)
    task.write_jsonl(folder / "train.jsonl", task.CORPUS.records(NUM_RECORDS, seed=1, exclude=prompts))
    authors = {"teacher": task.TEACHER, "base": task.BASE}
    configs = [
        Pretraining(author, seed=seed, exclude=prompts, num_steps=num_steps)
        for seed, author in enumerate(authors.values(), 2)
    ]
    pretrain_in_parallel(configs, [folder / name for name in authors])
    done.touch()


if __name__ == "__main__":
    make_toy(Path(sys.argv[1]), *map(int, sys.argv[2:3]))

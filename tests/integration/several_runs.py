"""Runs of `logitcache train` one after the other, because torchrun takes longer to start than a tiny student to train.

    torchrun ... several_runs.py ddp|fsdp RUNS.json STATUS.json

RUNS.json is a list of command lines, STATUS.json gets the exit status of each. accelerate shards on accelerators only,
torch's FSDP2 on any device: with `fsdp` accelerate takes processes on CPUs for ones that can shard a model, so that
sharding can be tried where there is no GPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from logitcache_storage.cli import main

original = PartialState.__init__


def shardable(self: PartialState, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


if __name__ == "__main__":
    mode, runs, statuses = sys.argv[1:]
    if mode == "fsdp":
        PartialState.__init__ = shardable
    found = [main(["train", *words]) for words in json.loads(Path(runs).read_text())]
    if PartialState().is_main_process:
        Path(statuses).write_text(json.dumps(found))

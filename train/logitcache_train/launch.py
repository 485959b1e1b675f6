"""torchrun with the exit status of its ranks, so that a scheduler knows wrong input from bad luck.

torchrun ends with 1 whatever its ranks ended with. `python -m logitcache_train.launch ...the same words...` ends with 2
where a rank has refused its input, which another try would not change.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from logitcache_storage.errors import InputError


def launch(words: Sequence[str] | None = None) -> int:
    """Run torchrun with these words (default: the process's own); returns the exit status."""
    try:
        main(words)
    except ChildFailedError as e:
        print(e, file=sys.stderr)
        refused = any(failure.exitcode == InputError.exit_status for failure in e.failures.values())
        return InputError.exit_status if refused else 1
    return 0


if __name__ == "__main__":
    sys.exit(launch())

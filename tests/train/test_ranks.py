"""Which rank says what: processes of one launcher, as torchrun starts them."""

import os
import subprocess
import sys
from contextlib import contextmanager

from logitcache_storage.cli import main
from logitcache_train.ranks import is_said_by_another

RANK = """
import sys
from logitcache_train import ranks
ranks.PATIENCE = 0.0
print("" if ranks.is_said_by_another(sys.argv[1]) else sys.argv[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def speaking(*ranks):
    """What each of several processes says from its message and its environment; all are there till the end."""
    common = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    common["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, message],
            env={**common, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for message, environment in ranks
    ]
    yield [rank.stdout.readline().strip() for rank in started]
    for rank in started:
        rank.communicate(timeout=30)


def test_what_all_ranks_meet_is_said_once_and_what_one_meets_is_said():
    messages = ["no such cache", "no such cache", "step 3: NaN", "no such cache"]
    with speaking(*((message, {"LOCAL_RANK": str(rank)}) for rank, message in enumerate(messages))) as said:
        assert said[2] == "step 3: NaN" and sorted(said) == ["", "", "no such cache", "step 3: NaN"]
    with speaking(("no such cache", {"LOCAL_RANK": "1"})) as said:
        assert said == ["no such cache"], "after a restart the name is free again"


def test_neither_another_launcher_nor_an_earlier_error_silences_a_rank(monkeypatch):
    of_two_launchers = [("no such cache", {"LOCAL_RANK": "0", "MASTER_PORT": port}) for port in ("1", "2")]
    without_one = [("no such cache", {})] * 2
    with speaking(*of_two_launchers, *without_one) as said:
        assert said == ["no such cache"] * 4
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not is_said_by_another("no such student")
    assert not is_said_by_another("no such student")


def test_a_silent_rank_ends_with_the_status_of_the_error(monkeypatch, capsys):
    """This process is taken for a rank beside the one it starts, as if both had it for their launcher."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = "--student is missing; 'logitcache train --help' says what it takes"
    with speaking((message, {"LOCAL_RANK": "0"})) as said:
        assert said == [message]
        assert main(["train"]) == 2 and capsys.readouterr().err == ""
    assert main(["train"]) == 2 and message in capsys.readouterr().err

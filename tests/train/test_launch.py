"""The launcher under a real torchrun: what ranks refuse is said once and told from what fails."""

import os
import subprocess
import sys

import pytest

from logitcache_train.launch import launch


def test_a_refusal_of_all_ranks_is_one_message_and_the_status_of_wrong_input():
    words = ["--standalone", "--nproc_per_node", "2", "-m", "logitcache_train", "--batch_tokens", "many"]
    done = subprocess.run(
        [sys.executable, "-m", "logitcache_train.launch", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("argument --batch_tokens/--batch-tokens: invalid int value: 'many'") == 1
    assert done.stderr.count("usage: logitcache train") == 1


@pytest.mark.parametrize(("status", "expected"), [("0", 0), ("77", 1)])
def test_other_failures_are_no_refusal(tmp_path, monkeypatch, status, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "rank.py"
    path.write_text("import sys; sys.exit(int(sys.argv[1]))\n")
    assert launch(["--standalone", "--nproc_per_node", "1", str(path), status]) == expected

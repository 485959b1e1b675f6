"""Progress: lines elsewhere, a bar on a terminal, silence where it is asked for."""

import itertools
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from logitcache_storage import progress as progress_module
from logitcache_storage.progress import progress

STORAGE = Path(__file__).parents[2] / "storage"


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves one second each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(ticks)))


def test_short_work_says_nothing(capfd):
    with progress("scoring", total=10, unit="tok") as p:
        for _ in range(10):
            p.advance()
    assert capfd.readouterr() == ("", "")


def test_lines_now_and_then_with_rate_and_time_left(clock, capfd):
    with progress("scoring", total=4_000_000, unit="tok", every=5) as p:
        for _ in range(20):
            p.advance(100_000)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 <= len(lines) <= 6
    for line in lines[:-1]:
        found = re.fullmatch(r"scoring: ([\d.]+)([kM]) of 4\.0M tok, ([\d.]+)k tok/s, (.*) left", line)
        assert found is not None, line
    assert re.fullmatch(r"scoring: 2\.0M of 4\.0M tok in .*, [\d.]+k tok/s", lines[-1])


def test_what_an_earlier_run_did_does_not_count_as_speed(clock, capfd):
    with progress("scoring", total=1000, unit="rows", done=900, every=1) as p:
        p.advance(10)
    line = capfd.readouterr().err.splitlines()[0]
    rate = int(re.search(r"(\d+) rows/s", line)[1])
    assert line.startswith("scoring: 910 of 1,000 rows") and 1 <= rate <= 10


def test_a_total_may_come_later_or_never(clock, capfd):
    with progress("reading", unit="B", every=1) as p:
        p.advance(1500)
        p.set_total(3000)
        p.advance(500)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("reading: 1.5 KB,") and "left" not in lines[0]
    assert lines[1].startswith("reading: 2.0 KB of 3.0 KB")


def test_notes_stand_at_once_and_hold_no_control_characters(capfd):
    with progress("scoring") as p:
        p.note("shard 17: \x1b[31mlost [red]")
    assert capfd.readouterr().err.splitlines()[0] == r"scoring: shard 17: \x1b[31mlost [red]"


def test_quiet_means_quiet(clock, capfd):
    with progress("scoring", total=10, quiet=True, every=0) as p:
        p.advance()
        p.note("lost")
    assert capfd.readouterr() == ("", "")


def test_an_error_passes_through_without_a_closing_line(clock, capfd):
    with pytest.raises(ValueError, match="boom"), progress("scoring", total=10, every=100) as p:
        p.advance(5)
        raise ValueError("boom")
    assert capfd.readouterr().err == ""


def test_advances_from_many_threads_all_count():
    with progress("scoring", total=4000, quiet=True) as p:
        threads = [threading.Thread(target=lambda: [p.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert p.completed == 4000


def test_a_terminal_gets_a_bar_that_goes_away():
    code = (
        "import time\nfrom logitcache_storage.progress import progress\n"
        "with progress('scoring', total=100, unit='tok') as p:\n"
        "    for _ in range(5): time.sleep(0.05); p.advance(20)\n"
    )
    main, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(STORAGE), "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment)
    os.close(terminal)
    drawn = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not part:
            break
        drawn += part
    os.close(main)
    assert process.wait(30) == 0
    assert "━".encode() in drawn and b"100 tok" in drawn
    assert drawn.rstrip().endswith(b"\x1b[2K")  # the line was cleared

"""The rehearsal leaves nothing behind, however it ends, and says what failed; its student imports what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

REHEARSAL = Path(__file__).parents[2] / "deploy" / "rehearsal"

RUN = """
import sys
sys.path.insert(0, {rehearsal!r})
from pathlib import Path
from processes import Interrupted, RehearsalError, Steps, fail, own_processes
try:
    with own_processes({seconds}) as (processes, folder):
        print(folder, flush=True)
        with Steps().step("start what does not want to end"):
            processes.start("stubborn", [sys.executable, "-c", {stubborn!r}, {marker!r}], {{}})
            {then}
except RehearsalError as e:
    sys.exit(fail(str(e)))
except Interrupted as e:
    fail(str(e))
    sys.exit(e.exit_status)
"""
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)  # so that nobody is the grandchild's parent
open(sys.argv[1] + str(os.getpid()), "w").close()
time.sleep(600)
"""


def run(tmp_path: Path, then: str, seconds: int = 60) -> tuple[subprocess.Popen[str], Path, list[int]]:
    """A rehearsal of one step; its process, its folder, and the processes that it has started."""
    marker = str(tmp_path / "started-")
    values = {"rehearsal": str(REHEARSAL), "stubborn": STUBBORN, "marker": marker, "seconds": seconds, "then": then}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", RUN.format(**values)], **pipes)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    deadline = time.monotonic() + 30
    while len(started := list(tmp_path.glob("started-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, folder, [int(path.name.rpartition("-")[2]) for path in started]


def test_an_interrupted_rehearsal_leaves_nothing(tmp_path):
    process, folder, started = run(tmp_path, "import time; time.sleep(60)")
    assert folder.is_dir() and all(map(psutil.pid_exists, started))
    process.send_signal(signal.SIGINT)
    assert "interrupted by SIGINT" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert not folder.exists() and not any(map(psutil.pid_exists, started))


def test_a_rehearsal_has_a_bound(tmp_path):
    process, folder, started = run(tmp_path, "import time; time.sleep(60)", seconds=3)
    assert "it took too long" in process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert not folder.exists() and not any(map(psutil.pid_exists, started))


def test_a_failing_command_is_named_with_all_that_it_said(tmp_path):
    failing = """processes.run("the build", [sys.executable, "-c", "print('no room'); raise SystemExit(3)"], {})"""
    wait = "import time; time.sleep(2); "
    process, folder, started = run(tmp_path, wait + failing)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.strip() == textwrap.dedent("""\
        rehearsal: step 1 failed: start what does not want to end
        the build ended with exit status 3:
        no room""")
    assert not folder.exists() and not any(map(psutil.pid_exists, started))


def test_the_environment_of_a_role_has_what_its_extras_lead_to_and_nothing_else(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from student_environment import make_environment; print(make_environment(Path(sys.argv[2]), ['s3']))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(REHEARSAL), str(tmp_path / "environment")], capture_output=True, text=True
    )
    python = made.stdout.strip()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = (
        "import importlib.util as u, s3fs, zarr, logitcache_storage.cache\n"
        "print([n for n in ('ray', 'torch', 'moto', 'pytest', 'adlfs') if u.find_spec(n)])"
    )
    assert subprocess.check_output([python, "-c", code], env=clean, text=True) == "[]\n"

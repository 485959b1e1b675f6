"""`make bench`: every benchmark here, each in a process of its own, into one dated results file.

Ratios are taken within one run; absolute times are for orientation only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "transformers", "ray", "zarr", "pyarrow", "numpy")


def main() -> int:
    """Run the benchmarks whose names contain one of the arguments, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of benchmark names; all where none is given")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    args = parser.parse_args()
    scripts = [s for s in sorted(FOLDER.glob("bench_*.py")) if not args.names or any(n in s.stem for n in args.names)]
    results, failed = {}, []
    for script in scripts:
        print(f"== {script.stem}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(script.stem)
            continue
        results[script.stem.removeprefix("bench_")] = json.loads(done.stdout)
        print(done.stdout, flush=True)
    args.output.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    path = args.output / f"{today}.json"
    earlier = json.loads(path.read_text())["results"] if path.exists() else {}
    path.write_text(json.dumps({"date": today, "machine": machine(), "results": earlier | results}, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())

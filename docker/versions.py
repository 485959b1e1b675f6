"""Prints the versions that pip must keep to in an image: `versions.py TESTED.txt > constraints.txt`.

What a base image has stays: torch, vLLM and what is made to fit them always, the rest where what we add goes along with
it. What the image lacks comes in the versions that the tests run with; so does Ray, whose version manifests name.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

FITTED = re.compile(r"torch|nvidia|cuda|triton|vllm|flashinfer|numpy|transformers|tokenizers")
"""Beginnings of names, normalised, of packages that are not touched where a base image has them."""


def constraints(tested: Iterable[str], installed: Iterable[tuple[str, str]]) -> list[str]:
    """Constraints of pip, of lines NAME==VERSION and of what an image has, as (name, version)."""
    here = {normalised(name): version for name, version in installed}
    lines = (line.partition("==") for line in tested if not line.startswith("#"))
    added = {normalised(name): version.strip() for name, pinned, version in lines if pinned}
    kept = {name: version for name, version in here.items() if FITTED.match(name)}
    return sorted(f"{n}=={version}" for n, version in {**added, **kept}.items() if n in {*kept, "ray"} or n not in here)


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    lines_of_file = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print("\n".join(constraints(lines_of_file, [(str(d.name), d.version) for d in distributions() if d.name])))

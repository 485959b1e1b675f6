"""A Python environment with what the student's extras ask for and nothing else, made in seconds without a download.

It is an environment of its own (`venv`, without the packages of the one we run in) into which every distribution is
linked that the requirements of pyproject.toml lead to. What they do not lead to cannot be imported: ray, vllm, moto.
"""

from __future__ import annotations

import tomllib
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parent.parent.parent
ROOMS = ("storage", "pipeline", "train")


def make_environment(folder: Path, extras: Sequence[str]) -> Path:
    """Make the environment of `logitcache[extras]`; returns its Python.

    Raises:
        RuntimeError: a distribution that it needs is not installed here.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    needed = {canonicalize_name(found.name): found for found in distributions(extras)}
    owners = _owners()
    for found in needed.values():
        _link(found, site_packages, {top for top, names in owners.items() if names <= needed.keys()})
    (site_packages / "logitcache.pth").write_text("".join(f"{CHECKOUT / room}\n" for room in ROOMS))
    return folder / "bin" / "python"


def distributions(extras: Sequence[str]) -> Iterator[metadata.Distribution]:
    """Every installed distribution that `logitcache[extras]` leads to, but its own."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    asked = [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
    wanted = [Requirement(text) for text in asked]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = _installed(requirement.name)
            if extra == "":
                yield found
            for text in found.requires or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    wanted.append(further)


def _installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as e:
        raise RuntimeError(f"the student needs {name}, which is not installed here; run 'make install'") from e


def _owners() -> dict[str, set[str]]:
    """Of each name at the top of site-packages, the distributions that have files below it: namespaces have several."""
    owners: dict[str, set[str]] = {}
    for found in metadata.distributions():
        name = canonicalize_name(found.name)  # parses the metadata anew each time
        for top in {file.parts[0] for file in found.files or []}:
            owners.setdefault(top, set()).add(name)
    return owners


def _link(found: metadata.Distribution, site_packages: Path, whole: set[str]) -> None:
    """Link a distribution: folders that only such distributions share as wholes, others file by file."""
    for file in found.files or []:
        top = file.parts[0]
        if top in ("..", "__pycache__") or "__pycache__" in file.parts:
            continue
        parts = (top,) if top in whole else file.parts
        link, target = site_packages.joinpath(*parts), Path(str(found.locate_file(Path(*parts))))
        if not link.is_symlink() and target.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

"""What is deployed, as Python values: rendered manifests, compose services, and the command lines in all of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("aws", "azure", "dev", "gcp")
CLOUDS = ("aws", "azure", "gcp")
SHELL = (b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash")

Manifest = dict[str, Any]


@cache
def manifests(overlay: str, *components: str) -> tuple[Manifest, ...]:
    """All objects of an overlay, with components on top; skips where nothing renders them."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, which renders the overlays")
    with tempfile.TemporaryDirectory() as folder:
        added = [os.path.relpath(KUBERNETES / "components" / name, os.path.realpath(folder)) for name in components]
        base = os.path.relpath(KUBERNETES / "overlays" / overlay, os.path.realpath(folder))
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "components": added}))
        done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, check=True)
    return tuple(yaml.safe_load_all(done.stdout))


def one(objects: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    """The object of that kind and name."""
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pod_templates(objects: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """What pods are made from, by kind, name and part of the object."""
    found = {}
    for o in objects:
        for path, value in _walk(o):
            if isinstance(value, dict) and "containers" in value.get("spec", {}):
                found[f"{o['kind']}/{o['metadata']['name']}{path}"] = value
    return found


def site(objects: tuple[Manifest, ...]) -> dict[str, str]:
    """The environment of every pod."""
    return dict(one(objects, "ConfigMap", "site")["data"])


def compose() -> Manifest:
    """The services with their defaults in place of variables."""
    text = (ROOT / "docker" / "compose.yaml").read_text()
    return dict(yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)))


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Where it stands and its words, from `logitcache` or `logitcache_train` on, of every command of ours."""
    for overlay in OVERLAYS if shutil.which("kubectl") else ():
        yield from _manifest_commands(overlay)
    for name, service in compose()["services"].items():
        yield from _ours(f"docker/compose.yaml, {name}", service.get("command", []))
    files = [p for folder in ("docker", "deploy") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    for path in [ROOT / "README.md", *files]:
        if path.suffix in (".md", ".yaml", ".yml") or path.read_bytes().startswith(SHELL):
            for line in _code_lines(path):
                yield from _ours(str(path.relative_to(ROOT)), _words(line))


def project_version() -> str:
    """As pyproject.toml has it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def _manifest_commands(overlay: str) -> Iterator[tuple[str, list[str]]]:
    objects = manifests(overlay)
    environment = site(objects)
    for where, template in pod_templates(objects).items():
        for container in template["spec"]["containers"]:
            words = [*container.get("command", []), *container.get("args", [])]
            filled = [re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], word) for word in words]
            yield from _ours(f"overlay {overlay}, {where}", filled)
    entrypoint = one(objects, "RayJob", "build")["spec"]["entrypoint"]
    filled_line = re.sub(r"\$(\w+)", lambda m: environment[m[1]], entrypoint)
    yield from _ours(f"overlay {overlay}, RayJob", filled_line.split())


def _code_lines(path: Path) -> Iterator[str]:
    """Of a page its code blocks and code spans, of a script all of it, of YAML its comments; continued lines as one."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    if path.suffix in (".yaml", ".yml"):
        yield from re.findall(r"^\s*#\s+(.*)$", text, re.MULTILINE)
        return
    if path.suffix != ".md":
        yield from (line.strip() for line in text.splitlines())
        return
    blocks = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in blocks.findall(text):
        yield from block.splitlines()
    prose = blocks.sub("", text)
    yield from (line for line in prose.splitlines() if line.startswith("    "))
    # In the text a command stands for itself, with as few words as make the point.
    yield from (f"{' '.join(span.split())} ..." for span in re.findall(r"`([^`]+)`", prose))


def _words(line: str) -> list[str]:
    """As a shell splits it, up to the first operator; variables are 1, options in brackets count."""
    lexer = shlex.shlex(re.sub(r"\[(-[^\]]*)\]", r"\1", line), posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    try:
        for word in lexer:
            if words and set(word) <= set("|&;<>"):
                break
            if re.fullmatch(r"\$(@|\{\w+\[@\]\})", word):  # any number of words
                continue
            words.append(re.sub(r"\$\{?\w+[^}\s]*\}?|\$\([^)]*\)", "1", word))
    except ValueError:  # half a quotation: no command
        return []
    return words


def _ours(where: str, words: list[str]) -> Iterator[tuple[str, list[str]]]:
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        is_command = Path(word).name == "logitcache" and i + 1 < len(words) and before not in ("-n", "--namespace")
        if is_command or (word == "logitcache_train" and before == "-m"):
            yield where, words[i:]
            return


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _walk(child, f"{path}/{key}")

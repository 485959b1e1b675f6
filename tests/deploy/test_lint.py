"""`make lint-deploy` passes on what is there, and finds a mistake in each kind of file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rehearsal

ROOT = Path(__file__).parents[2]
TOOLS = ("hadolint", "shellcheck", "check-jsonschema", "kubernetes-validate")
SCHEMAS = ROOT.parent / "shared" / "schemas"

MISTAKES = {
    "docker/teacher.Dockerfile": ("WORKDIR /source", "WORKDIR source"),
    "docker/student.Dockerfile": ("USER 10001:10001", "USSR 10001:10001"),
    "docker/inspect.Dockerfile": ("HEALTHCHECK --interval", "HEALTHCHECK --internal"),
    "docker/compose.yaml": ("depends_on:", "depend_on:"),
    "docker/install.sh": ('"$1[$extras]"', "$1[$extras]"),
    "deploy/kubernetes/overlays/aws/identities.yaml": ("kind: ServiceAccount", "kind: ServiceAcount"),
    "deploy/kubernetes/overlays/azure/kustomization.yaml": ("storageClassName: local", "storageClasName: local"),
    "deploy/kubernetes/overlays/dev/store.yaml": ("containerPort: 9000", "containerPort: s3"),
    "deploy/kubernetes/overlays/gcp/kustomization.yaml": (
        "workerGroupSpecs/0/template/spec/nodeSelector",
        "workerGroupSpecs/0/template/spec/nodeSelect",
    ),
}
FOUND = {
    "docker/teacher.Dockerfile": "WORKDIR",
    "docker/student.Dockerfile": "unexpected 'U'",
    "docker/inspect.Dockerfile": "--internal",
    "docker/compose.yaml": "depend_on",
    "docker/install.sh": "SC2086",
    "overlay aws renders": "ServiceAcount",
    "component tensor-parallel renders": "ServiceAcount",
    "core kinds": "overlay azure/batch_v1_job_student.yaml|overlay dev/apps_v1_deployment_store.yaml",
    "rayjob": "overlay gcp/ray.io_v1_rayjob_build.yaml",
}
"""Checks that fail, and what each names."""


def lint(root: Path) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and by the name of each check its verdict and what was said."""
    if missing := [name for name in TOOLS if not (Path(sys.executable).parent / name).exists()]:
        pytest.skip(f"no {', '.join(missing)} beside {sys.executable}: pip install 'logitcache[dev]'")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBERAY_SCHEMAS": str(SCHEMAS)}
    done = subprocess.run([ROOT / "deploy" / "lint.sh", root], env=environment, capture_output=True, text=True)
    found = re.findall(r"^(ok|FAILED|SKIPPED) +(.*)\n((?:    .*\n)*)", done.stdout, re.MULTILINE)
    return done.returncode, {name: (verdict, said) for verdict, name, said in found}


def can_check(name: str) -> bool:
    """Not every machine can render manifests, or has KubeRay's schemas."""
    if shutil.which("kubectl") is None and not name.startswith("docker/"):
        return False
    return name != "rayjob" or SCHEMAS.is_dir()


def test_everything_that_is_deployed_passes_its_check():
    status, found = lint(ROOT)
    assert {name: said for name, (verdict, said) in found.items() if verdict == "FAILED"} == {}
    assert status == 0
    assert {name for name in FOUND if can_check(name)} <= {n for n, (verdict, _) in found.items() if verdict == "ok"}


def test_a_mistake_in_each_kind_of_file_fails_its_check(tmp_path):
    for folder in ("docker", "deploy", ".ci"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name, (right, wrong) in MISTAKES.items():
        file = tmp_path / name
        assert right in file.read_text()
        file.write_text(file.read_text().replace(right, wrong, 1))
    status, found = lint(tmp_path)
    assert status == 1
    failed = {name: said for name, (verdict, said) in found.items() if verdict == "FAILED"}
    assert failed.keys() == {name for name in FOUND if can_check(name)}
    for name, said in failed.items():
        assert all(word in said for word in FOUND[name].split("|")), said

"""What each image holds: environments made as the Dockerfiles make them, and the whole line run across the three.

They take minutes and gigabytes, so only `make test-images` runs these tests. No container is built: base images are
replaced by what they bring (torch), everything else is installed by the same script with the same arguments.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "teacher": {"logitcache_train", "peft", "math_verify"},
    "student": {"logitcache_pipeline", "ray", "vllm"},
    "inspect": {"logitcache_pipeline", "logitcache_train", "torch", "transformers", "ray", "vllm", "datasets"},
}
OWN = {
    "teacher": {"logitcache_storage", "logitcache_pipeline"},
    "student": {"logitcache_storage", "logitcache_train"},
    "inspect": {"logitcache_storage"},
}
ROLES = tuple(OWN)
WEB = {"starlette", "uvicorn", "jinja2", "matplotlib"}
DONE_WITHOUT = {"teacher": {*WEB, "pytest", "vllm"}, "student": {*WEB, "pytest", "triton"}, "inspect": {"pytest"}}
"""What modules of a role may lack: the view is another image's, vLLM and Triton come with the base images."""

IMPORT_ALL = """
import importlib, json, pkgutil, sys
failed = {}
for package in json.loads(sys.argv[1]):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ImportError as e:
                failed[found.name] = e.name
print(json.dumps(failed))
"""
FIND = "import importlib.util as u, json, sys; print(json.dumps([*filter(u.find_spec, json.loads(sys.argv[1]))]))"

pytestmark = [
    pytest.mark.skipif("LOGITCACHE_TEST_IMAGES" not in os.environ, reason="takes minutes: make test-images"),
    pytest.mark.timeout(1800),
]


class Environment:
    """A virtual environment as one image has it."""

    def __init__(self, folder: Path, home: Path):
        self.folder, self.python = folder, folder / "bin" / "python"
        # Nothing of the checkout, and none of the user's settings.
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def run(self, *words: object, status: int = 0) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.environment, cwd=self.environment["HOME"], capture_output=True, text=True
        )
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def ask(self, program: str, argument: object) -> object:
        return json.loads(self.run(self.python, "-c", program, json.dumps(argument)).splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built once, of what the images' build context holds."""
    docker_utils = pytest.importorskip("docker.utils", reason="reads .dockerignore as Docker does: pip install docker")
    context, folder = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("wheel")
    for name in docker_utils.exclude_paths(str(ROOT), (ROOT / ".dockerignore").read_text().split("\n")[1:]):
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, context]
    subprocess.run(command, check=True)
    return context, folder


@pytest.fixture(scope="module")
def environments(wheel, tmp_path_factory):
    """One of each role, made when it is first asked for."""

    @functools.cache
    def environment_of(role):
        environment = tmp_path_factory.mktemp(role)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        if role != "inspect":
            tested = ROOT / ".ci" / "constraints.txt"
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", tested, "torch"], check=True)
        command = ["sh", "-c", f"set -e; {_install_step(role, *wheel)}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.DEVNULL)
        return Environment(environment, tmp_path_factory.mktemp(f"home-{role}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_COMPILE", "1")
        yield environment_of


def _install_step(role: str, context: Path, wheel: Path) -> str:
    """The command of the Dockerfile that installs the role, with the folders that it mounts where they are here."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "docker" / f"{role}.Dockerfile").read_text())
    (step,) = re.findall(r"/install/docker/install\.sh .*", text)
    for name in ("EXTRAS", "LEFT_OUT"):
        (value,) = re.findall(rf"^ARG {name}=\"?([^\"\n]*)\"?$", text, re.MULTILINE)
        step = step.replace(f"${{{name}}}", value)
    mounts = {"docker": context / "docker", "tested.txt": context / ".ci" / "constraints.txt", "wheel": wheel}
    for mount, here in mounts.items():
        step = step.replace(f"/install/{mount}", str(here))
    return step


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_its_packages_whole_and_nothing_of_the_others(environments, role):
    environment = environments(role)
    failed = environment.ask(IMPORT_ALL, sorted(OWN[role]))
    assert {name: lacks for name, lacks in failed.items() if lacks not in DONE_WITHOUT[role]} == {}
    assert environment.ask(FIND, sorted(OWN[role] | FORBIDDEN[role])) == sorted(OWN[role])
    environment.run(environment.python, "-m", "pip", "check")


@pytest.mark.parametrize(
    ("role", "command"), [("teacher", "train"), ("student", "build"), ("inspect", "train"), ("inspect", "build")]
)
def test_a_command_of_another_role_says_that_it_is_not_there(environments, role, command):
    assert "not part of this installation" in environments(role).run("logitcache", command, status=1)
    assert re.search(rf"{command} +not part of this installation", environments(role).run("logitcache", "--help"))


@pytest.fixture(scope="module")
def cache(environments, tmp_path_factory):
    """Of a toy teacher, built in the teacher's environment; beside it the toy."""
    folder = tmp_path_factory.mktemp("line")
    environments("student").run("python", "-m", "logitcache_train.demo.toy", folder / "toy", 5)
    environments("teacher").run(
        *("logitcache", "build", "--teacher", folder / "toy" / "teacher", "--data", folder / "toy" / "train.jsonl"),
        *("--k", 8, "--cache", folder / "cache"),
    )
    return folder / "cache"


def test_the_whole_line_runs_with_a_role_each(environments, cache, tmp_path):
    """Between the environments there are only files."""
    environments("inspect").run("logitcache", "verify", cache, "--deep")
    environments("student").run(
        *("logitcache", "train", "--student", cache.parent / "toy" / "base", "--cache", cache),
        *("--objective", "target_sft", "--max_steps", 2, "--output", tmp_path / "student"),
    )
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_the_web_view_of_the_inspect_image_asks_for_its_token(environments, cache):
    inspect = environments("inspect")
    words = [inspect.folder / "bin" / "logitcache", "serve", cache, "--host=0.0.0.0", "--port=0"]
    with subprocess.Popen(words, env=inspect.environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            with_token = re.sub(r"//[^:/]+:", "//127.0.0.1:", address)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(with_token.partition("?")[0], timeout=10)
            assert refused.value.code in (401, 403)
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            with opener.open(with_token, timeout=30) as page:
                assert b"<html" in page.read()
        finally:
            server.terminate()

"""What pip is told to keep to in an image."""

import runpy
from pathlib import Path

import pytest

TESTED = ["# by hand", "ray==2.60.0", "torch==2.13.0+cpu", "s3fs==2026.9.0", "typing_extensions==4.16.0", ""]


@pytest.fixture(scope="module")
def constraints():
    return runpy.run_path(str(Path(__file__).parents[2] / "docker" / "versions.py"))["constraints"]


def test_an_empty_image_gets_what_the_tests_run_with(constraints):
    expected = ["ray==2.60.0", "s3fs==2026.9.0", "torch==2.13.0+cpu", "typing-extensions==4.16.0"]
    assert constraints(TESTED, []) == expected


def test_an_image_keeps_its_torch_takes_our_ray_and_pip_decides_on_the_rest_that_it_has(constraints):
    installed = {"torch": "2.13.0+cu130", "typing-extensions": "4.15.0", "nvidia_nccl_cu13": "2.30", "ray": "2.50.0"}
    expected = ["nvidia-nccl-cu13==2.30", "ray==2.60.0", "s3fs==2026.9.0", "torch==2.13.0+cu130"]
    assert constraints(TESTED, installed.items()) == expected

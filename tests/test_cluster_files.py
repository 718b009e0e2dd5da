"""Each file in cluster/ is one that its tool takes, as far as that shows without a cloud."""

import copy
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from conftest import outside_environment
from jsonschema import Draft202012Validator
from kuberay import find_open_doors, find_pods, find_problems
from readme import blocks, read

from aerial_seg.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
KUBERNETES = "1.37"
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "use_internal_ips"}
# What SkyPilot 0.14 knows of a task and of its resources, as far as it is of use here.
TASK_KEYS = {"name", "num_nodes", "resources", "envs", "secrets", "setup", "run", "file_mounts"}
RESOURCE_KEYS = {"accelerators", "cpus", "memory", "disk_size", "use_spot", "image_id", "job_recovery", "infra"}
LOOK = re.compile(r"^ec2:Describe\w+$")


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(*kinds: str) -> list[tuple[str, dict[str, Any]]]:
    """All objects of some kinds, each with the name of its file."""
    return [(path.name, each) for path in MANIFESTS for each in load(path) if each["kind"] in kinds]


RAY = of_kind("RayJob", "RayCluster")


def job() -> dict[str, Any]:
    return copy.deepcopy(next(each for name, each in RAY if name == "segment.yaml"))


# Kubernetes


def test_kuberay_takes_each_job_and_cluster() -> None:
    assert {name: list(find_problems(each)) for name, each in RAY} == {
        "cluster.yaml": [], "segment-kueue.yaml": [], "segment.yaml": [], "train.yaml": [],
    }  # fmt: skip


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value, by its keys: `spec.x.0.y`."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in keys:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


CLUSTER_SPEC, GROUP = "spec.rayClusterSpec", "spec.rayClusterSpec.workerGroupSpecs.1"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (put("spec.shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        (put(f"{CLUSTER_SPEC}.upgradeStrategy", {"type": "Recreate"}), "a RayJob has no upgradeStrategy"),
        (put(f"{CLUSTER_SPEC}.authOptions.enableK8sTokenAuth", True), "a RayJob has no enableK8sTokenAuth"),
        (put(f"{CLUSTER_SPEC}.rayVersion", "2.51.0"), "authOptions.mode token needs a rayVersion of 2.52 or later"),
        (put("spec.deletionStrategy", {"deletionRules": [{}]}), "deletionRules and shutdownAfterJobFinishes exclude"),
        (put("metadata.name", "a" * 48), "the name is longer than 47 letters"),
        (put("metadata.name", "Segment"), "the name is not one of a service"),
        (put(f"{CLUSTER_SPEC}.headGroupSpec.resources", {"CPU": "1"}), "head: resources stand beside those"),
        (put(f"{GROUP}.template.spec.restartPolicy", "Always"), "gpu-spot: restartPolicy is not Never"),
        (put(f"{CLUSTER_SPEC}.autoscalerOptions.version", "v1"), "gpu-spot: priority needs autoscaler v2"),
        (put(f"{CLUSTER_SPEC}.networkPolicy", {}), "networkPolicy needs the feature gate RayClusterNetworkPolicy"),
        (put(f"{CLUSTER_SPEC}.tlsOptions", {}), "tlsOptions needs the feature gate RayClusterMTLS"),
        (put("spec.activeDeadlineSeconds", 0), "activeDeadlineSeconds is not positive"),
        (put(f"{GROUP}.minReplicas", 9), "gpu-spot: minReplicas is more than maxReplicas"),
        (put(f"{GROUP}.maxReplicas", None), "gpu-spot: minReplicas or maxReplicas is not set"),
        (put(f"{CLUSTER_SPEC}.enableInTreeAutoscaling", False), "readers: without an autoscaler replicas"),
        (put("spec.shutdownAfterJobFinished", True), "shutdownAfterJobFinished is no key of a RayJob"),
        (put(f"{CLUSTER_SPEC}.authOption", {}), "authOption is no key of a cluster"),
        (put(f"{GROUP}.minReplica", 0), "gpu-spot: minReplica is no key of a group"),
    ],
)
def test_what_kuberay_refuses_or_ignores_is_found(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    manifest = job()
    change(manifest)
    assert any(found.startswith(problem) for found in find_problems(manifest))


def test_a_suspended_job_and_a_token_without_a_version_are_found() -> None:
    manifest = job()
    del manifest["spec"]["rayClusterSpec"]["rayVersion"]
    del manifest["spec"]["ttlSecondsAfterFinished"]
    manifest["spec"] |= {"suspend": True, "shutdownAfterJobFinishes": False}
    found = list(find_problems(manifest))
    assert "suspend needs shutdownAfterJobFinishes" in found
    assert "authOptions.mode token needs a rayVersion of 2.52 or later" in found


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "pod", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("name", [name for name, _ in RAY])
def test_pods_are_such_as_kubernetes_takes_and_restricted(name: str) -> None:
    pods = find_pods(dict(RAY)[name])
    assert {"head"} < pods.keys()
    for template in pods.values():
        kubernetes_validate.validate(as_pod(template), KUBERNETES, strict=True)
        assert list(find_open_doors(template)) == []


def test_an_unknown_key_of_a_pod_and_an_open_door_are_found() -> None:
    template = find_pods(job())["submitter"]
    template["spec"]["toleration"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_pod(template), KUBERNETES, strict=True)
    template["spec"]["containers"][0] |= {"securityContext": {}, "env": [{"name": "A_TOKEN", "value": "x"}]}
    template["spec"]["securityContext"] = {}
    assert len(list(find_open_doors(template))) == 5


def test_policies_are_such_as_kubernetes_takes() -> None:
    policies = of_kind("NetworkPolicy", "PodDisruptionBudget")
    assert len(policies) == 2
    for _, each in policies:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**each, "spec": {**each["spec"], "unknown": 1}}, KUBERNETES, strict=True)


def test_names_are_resolved_from_within_and_nobody_else_comes_in() -> None:
    spec = of_kind("NetworkPolicy")[0][1]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    names = [rule for rule in spec["egress"] if {"port": 53, "protocol": "UDP"} in rule.get("ports", [])]
    assert {"port": 53, "protocol": "TCP"} in names[0]["ports"]
    doors = {each["port"] for rule in spec["ingress"] for each in rule.get("ports", [])}
    assert doors == {8265, 8080}  # of the dashboard, for the operator, and of the metrics
    assert all("from" in rule and not any("ipBlock" in each for each in rule["from"]) for rule in spec["ingress"])
    ours = spec["podSelector"]["matchLabels"].items()
    for _, each in RAY:
        for template in find_pods(each).values():
            assert ours <= template["metadata"]["labels"].items()


def test_a_budget_of_pods_of_an_operator_is_an_absolute_number() -> None:
    spec = of_kind("PodDisruptionBudget")[0][1]["spec"]
    assert isinstance(spec["minAvailable"], int)
    assert spec["minAvailable"] >= 100  # heads; with fewer than there are, one may be drained
    assert "maxUnavailable" not in spec


def test_nothing_runs_on_a_head_and_spot_comes_first() -> None:
    for name, each in RAY:
        cluster = each["spec"].get("rayClusterSpec", each["spec"])
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["authOptions"] == {"mode": "token"}
        if "kueue" not in name:
            priority = {group["groupName"]: group.get("priority", 0) for group in cluster["workerGroupSpecs"]}
            assert priority["gpu-spot"] > priority["gpu-on-demand"]
            assert {group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {0}


def test_each_image_has_the_ray_that_its_cluster_says() -> None:
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    for _, each in RAY:
        version = each["spec"].get("rayClusterSpec", each["spec"])["rayVersion"]
        assert f"\nray=={version}\n" in constraints


CRDS = os.environ.get("KUBERAY_CRDS")  # a folder of KubeRay's files ray.io_*.yaml


def prepare(schema: Any) -> Any:
    """The schema of a resource as a strict JSON schema: keys that it does not name are refused."""
    if isinstance(schema, list):
        return [prepare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: prepare(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    strict.pop("format", None)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def fill(value: Any, schema: dict[str, Any]) -> Any:
    """A value with the defaults of its schema, which the API server sets before it validates."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        defaults = {key: each["default"] for key, each in known.items() if "default" in each}
        rest = schema.get("additionalProperties") or {}
        given = {key: fill(each, known.get(key, rest)) for key, each in value.items()}
        return {**defaults, **given}
    return [fill(each, schema.get("items", {})) for each in value] if isinstance(value, list) else value


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder of the CRDs of KubeRay, which no package has")
@pytest.mark.parametrize("name", [name for name, _ in RAY])
def test_the_schema_of_kuberay_takes_it(name: str) -> None:
    manifest = dict(RAY)[name]
    definition = yaml.load(
        Path(str(CRDS), f"ray.io_{manifest['kind'].lower()}s.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader
    )
    version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    validator = Draft202012Validator(prepare(spec))
    assert [error.message for error in validator.iter_errors(fill(manifest["spec"], spec))] == []
    assert list(validator.iter_errors(fill({**manifest["spec"], "unknown": 1}, spec)))


# AWS


@pytest.fixture
def launcher() -> dict[str, Any]:
    return load(CLUSTER / "aws.yaml")[0]


def test_rays_launcher_takes_the_file(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(launcher)))
    with pytest.raises(Exception, match="unknown"):
        validate_config(prepare_config({**launcher, "unknown": 1}))


def nodes_refused(launcher: dict[str, Any]) -> Iterator[str]:
    """What EC2 does not know of the configurations of nodes, by the model of its API."""
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    for name, node in launcher["available_node_types"].items():
        given = {key: value for key, value in node["node_config"].items() if key != "SubnetIds"}  # Ray's own
        report = ParamValidator().validate({**given, "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            yield f"{name}: {report.generate_report()}"


def test_ec2_takes_each_node(launcher: dict[str, Any]) -> None:
    assert list(nodes_refused(launcher)) == []
    assert launcher["provider"].keys() <= PROVIDER_KEYS
    spot = launcher["available_node_types"]["gpu_spot"]["node_config"]
    spot["InstanceMarketOption"] = spot.pop("InstanceMarketOptions")
    assert "InstanceMarketOption" in next(nodes_refused(launcher))


def test_nothing_runs_on_the_head_all_else_begins_at_none_and_spot_comes_first(launcher: dict[str, Any]) -> None:
    nodes = launcher["available_node_types"]
    head = nodes.pop(launcher["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert {node["min_workers"] for node in nodes.values()} == {0}
    assert nodes["gpu_spot"]["priority"] > nodes["gpu_on_demand"]["priority"]
    assert all("IamInstanceProfile" in node["node_config"] for node in (head, *nodes.values()))
    # Ray would take an image of 2023, whose driver does not serve CUDA 13.
    assert all("ImageId" in node["node_config"] for node in (head, *nodes.values()))


def test_nodes_ask_for_a_token_and_the_dashboard_is_for_the_head_alone(launcher: dict[str, Any]) -> None:
    starts = [launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]]
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in launcher["file_mounts"]


POLICIES = sorted((CLUSTER / "iam").glob("*.json"))


def too_much(policy: dict[str, Any]) -> Iterator[str]:
    """What a policy allows beyond what it names. Only looking at machines has no resource that could be named."""
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        resources = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        yield from (action for action in actions if "*" in action)
        if "*" in resources and not all(LOOK.match(action) for action in actions):
            yield statement["Sid"]


@pytest.mark.parametrize("path", POLICIES, ids=[path.stem for path in POLICIES])
def test_a_policy_allows_no_more_than_it_names(path: Path) -> None:
    policy = json.loads(path.read_text(encoding="utf-8"))
    assert list(too_much(policy)) == []
    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])


def test_reading_does_not_write_and_a_wide_policy_is_found() -> None:
    read = json.loads((CLUSTER / "iam" / "read-imagery.json").read_text(encoding="utf-8"))
    assert not re.search("Put|Delete|Abort", json.dumps(read))
    read["Statement"][0] |= {"Action": "s3:*", "Resource": "*"}
    assert list(too_much(read)) == ["s3:*", "ListImagery"]


# SkyPilot, the image, and commands


def test_skypilot_knows_each_key() -> None:
    task = load(CLUSTER / "skypilot.yaml")[0]
    assert task.keys() <= TASK_KEYS
    assert task["resources"].keys() <= RESOURCE_KEYS
    assert set(task["secrets"].values()) == {None}  # they are given when it is launched


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    command = ["hadolint", str(dockerfile)]
    return subprocess.run(command, env=outside_environment(), capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    found = lint(CLUSTER / "Dockerfile")
    assert (found.returncode, found.stdout) == (0, "")
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    loose = re.sub(r":3\.\d+\.\d+-slim-\w+", ":latest", text).replace("USER 1000", "USER root")
    (tmp_path / "Dockerfile").write_text(loose, encoding="utf-8")
    assert {"DL3007", "DL3002"} <= set(re.findall(r"DL\d+", lint(tmp_path / "Dockerfile").stdout))


def test_what_the_image_is_built_from_is_there_and_not_ignored() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert len(copied) == 6
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for name in copied:
        assert (ROOT / name).exists()
        assert {f"!{name}", f"!{name}/**"} & set(ignored), name


def test_the_image_is_pinned_runs_as_a_user_and_tells_its_health() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(images) == 2
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in images)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000"]
    assert "\nHEALTHCHECK " in text
    assert "--constraint /tmp/constraints.txt" in text
    installed = re.search(r"apt-get install (.*?) &&", text)
    assert installed
    assert {"rsync", "openssh-client"} <= set(installed[1].split())  # with which Ray's launcher reaches containers


README = "cluster/README.md"  # whose blocks of the language bash need machines that are not here


def rays_commands() -> list[str]:
    """Each command of Ray's that a README or the launcher's file has."""
    config = load(CLUSTER / "aws.yaml")[0]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    found = [re.search(r"(?<![\w/.-])ray ([a-z][^\"]*)", line) for line in [*starts, *lines]]
    return [each[1].rstrip("& ") for each in found if each]


def test_ray_has_each_command_with_these_options() -> None:
    from click import NoSuchOption
    from ray.scripts.scripts import cli

    found = [shlex.split(command) for command in rays_commands()]
    assert {words[0] for words in found} == {"start", "stop", "up", "down", "dashboard", "get-auth-token"}
    for name, *options in found:
        cli.commands[name].make_context(name, list(options))
    with pytest.raises(NoSuchOption):
        cli.commands["start"].make_context("start", ["--heads"])


def test_files_that_the_readme_names_are_there() -> None:
    named = re.findall(r"(?<![\w/])cluster/[\w./-]+", "".join(blocks(README, "bash") + blocks(README, "sh")))
    table = re.findall(r"`([\w/-]+\.?\w*/?)`", read(README).partition("## What is here")[2].partition("\n\n##")[0])
    assert len(named) > 8
    assert all((ROOT / name).exists() for name in named)
    there = {path.relative_to(CLUSTER) for path in CLUSTER.rglob("*") if path.is_file() and "pyc" not in path.suffix}
    for path in there - {Path("README.md")}:
        assert str(path) in table or f"{path.parts[0]}/" in table, path


def test_what_a_region_costs_is_worked_out_from_the_rates() -> None:
    rows = re.findall(r"^\| .+ \| .+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", read(README), re.MULTILINE)
    rates = read("jobs/README.md").partition("## How fast it is")[2].partition("\n## ")[0]
    assert len(rows) == 3
    for rate, price, *costs in rows:
        assert re.search(rf"\| {re.escape(rate)} \|", rates), rate
        for gsd_m, cost in zip((0.3, 1.0), costs, strict=True):
            seconds = 1_000 * 1e6 / gsd_m**2 / 1e6 / float(rate)
            assert float(cost) == round(seconds / 3600 * float(price), 3)


def commands() -> list[str]:
    """Each `seg` command that a file in cluster/ runs."""
    entrypoints = [each["spec"]["entrypoint"] for _, each in RAY if each["kind"] == "RayJob"]
    scripts = load(CLUSTER / "skypilot.yaml")[0]["run"].splitlines()
    image = json.loads(re.findall(r"^CMD (.+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[-1])
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    named = [re.search(r"(?<![\w-])seg (\w+ .*)$", line) for line in lines]
    return [*entrypoints, *scripts, shlex.join(image), *(each[0] for each in named if each)]


def test_the_command_line_takes_each_command() -> None:
    found = commands()
    assert len(found) == 10
    for command in found:
        words = shlex.split(command)
        assert words[0] == "seg"
        if words[1:] != ["--help"]:
            args = make_parser().parse_args(words[1:])
            if args.command == "submit":
                args.parse(args.job[args.job[:1] == ["--"] :])

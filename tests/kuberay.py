"""What KubeRay 1.7.0 refuses or ignores although its schema lets it pass, and what this project asks of its pods."""

import re
from collections.abc import Iterator
from typing import Any

LONGEST = {"RayJob": 47, "RayCluster": 53}  # letters of a name
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
TOKEN_SINCE, PRIORITY_SINCE = (2, 52), (2, 56)
SIZES = {"num-cpus", "num-gpus", "memory", "resources"}  # options of `ray start`
GATED = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}
# The keys that are used here. The API server drops a misspelt one without a word.
JOB_KEYS = {
    "entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "suspend",
    "preRunningDeadlineSeconds", "activeDeadlineSeconds", "rayClusterSpec", "submitterPodTemplate", "deletionStrategy",
}  # fmt: skip
CLUSTER_KEYS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "upgradeStrategy", *GATED,
}  # fmt: skip
GROUP_KEYS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "priority", "rayStartParams", "resources", "template",
}  # fmt: skip


def find_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a RayJob or a RayCluster."""
    kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest["spec"]
    if len(name) > LONGEST[kind]:
        yield f"the name is longer than {LONGEST[kind]} letters"
    if not NAME.fullmatch(name):
        yield "the name is not one of a service"
    if kind == "RayJob":
        yield from _find_problems_of_job(spec)
    yield from _find_problems_of_cluster(spec["rayClusterSpec"] if kind == "RayJob" else spec)


def _find_problems_of_job(spec: dict[str, Any]) -> Iterator[str]:
    ends, cluster = spec.get("shutdownAfterJobFinishes", False), spec["rayClusterSpec"]
    yield from (f"{key} is no key of a RayJob" for key in spec.keys() - JOB_KEYS)
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("deletionStrategy", {}).get("deletionRules") and ends:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if "upgradeStrategy" in cluster:
        yield "a RayJob has no upgradeStrategy"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "a RayJob has no enableK8sTokenAuth"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} is not positive"


def _find_problems_of_cluster(spec: dict[str, Any]) -> Iterator[str]:
    version = tuple(int(number) for number in spec.get("rayVersion", "0").split(".")[:2])
    scales, options = spec.get("enableInTreeAutoscaling", False), spec.get("autoscalerOptions", {})
    scales_by_v2 = scales and options.get("version") == "v2"
    yield from (f"{key} is no key of a cluster" for key in spec.keys() - CLUSTER_KEYS)
    if spec.get("authOptions", {}).get("mode") == "token" and version < TOKEN_SINCE:
        yield "authOptions.mode token needs a rayVersion of 2.52 or later"
    yield from (f"{key} needs the feature gate {gate}" for key, gate in GATED.items() if key in spec)
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
        name = group.get("groupName", "head")
        yield from (f"{name}: {key} is no key of a group" for key in group.keys() - GROUP_KEYS)
        if group.get("resources") and SIZES & group["rayStartParams"].keys():
            yield f"{name}: resources stand beside those in rayStartParams"
        if scales_by_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy is not Never under autoscaler v2"
        if group.get("priority") and not (scales_by_v2 and version >= PRIORITY_SINCE):
            yield f"{name}: priority needs autoscaler v2 and a rayVersion of 2.56 or later"
    for group in spec.get("workerGroupSpecs", []):
        yield from _find_problems_of_size(group, scales)


def _find_problems_of_size(group: dict[str, Any], scales: bool) -> Iterator[str]:
    name, low, high = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
    if low is None or high is None:
        yield f"{name}: minReplicas or maxReplicas is not set"
    elif low > high:
        yield f"{name}: minReplicas is more than maxReplicas"
    elif not scales and not low == high == group.get("replicas"):
        yield f"{name}: without an autoscaler replicas, minReplicas and maxReplicas are one number"


def find_pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The templates of all pods of a RayJob or RayCluster, by a name for each."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    pods = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    pods["head"] = cluster["headGroupSpec"]["template"]
    if "submitterPodTemplate" in spec:
        pods["submitter"] = spec["submitterPodTemplate"]
    return pods


def find_open_doors(template: dict[str, Any]) -> Iterator[str]:
    """Where a pod is less than restricted, as the Pod Security Standards have it, or holds a secret in plain text."""
    spec = template["spec"]
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True:
        yield "may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "any system call"
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"
        for variable in container.get("env", []):
            if re.search("SECRET|TOKEN|PASSWORD|KEY", variable["name"]) and "value" in variable:
                yield f"{variable['name']} is in plain text"

"""A deployment on Kubernetes: a LeaderWorkerSet, one group of pods a replica, and the service in front. Torch-free.

LeaderWorkerSet (kubernetes-sigs/lws) starts, restarts and replaces the machines of a replica together, which is what
an engine over several machines needs; with one machine it is a group of one. What is written is checked against the
schema and by arithmetic before anybody sees it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from freehold.errors import InvalidRequest
from freehold.plan.emit import PORT, Deployment, launch
from freehold.plan.flags import VERSIONS
from freehold.plan.manifest_schema import manifest_problems
from freehold.plan.yaml import to_yaml

_SGLANG_IMAGE = f"lmsysorg/sglang:v{VERSIONS['sglang']}"
IMAGES: Mapping[tuple[str, str], str] = {
    ("vllm", "cuda"): f"vllm/vllm-openai:v{VERSIONS['vllm']}.0",
    ("vllm", "gfx942"): f"vllm/vllm-openai-rocm:v{VERSIONS['vllm']}.0",
    ("vllm", "gfx950"): f"vllm/vllm-openai-rocm:v{VERSIONS['vllm']}.0",
    ("sglang", "cuda"): _SGLANG_IMAGE,
    ("sglang", "gfx942"): f"{_SGLANG_IMAGE}-rocm720-mi30x",
    ("sglang", "gfx950"): f"{_SGLANG_IMAGE}-rocm720-mi35x",
}
"""Images by engine and GPU, tagged by the version whose flags are used. See that the tag exists, and pin its digest."""
CLAIM = "models"
"""The volume claim that holds the weights, mounted where both engines' images cache what they download."""
_START_MINUTES = 60


def manifest(deployment: Deployment, *, image: str | None = None) -> list[dict[str, Any]]:
    """The objects to apply. Raises InvalidRequest if the deployment does not add up."""
    gpu = deployment.gpu
    key = (deployment.engine, "cuda" if gpu.kind == "cuda" else gpu.arch)
    if key not in IMAGES:
        raise InvalidRequest(f"no container image is known for {deployment.engine} on {gpu.name}")
    name = _dns_label(f"{deployment.served_name}-{deployment.engine}")
    started = launch(deployment, host="0.0.0.0", head="$(LWS_LEADER_ADDRESS)", rank="$(LWS_WORKER_INDEX)")
    environment = [{"name": variable, "value": value} for variable, value in started.environment.items()]

    def pod(command: tuple[str, ...], *, leader: bool) -> dict[str, Any]:
        container: dict[str, Any] = {
            "name": deployment.engine,
            "image": image or IMAGES[key],
            "command": _command(command),
            "resources": {"limits": {_gpu_resource(deployment): str(deployment.gpus_per_node)}},
        }
        if environment:
            container["env"] = environment
        if leader:
            container["ports"] = [{"name": "http", "containerPort": PORT}]
            container["startupProbe"] = _one_generation(deployment)
            container["readinessProbe"] = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 10}
        container["volumeMounts"] = [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "models", "mountPath": "/root/.cache/huggingface"},
        ]
        volumes = [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
            {"name": "models", "persistentVolumeClaim": {"claimName": CLAIM}},
        ]
        spec = {"automountServiceAccountToken": False, "containers": [container], "volumes": volumes}
        return {"metadata": {"labels": {"app": name}}, "spec": spec}

    workers = pod(started.commands[-1], leader=deployment.nodes == 1)
    template: dict[str, Any] = {"size": deployment.nodes, "restartPolicy": "RecreateGroupOnPodRestart"}
    if deployment.nodes > 1:
        template["leaderTemplate"] = pod(started.commands[0], leader=True)
    template["workerTemplate"] = workers
    documents = [_set(deployment, name, template), _service(name)]
    problems = manifest_problems(list(documents))
    asked = deployment.replicas * deployment.nodes * deployment.gpus_per_node
    if asked != deployment.replicas * deployment.footprint.layout.gpus:
        problems.append(f"{asked} GPUs asked for, {deployment.replicas * deployment.footprint.layout.gpus} planned")
    if problems:
        raise InvalidRequest(f"the manifest of {name} is not valid: {'; '.join(problems)}")
    return documents


def manifest_yaml(deployment: Deployment, *, image: str | None = None) -> str:
    """The manifest as YAML text."""
    return to_yaml(manifest(deployment, image=image))


def _set(deployment: Deployment, name: str, template: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": deployment.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": {"maxUnavailable": 1}},
            "leaderWorkerTemplate": template,
        },
    }


def _service(name: str) -> dict[str, Any]:
    # Worker 0 is the leader, the only pod of a group that answers.
    selector = {"leaderworkerset.sigs.k8s.io/name": name, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }


def _command(command: tuple[str, ...]) -> list[str]:
    """Arguments as they are, or through a shell where one of them is computed from the machine's rank."""
    if not any("$((" in word for word in command):
        return list(command)
    words = [re.sub(r"\$\((LWS_[A-Z_]+)\)", r"$\1", word) for word in command]
    quoted = [f'"{word}"' if "$" in word else shlex.quote(word) for word in words]
    return ["/bin/sh", "-c", "exec " + " ".join(quoted)]


def _one_generation(deployment: Deployment) -> dict[str, Any]:
    """Started means one completed generation: engines answer health checks before their kernels are compiled."""
    script = (
        "import json,urllib.request as u;"
        f"b=json.dumps({{'model':'{deployment.served_name}','prompt':'Hello','max_tokens':1}}).encode();"
        f"u.urlopen(u.Request('http://127.0.0.1:{PORT}/v1/completions',b,"
        "{'content-type':'application/json'}),timeout=50).read()"
    )
    period = 60
    return {
        "exec": {"command": ["python3", "-c", script]},
        "periodSeconds": period,
        "timeoutSeconds": 55,
        "failureThreshold": _START_MINUTES * 60 // period,
    }


def _gpu_resource(deployment: Deployment) -> str:
    return {"cuda": "nvidia.com/gpu", "rocm": "amd.com/gpu"}[deployment.gpu.kind]


def _dns_label(text: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:63].rstrip("-")

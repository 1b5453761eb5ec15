"""The Kubernetes manifest: its shape, its schema and arithmetic, and that mutations of it are caught."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from freehold.errors import InvalidRequest
from freehold.plan.emit import Deployment
from freehold.plan.flags import ServingEngine
from freehold.plan.footprint import footprint
from freehold.plan.hardware import gpu
from freehold.plan.manifest import manifest, manifest_yaml
from freehold.plan.manifest_schema import manifest_problems
from freehold.plan.models import load
from freehold.plan.types import Layout


def deployment(
    engine: ServingEngine = "vllm", layout: Layout | None = None, on: str = "h200", replicas: int = 2
) -> Deployment:
    spec, hardware = load("glm-5.2-fp8"), gpu(on)
    room = footprint(spec, hardware, layout or Layout(tp=8), engine)
    return Deployment(spec, hardware, engine, room, 32_768, 16, replicas=replicas)


def test_one_machine_a_replica() -> None:
    workload, service = manifest(deployment())
    template = workload["spec"]["leaderWorkerTemplate"]
    assert (workload["spec"]["replicas"], template["size"]) == (2, 1)
    assert "leaderTemplate" not in template
    (container,) = template["workerTemplate"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["command"][:2] == ["vllm", "serve"]
    assert "0.0.0.0" in container["command"]
    assert "/v1/completions" in container["startupProbe"]["exec"]["command"][-1]
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == workload["metadata"]["name"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_several_machines_a_replica(engine: ServingEngine) -> None:
    workload, _ = manifest(deployment(engine, Layout(tp=1, dp=16, ep=16), "b200"))
    template = workload["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    leader, worker = (template[key]["spec"]["containers"][0] for key in ("leaderTemplate", "workerTemplate"))
    assert "startupProbe" in leader
    assert "startupProbe" not in worker
    text = " ".join(worker["command"])
    assert "LWS_LEADER_ADDRESS" in text
    assert "LWS_WORKER_INDEX" in text


def test_amd_asks_for_amd_gpus() -> None:
    workload, _ = manifest(deployment("sglang", on="mi300x"))
    container = workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"amd.com/gpu": "8"}
    assert container["image"].endswith("-rocm720-mi30x")


def test_yaml_says_the_same() -> None:
    yaml = pytest.importorskip("yaml", reason="reads the manifest back with a YAML parser")
    for item in (deployment(), deployment("vllm", Layout(tp=1, dp=16, ep=16), "b200")):
        assert list(yaml.safe_load_all(manifest_yaml(item))) == manifest(item)


def pod_of(documents: list[dict[str, Any]]) -> Any:
    return documents[0]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]


def container_of(documents: list[dict[str, Any]]) -> Any:
    return pod_of(documents)["containers"][0]


MUTATIONS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "unknown field": lambda d: d[0]["spec"].update(replicaCount=2),
    "missing template": lambda d: d[0]["spec"]["leaderWorkerTemplate"].pop("workerTemplate"),
    "replicas as text": lambda d: d[0]["spec"].update(replicas="2"),
    "size 0": lambda d: d[0]["spec"]["leaderWorkerTemplate"].update(size=0),
    "unknown restart policy": lambda d: d[0]["spec"]["leaderWorkerTemplate"].update(restartPolicy="Always"),
    "wrong API version": lambda d: d[0].update(apiVersion="leaderworkerset.x-k8s.io/v2"),
    "name with a dot": lambda d: d[0]["metadata"].update(name="glm-5.2"),
    "no name": lambda d: d[0]["metadata"].pop("name"),
    "GPUs as a number": lambda d: container_of(d)["resources"]["limits"].update({"nvidia.com/gpu": 8}),
    "no GPUs": lambda d: container_of(d)["resources"].update(limits={"cpu": "4"}),
    "mount without volume": lambda d: container_of(d)["volumeMounts"][0].update(name="scratch"),
    "port 0": lambda d: container_of(d)["ports"][0].update(containerPort=0),
    "empty command": lambda d: container_of(d).update(command=[]),
    "probe without action": lambda d: container_of(d)["readinessProbe"].pop("httpGet"),
    "volume without source": lambda d: pod_of(d)["volumes"][0].pop("emptyDir"),
    "bad environment name": lambda d: container_of(d).update(env=[{"name": "A-B", "value": "1"}]),
    "service of another set": lambda d: d[1]["spec"]["selector"].update({"leaderworkerset.sigs.k8s.io/name": "other"}),
    "other kind": lambda d: d[1].update(kind="Deployment"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation: str) -> None:
    documents = manifest(deployment())
    assert manifest_problems(list(documents)) == []
    broken = copy.deepcopy(documents)
    MUTATIONS[mutation](broken)
    assert manifest_problems(list(broken)) != [], mutation


def test_leader_and_workers_have_as_many_gpus() -> None:
    documents = manifest(deployment("vllm", Layout(tp=1, dp=16, ep=16), "b200"))
    container_of(documents)["resources"]["limits"]["nvidia.com/gpu"] = "4"
    assert any("different numbers of GPUs" in problem for problem in manifest_problems(list(documents)))


def test_hardware_without_an_image_is_refused() -> None:
    import dataclasses

    item = deployment()
    with pytest.raises(InvalidRequest, match="no container image is known"):
        manifest(dataclasses.replace(item, gpu=dataclasses.replace(item.gpu, kind="cpu", arch="x86-64")))

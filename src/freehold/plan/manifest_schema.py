"""The schema of the Kubernetes objects that Freehold writes, closed: a field that is not here is refused. Torch-free.

LeaderWorkerSet as its API group `leaderworkerset.x-k8s.io/v1` defines it (kubernetes-sigs/lws,
api/leaderworkerset/v1/leaderworkerset_types.go), and of core/v1 the parts that serving needs. Names, labels and
quantities have Kubernetes' own patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

DnsLabel = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[str, Meta(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Meta(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
Quantity = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|Mi|M|Gi|G|Ti|T)?$")]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Text = Annotated[str, Meta(min_length=1)]


class _Closed(msgspec.Struct, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """Every object here: unknown fields are errors."""


class Metadata(_Closed):
    name: DnsLabel | None = None
    labels: dict[LabelKey, LabelValue] = {}


class FieldRef(_Closed):
    field_path: Text


class ValueFrom(_Closed):
    field_ref: FieldRef


class EnvVar(_Closed):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: ValueFrom | None = None


class ContainerPort(_Closed):
    container_port: Port
    name: DnsLabel | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"


class Resources(_Closed):
    limits: dict[LabelKey, Quantity]
    requests: dict[LabelKey, Quantity] = {}


class ExecAction(_Closed):
    command: Annotated[list[Text], Meta(min_length=1)]


class HttpGet(_Closed):
    path: Annotated[str, Meta(pattern=r"^/")]
    port: Port


class Probe(_Closed):
    exec: ExecAction | None = None
    http_get: HttpGet | None = None
    initial_delay_seconds: Annotated[int, Meta(ge=0)] = 0
    period_seconds: Count = 10
    timeout_seconds: Count = 1
    failure_threshold: Count = 3


class VolumeMount(_Closed):
    name: DnsLabel
    mount_path: Annotated[str, Meta(pattern=r"^/[^:]*$")]
    read_only: bool = False


class Container(_Closed):
    name: DnsLabel
    image: Text
    command: Annotated[list[Text], Meta(min_length=1)]
    resources: Resources
    env: list[EnvVar] = []
    ports: list[ContainerPort] = []
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    volume_mounts: list[VolumeMount] = []


class EmptyDir(_Closed):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class Claim(_Closed):
    claim_name: DnsLabel
    read_only: bool = False


class Volume(_Closed):
    name: DnsLabel
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None


class PodSpec(_Closed):
    containers: Annotated[list[Container], Meta(min_length=1)]
    volumes: list[Volume] = []
    node_selector: dict[LabelKey, LabelValue] = {}
    automount_service_account_token: bool = True
    termination_grace_period_seconds: Annotated[int, Meta(ge=0)] = 30


class PodTemplate(_Closed):
    spec: PodSpec
    metadata: Metadata = msgspec.field(default_factory=Metadata)


class LeaderWorkerTemplate(_Closed):
    worker_template: PodTemplate
    leader_template: PodTemplate | None = None
    size: Count = 1
    restart_policy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"] = (
        "RecreateGroupOnPodRestart"
    )


class RollingUpdate(_Closed):
    max_unavailable: Annotated[int, Meta(ge=0)] = 1
    max_surge: Annotated[int, Meta(ge=0)] = 0
    partition: Annotated[int, Meta(ge=0)] = 0


class RolloutStrategy(_Closed):
    type: Literal["RollingUpdate"]
    rolling_update_configuration: RollingUpdate = msgspec.field(default_factory=RollingUpdate)


class LeaderWorkerSetSpec(_Closed):
    leader_worker_template: LeaderWorkerTemplate
    replicas: Annotated[int, Meta(ge=0)] = 1
    startup_policy: Literal["LeaderCreated", "LeaderReady"] = "LeaderCreated"
    rollout_strategy: RolloutStrategy | None = None


class LeaderWorkerSet(_Closed):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: Metadata
    spec: LeaderWorkerSetSpec


class ServicePort(_Closed):
    name: DnsLabel
    port: Port
    target_port: Port
    protocol: Literal["TCP"] = "TCP"


class ServiceSpec(_Closed):
    selector: dict[LabelKey, LabelValue]
    ports: Annotated[list[ServicePort], Meta(min_length=1)]
    type: Literal["ClusterIP"] = "ClusterIP"


class Service(_Closed):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


def manifest_problems(documents: list[Mapping[str, Any]]) -> list[str]:
    """What a list of objects does against the schema, and against itself: mounts without volumes, groups whose pods
    differ in GPUs, a service that selects nothing. Empty if all is well.
    """
    found: list[str] = []
    sets: list[LeaderWorkerSet] = []
    services: list[Service] = []
    for document in documents:
        kind = document.get("kind")
        try:
            if kind == "LeaderWorkerSet":
                sets.append(msgspec.convert(document, LeaderWorkerSet))
            elif kind == "Service":
                services.append(msgspec.convert(document, Service))
            else:
                found.append(f"no schema for kind {kind!r}")
        except msgspec.ValidationError as error:
            found.append(f"{kind}: {error}")
    for item in sets:
        found += _inner_problems(item)
    names = {item.metadata.name for item in sets}
    for service in services:
        if service.spec.selector.get("leaderworkerset.sigs.k8s.io/name") not in names:
            found.append(f"Service {service.metadata.name} selects no LeaderWorkerSet of this manifest")
    return found


def _inner_problems(item: LeaderWorkerSet) -> list[str]:
    found = []
    if item.metadata.name is None:
        found.append("LeaderWorkerSet: metadata.name is missing")
    template = item.spec.leader_worker_template
    pods = [pod for pod in (template.leader_template, template.worker_template) if pod is not None]
    for pod in pods:
        volumes = {volume.name for volume in pod.spec.volumes}
        found += [
            f"volume {volume.name} needs exactly one source"
            for volume in pod.spec.volumes
            if (volume.empty_dir is None) == (volume.persistent_volume_claim is None)
        ]
        for container in pod.spec.containers:
            lost = {mount.name for mount in container.volume_mounts} - volumes
            if lost:
                found.append(f"container {container.name} mounts {', '.join(sorted(lost))}, which is no volume")
            found += [
                f"a probe of container {container.name} needs exactly one action"
                for probe in (container.startup_probe, container.readiness_probe)
                if probe is not None and (probe.exec is None) == (probe.http_get is None)
            ]
    gpus = {_gpus(pod) for pod in pods}
    if len(gpus) != 1 or gpus == {0}:
        found.append(f"pods of one group ask for different numbers of GPUs, or none: {sorted(gpus)}")
    return found


def _gpus(pod: PodTemplate) -> int:
    return sum(
        int(limit)
        for container in pod.spec.containers
        for resource, limit in container.resources.limits.items()
        if resource.endswith("/gpu")
    )

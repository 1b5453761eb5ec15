"""Launching what was planned: command lines for vLLM and SGLang, one for each machine of a replica. Torch-free.

Flags are those of the engines' maintainers for this architecture (recipes.vllm.ai/zai-org/GLM-5.2 and SGLang's GLM-5.2
cookbook page, read 2026-11), spelled as the versions in `flags.VERSIONS` spell them. Nothing leaves this module that
the engines' argument lists do not accept, or whose GPUs and bytes do not add up.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

from freehold.errors import InvalidRequest
from freehold.plan.flags import VERSIONS, ServingEngine, flag_table
from freehold.plan.types import Footprint, Gpu, ModelSpec

PORT = 8000
HEAD = "$HEAD_ADDRESS"
"""Where the first machine of a replica is reached; the operator sets it, or Kubernetes does."""
_MASTER_PORT = 20000
_DP_PORT = 13345


@dataclass(frozen=True)
class Deployment:
    """What is launched: `replicas` copies of one layout, each serving `max_sequences` requests of up to `max_context`.

    drafts: tokens that the MTP layer proposes in a step, 0 for none. name: what clients call the model.
    """

    model: ModelSpec
    gpu: Gpu
    engine: ServingEngine
    footprint: Footprint
    max_context: int
    max_sequences: int
    drafts: int = 0
    replicas: int = 1
    name: str = ""

    @property
    def nodes(self) -> int:
        """Machines of one replica."""
        return -(-self.footprint.layout.gpus // self.gpu.node)

    @property
    def gpus_per_node(self) -> int:
        return self.footprint.layout.gpus // self.nodes

    @property
    def served_name(self) -> str:
        return self.name or self.model.name


@dataclass(frozen=True)
class Launch:
    """How to start one replica: for each machine its arguments, and the environment of all.

    commands: one for each machine, in order of rank, without the environment.
    """

    engine: ServingEngine
    version: str
    commands: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    notes: tuple[str, ...] = ()

    def shell(self, rank: int = 0) -> str:
        """The command of one machine as shell text, an option a line."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines: list[list[str]] = [[*words]]
        for word in self.commands[rank]:
            if word.startswith("--"):
                lines.append([])
            # The head's address stays a shell variable; everything else is quoted as it must be.
            lines[-1].append(word if HEAD in word else shlex.quote(word))
        return " \\\n  ".join(" ".join(line) for line in lines)


def launch(deployment: Deployment, *, host: str = "127.0.0.1", head: str = HEAD, rank: str | None = None) -> Launch:
    """The commands of one replica.

    host: the address that the server binds. head: the first machine's address. rank: what stands for a machine's
    rank; None for the ranks themselves. Raises InvalidRequest if the deployment does not add up or if the engine
    cannot do it.
    """
    check_arithmetic(deployment)
    build = _vllm if deployment.engine == "vllm" else _sglang
    environment, arguments = build(deployment, host)
    table = flag_table(deployment.engine)
    commands = []
    for node in range(deployment.nodes):
        multi = _several_machines(deployment, head, rank or str(node), worker=node > 0)
        options = [*arguments, *multi]
        problems = table.problems(_numeric_ranks(options, rank))
        if problems:
            raise InvalidRequest(f"{deployment.engine} would refuse this launch: {'; '.join(problems)}")
        commands.append((*_program(deployment), *options))
    return Launch(
        deployment.engine,
        VERSIONS[deployment.engine],
        tuple(commands),
        MappingProxyType(environment),
        tuple(launch_notes(deployment)),
    )


def check_arithmetic(deployment: Deployment) -> None:
    """Raises InvalidRequest unless GPUs, machines, bytes, context and sequences of the deployment add up."""
    layout, gpu, footprint = deployment.footprint.layout, deployment.gpu, deployment.footprint
    config = deployment.model.config

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InvalidRequest(f"{layout} on {gpu.name}: {message}")

    require(deployment.replicas >= 1, f"{deployment.replicas} replicas")
    require(layout.gpus == layout.tp * layout.dp * layout.pp, f"{layout.gpus} GPUs are not TP x DP x PP")
    require(
        layout.gpus <= gpu.node or layout.gpus % gpu.node == 0,
        f"{layout.gpus} GPUs do not fill machines of {gpu.node}",
    )
    require(config.num_attention_heads % layout.tp == 0, f"{config.num_attention_heads} heads over {layout.tp} ranks")
    require(config.n_routed_experts % layout.ep == 0, f"{config.n_routed_experts} experts over {layout.ep} groups")
    needed = footprint.weight_bytes + round(footprint.overhead.value)
    needed += footprint.cache_tokens * footprint.cache_per_token
    require(needed <= gpu.memory, f"{needed:,} bytes a GPU of {gpu.memory:,}")
    require(1 <= deployment.max_context <= config.max_position_embeddings, f"a context of {deployment.max_context:,}")
    require(
        deployment.max_context <= footprint.cache_tokens,
        f"a context of {deployment.max_context:,} tokens, and room for {footprint.cache_tokens:,}",
    )
    require(deployment.max_sequences >= layout.dp, f"{deployment.max_sequences} sequences for {layout.dp} groups")
    require(0 <= deployment.drafts <= 7, f"{deployment.drafts} draft tokens")
    require(not deployment.drafts or config.has_mtp, "drafts without an MTP layer")
    if deployment.engine == "vllm":
        require(not (deployment.drafts and layout.pp > 1), "vLLM is not known to run drafts with pipeline stages")
        require(layout.ep in (1, layout.ranks), f"vLLM deals experts over all {layout.ranks} ranks or none")
    else:
        both = layout.pp > 1 and layout.dp > 1
        require(not (deployment.drafts and both), "SGLang refuses drafts with pipeline stages and attention groups")


def _program(deployment: Deployment) -> tuple[str, ...]:
    if deployment.engine == "vllm":
        return ("vllm", "serve", deployment.model.repo)
    return ("sglang", "serve")


def _vllm(deployment: Deployment, host: str) -> tuple[dict[str, str], list[str]]:
    footprint, layout, gpu = deployment.footprint, deployment.footprint.layout, deployment.gpu
    arguments = ["--served-model-name", deployment.served_name, "--host", host, "--port", str(PORT)]
    arguments += ["--tensor-parallel-size", str(layout.tp)]
    if layout.pp > 1:
        arguments += ["--pipeline-parallel-size", str(layout.pp)]
    if layout.dp > 1:
        arguments += ["--data-parallel-size", str(layout.dp)]
    if layout.ep > 1:
        arguments += ["--enable-expert-parallel"]
    if layout.dcp > 1:
        arguments += ["--decode-context-parallel-size", str(layout.dcp)]
    arguments += ["--kv-cache-dtype", _VLLM_CACHE[footprint.cache.latent]]
    arguments += ["--max-model-len", str(deployment.max_context)]
    # A limit for each data-parallel rank.
    arguments += ["--max-num-seqs", str(deployment.max_sequences // layout.dp)]
    arguments += ["--gpu-memory-utilization", _fraction(footprint.usable, gpu.memory)]
    if deployment.drafts:
        arguments += ["--speculative-config.method", "mtp"]
        arguments += ["--speculative-config.num_speculative_tokens", str(deployment.drafts)]
    if gpu.kind == "rocm":
        arguments += ["--linear-backend", "aiter", "--moe-backend", "aiter"]
    reasoning, tools = _parsers(deployment)
    arguments += ["--reasoning-parser", reasoning, "--tool-call-parser", tools, "--enable-auto-tool-choice"]
    environment: dict[str, str] = {}
    if gpu.kind == "rocm":
        environment["VLLM_ROCM_USE_AITER"] = "1"
    if gpu.arch in ("sm100", "sm103") and deployment.model.dtype == "fp8":
        environment["VLLM_DEEP_GEMM_WARMUP"] = "skip"
    if layout.pp > 1:
        environment["VLLM_PP_LAYER_PARTITION"] = _stages(deployment)
    return environment, arguments


def _sglang(deployment: Deployment, host: str) -> tuple[dict[str, str], list[str]]:
    footprint, layout, gpu = deployment.footprint, deployment.footprint.layout, deployment.gpu
    arguments = ["--model-path", deployment.model.repo, "--served-model-name", deployment.served_name]
    arguments += ["--host", host, "--port", str(PORT), "--tp-size", str(layout.ranks)]
    if layout.pp > 1:
        arguments += ["--pp-size", str(layout.pp)]
    if layout.dp > 1:
        # SGLang divides the chunk among the groups: 4,096 tokens each, as in its cookbook with 8 groups.
        arguments += ["--attn-dp-size", str(layout.dp), "--chunked-prefill-size", str(4096 * layout.dp)]
    if layout.ep > 1:
        arguments += ["--ep-size", str(layout.ep)]
        if gpu.kind == "cuda" and layout.ep == layout.ranks and layout.dp > 1:
            arguments += ["--moe-a2a-backend", "deepep"]
    if layout.dcp > 1:
        arguments += ["--dcp-size", str(layout.dcp)]
    arguments += ["--kv-cache-dtype", _SGLANG_CACHE[footprint.cache.latent]]
    if deployment.model.dtype == "nvfp4":
        arguments += ["--quantization", "modelopt_fp4"]
    arguments += ["--context-length", str(deployment.max_context)]
    arguments += ["--max-running-requests", str(deployment.max_sequences)]
    arguments += ["--mem-fraction-static", _fraction(footprint.usable, gpu.memory)]
    if deployment.drafts:
        arguments += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(deployment.drafts)]
        arguments += ["--speculative-eagle-topk", "1"]
        arguments += ["--speculative-num-draft-tokens", str(deployment.drafts + 1)]
    reasoning, tools = _parsers(deployment)
    arguments += ["--reasoning-parser", reasoning, "--tool-call-parser", tools]
    environment = {"SGLANG_PP_LAYER_PARTITION": _stages(deployment)} if layout.pp > 1 else {}
    if layout.pp > 1 and deployment.drafts:
        # Without it SGLang 0.5.23 allows drafts with stages on prefill servers only.
        environment["SGLANG_ENABLE_PP_SPEC"] = "1"
    return environment, arguments


# FlashMLA's sparse kernels take "fp8" as the 656-byte format; on SM100 FlashInfer's take plain FP8.
_VLLM_CACHE = {"bf16": "bfloat16", "fp8_ds_mla": "fp8_ds_mla", "fp8": "fp8_e4m3", "nvfp4_ds_mla": "nvfp4_ds_mla"}
_SGLANG_CACHE = {"bf16": "bf16", "fp8_ds_mla": "fp8_e4m3", "fp8": "fp8_e4m3", "nvfp4_ds_mla": "nvfp4"}


def _parsers(deployment: Deployment) -> tuple[str, str]:
    """Names of the reasoning and the tool parser."""
    if deployment.model.family == "deepseek_v32":
        return ("deepseek_v3", "deepseek_v32") if deployment.engine == "vllm" else ("deepseek-v3", "deepseekv32")
    return "glm45", "glm47"


def _stages(deployment: Deployment) -> str:
    """Layers of each pipeline stage, as both engines' environment variables take them."""
    cuts = (*deployment.footprint.layout.cuts, deployment.model.config.num_hidden_layers)
    return ",".join(str(after - before) for before, after in pairwise(cuts))


def _fraction(part: int, whole: int) -> str:
    return f"{part / whole:.3f}".removesuffix("0")


def _several_machines(deployment: Deployment, head: str, rank: str, *, worker: bool) -> list[str]:
    if deployment.nodes == 1:
        return []
    layout, nodes = deployment.footprint.layout, str(deployment.nodes)
    if deployment.engine == "sglang":
        return ["--nnodes", nodes, "--node-rank", rank, "--dist-init-addr", f"{head}:{_MASTER_PORT}"]
    if layout.dp > 1 and layout.dp % deployment.nodes == 0:
        local = layout.dp // deployment.nodes
        words = ["--data-parallel-size-local", str(local), "--data-parallel-address", head]
        words += ["--data-parallel-rpc-port", str(_DP_PORT)]
        start = f"$(({rank} * {local}))" if not rank.isdigit() else str(int(rank) * local)
        return [*words, "--headless", "--data-parallel-start-rank", start] if worker else words
    words = ["--nnodes", nodes, "--node-rank", rank, "--master-addr", head, "--master-port", str(_MASTER_PORT)]
    return [*words, "--headless"] if worker else words


def _numeric_ranks(options: Sequence[str], rank: str | None) -> list[str]:
    """Options as the engine will see them: a placeholder of the rank is a number by then."""
    return ["0" if rank is not None and rank in option else option for option in options]


def launch_notes(deployment: Deployment) -> list[str]:
    """What the operator should know: where recipes disagree, what to expect, what to check."""
    layout, gpu, engine = deployment.footprint.layout, deployment.gpu, deployment.engine
    notes = []
    if gpu.arch == "sm90":
        notes.append(
            "Recipes disagree on the cache on Hopper: vLLM's stores it in FP8, SGLang's cookbook in BF16 (it measured "
            f"FP8 slower there); this plan uses {deployment.footprint.cache.latent}."
        )
    if deployment.drafts:
        notes.append(
            f"Recipes disagree on draft tokens: the model card and vLLM say 5 (up to 7), SGLang 5 for latency, 3 by "
            f"default, 1 under load; this plan uses {deployment.drafts}. Measure the acceptance length on your own "
            "prompts: random prompts give anything from 1.6 to 6 for 5 drafts."
        )
        if engine == "vllm":
            notes.append("Check answers with drafts on before traffic: early vLLM versions lost accuracy with them.")
    if engine == "sglang" and layout.dp > 1:
        notes.append("Older recipes spell --attn-dp-size as --dp-size with --enable-dp-attention, now deprecated.")
    if layout.pp > 1:
        first = ", ".join(str(cut) for cut in layout.cuts)
        notes.append(
            f"Stages start at layers {first}: each owns an indexer, so no stage waits for another's choice of tokens."
        )
    if deployment.nodes > 1:
        notes.append(
            f"Set HEAD_ADDRESS to the first machine's address on every machine, and the NCCL and GLOO network "
            f"interfaces; start all {deployment.nodes} machines together."
        )
    notes.append(
        "A first start takes 6 to 25 minutes: weights are read and kernels compiled. Ready means one completed answer."
    )
    notes.append("The server listens on this machine only, without keys: put a gateway with keys in front.")
    return notes

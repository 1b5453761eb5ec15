"""The gateway's one TOML file: strict keys, frozen objects, errors that name the key. Torch-free.

    [gateway]  [store]  [upstreams.NAME]  [models.ALIAS]  [[routes]]  [paths]
    [data_classes.NAME]  [experiments.NAME]  [keys.NAME]  [teams.NAME]

`docs/reference/gateway.md` is generated from these classes: a field's description is its documentation.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from freehold.errors import ConfigError
from freehold.gateway.call import Effort
from freehold.gateway.canary.windows import METRICS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=128)]
Speaks = Literal["chat", "completions", "responses", "messages", "embeddings"]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Dollars = Annotated[float, Field(ge=0)]
MAX_OUTPUT_TOKENS = 32_768  # of an alias that names no limit: a long chain of reasoning and its answer


class Section(BaseModel):
    """Every table of the file: unknown keys are errors, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Gateway(Section):
    """The gateway itself. `host`, `port`, `data_dir` and the admin key change only with a restart."""

    host: str = Field("127.0.0.1", description="Address to bind; another than loopback needs keys.")
    port: int = Field(8080, ge=0, le=65535, description="0: any free port.")
    data_dir: Path = Field(Path("freehold-gateway"), description="Database, audit log, secrets; made with mode 0700.")
    air_gapped: bool = Field(False, description="Refuse every upstream that is not on a private or loopback address.")
    drain_seconds: Seconds = Field(30.0, description="How long running calls may take to end after SIGTERM.")
    max_body_bytes: int = Field(33_554_432, gt=0, description="Larger requests get 413.")
    max_answer_bytes: int = Field(
        67_108_864, gt=0, description="Of an answer that is not streamed; a larger one is an error."
    )
    admin_key_env: str = Field("", description="Environment variable with the admin key; no key, no admin API.")
    admin_key_file: Path | None = Field(None, description="File with the admin key.")
    metrics: Literal["loopback", "admin"] = Field(
        "loopback",
        description=(
            "Who may read /metrics: loopback, any program on this machine, and others with the admin key; admin, only "
            "who has that key."
        ),
    )
    sample_prompts: Share = Field(0.0, description="Share of calls whose text is kept; 0: none.")
    redact: str = Field("", description="`module:function` that is given each text before it is kept.")

    @model_validator(mode="after")
    def _metrics_have_a_key(self) -> Self:
        if self.metrics == "admin" and not (self.admin_key_env or self.admin_key_file):
            raise ValueError('metrics = "admin" needs admin_key_env or admin_key_file')
        return self


class Store(Section):
    """Where rows, keys, budgets and experiments are kept. Changes only with a restart."""

    kind: Literal["sqlite", "postgres"] = Field(
        "sqlite", description="A file in `data_dir`, or a PostgreSQL that several gateways share."
    )
    dsn_env: str = Field("", description="Environment variable with the PostgreSQL address.")
    flush_ms: Annotated[int, Field(gt=0, le=200)] = Field(
        100, description="Rows reach the disk at most so many milliseconds later."
    )
    retention_days: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Rows of that age are deleted, with their notes; not given: they stay."
    )


class Timeouts(Section):
    """Seconds, of one attempt."""

    connect: Seconds = Field(3.0, description="For the connection.")
    first_byte: Seconds = Field(120.0, description="For the first byte of the answer.")
    between_chunks: Seconds = Field(60.0, description="For each further piece of it.")
    total: Seconds = Field(1800.0, description="For all of it.")


class Health(Section):
    """Probes. Engines have them; an upstream with `engine = "api"` only where this table is given."""

    path: str = Field("/health", description="Asked for at the upstream's root; 2xx is healthy.")
    every: Seconds = Field(5.0, description="Seconds between two probes.")
    failures: int = Field(
        3, gt=0, description="So many in a row eject a replica; a good answer and a generation bring it back."
    )
    warm_up_seconds: Seconds = Field(
        120.0, description="How long a reload waits for the first generation of an upstream that is new in it."
    )


class Breaker(Section):
    """Keeps calls away from a replica whose calls fail."""

    failures: int = Field(5, gt=0, description="So many in a row open the circuit.")
    open_seconds: Seconds = Field(10.0, description="How long it is open; then one call is let through.")


class Prices(Section):
    """USD a million tokens."""

    input: Dollars = Field(0.0, description="Of tokens of the prompt.")
    cached_input: Dollars | None = Field(None, description="Of those among them that were cached; not given: as input.")
    output: Dollars = Field(0.0, description="Of generated tokens, reasoning included.")


class UpstreamModel(Section):
    """A model that the upstream has, by the upstream's name for it."""

    prices: Prices = Field(Prices(), description="What it costs.")
    weights: str = Field(
        "", description="Digest of the weights, for the ledger; a new one asks for a generation first."
    )
    licence: str = Field("", description="Shown by `freehold gateway check`.")


class Upstream(Section):
    """An engine or an API: one address, or several that serve the same."""

    url: str = Field("", description="Base URL, with /v1.")
    urls: tuple[str, ...] = Field((), description="Of several replicas, instead of url.")
    speaks: tuple[Speaks, ...] = Field(("chat", "completions"), description="Wire formats it knows.")
    engine: Literal["freehold", "vllm", "sglang", "llamacpp", "api"] = Field(
        "api", description="What it is: whether it is probed, and how its metrics and its efforts are called."
    )
    key_env: str = Field("", description="Environment variable with the key it wants.")
    key_file: Path | None = Field(None, description="File with that key.")
    auth: Literal["bearer", "x-api-key", "none"] = Field("bearer", description="How the key is sent.")
    models: dict[Name, UpstreamModel] = Field(default_factory=dict, description="What it serves.")
    provider: str = Field("", description="Who runs it, for the policy; empty: ourselves.")
    region: str = Field("", description="Where it runs, for the policy.")
    data_classes: tuple[str, ...] = Field((), description="Classes of data it may be sent; unclassed data always may.")
    note: str = Field("", description="Shown by `freehold gateway check`.")
    affinity: bool = Field(
        True, description="A conversation stays on one replica, for its prefix cache, load permitting."
    )
    max_concurrent: int | None = Field(None, gt=0, description="Calls at once, over all of its replicas.")
    timeouts: Timeouts = Field(Timeouts(), description="How long it may take.")
    health: Health = Field(Health(), description="How it is probed.")
    breaker: Breaker = Field(Breaker(), description="When calls are kept away from it.")
    continuous_usage: bool = Field(
        False,
        description="Ask for the usage in every chunk, so that what broke off is counted to the token also where a "
        "chunk has several: vLLM, SGLang and `freehold serve` know it.",
    )
    metrics: bool = Field(False, description="Read /metrics of replicas, to send calls to the least loaded.")

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if bool(self.url) == bool(self.urls):
            raise ValueError("give either url or urls")
        for url in self.replicas:
            if not url.startswith(("http://", "https://")) or "@" in url or "?" in url or "#" in url:
                raise ValueError(f"{url!r} is not a plain http:// or https:// address")
        if self.key_env and self.key_file:
            raise ValueError("give either key_env or key_file")
        return self

    @property
    def replicas(self) -> tuple[str, ...]:
        """Base URLs without a slash at the end."""
        return tuple(url.rstrip("/") for url in (self.urls or (self.url,)))


class Arm(Section):
    """One of the places where an alias may go."""

    name: Name = Field(description="What experiments and the ledger call it.")
    upstream: Name = Field(description="One of `[upstreams]`.")
    model: Name = Field(description="What it is called at the upstream.")
    weight: float = Field(
        1.0,
        ge=0,
        description="Share of the sticky units, among the weights of all arms; an experiment's two arms pool theirs.",
    )
    effort: Effort | None = Field(None, description="Replaces the effort a request asks for.")


class Model(Section):
    """An alias: what clients ask for."""

    arms: tuple[Arm, ...] = Field(min_length=1, description="At least one.")
    fallback: tuple[Name, ...] = Field((), description="Aliases tried when all arms fail before the first byte.")
    max_output_tokens: int = Field(
        MAX_OUTPUT_TOKENS,
        gt=0,
        description=(
            "Limit that upstreams are told for a request that sets none. Not given: they are told so only where a "
            "budget must cover the call; of /v1/completions then 16, that API's own default."
        ),
    )
    note: str = Field("", description="Shown by `freehold gateway check`.")

    @property
    def output_limit(self) -> int | None:
        """`max_output_tokens` if the settings give it, also where they give the default."""
        return self.max_output_tokens if "max_output_tokens" in self.model_fields_set else None


class When(Section):
    """A condition. All that are given must hold; of a list, one."""

    model: tuple[Name, ...] = Field((), description="The alias that was asked for.")
    key: tuple[str, ...] = Field((), description="The name of the caller's key.")
    team: tuple[str, ...] = Field((), description="Its team.")
    header: dict[str, str] = Field(default_factory=dict, description="Lower-case name, exact value.")
    task: tuple[str, ...] = Field((), description="Values of the header x-task.")
    body_bytes_over: int | None = Field(None, description="The body is longer.")
    body_bytes_under: int | None = Field(None, description="The body is shorter.")
    prompt_name: tuple[str, ...] = Field((), description="Of the header x-prompt-name, or of metadata.prompt_name.")
    prompt_version: tuple[str, ...] = Field((), description="Of x-prompt-version, or of metadata.prompt_version.")
    effort: tuple[Effort, ...] = Field((), description='The effort that was asked for; "": none was.')
    data_class: tuple[str, ...] = Field((), description="Of the request, or else of its key.")
    path: Literal["reasoning", "efficiency"] | None = Field(None, description="What the rules of [paths] say.")


class Paths(Section):
    """What tells requests that need a reasoning model from those that do not: `freehold.gateway.routing.paths`."""

    reasoning_tasks: tuple[str, ...] = Field(
        ("agent", "code", "debug", "math", "plan", "proof", "research", "review"),
        description="Values of x-task that need reasoning.",
    )
    efficiency_tasks: tuple[str, ...] = Field(
        ("autocomplete", "classify", "extract", "rewrite", "summarise", "summarize", "tag", "title", "translate"),
        description="Values of x-task that do not.",
    )
    reasoning_words: tuple[str, ...] = Field(
        (
            *(
                "algorithm",
                "analyse",
                "analyze",
                "bug",
                "calculate",
                "compare",
                "debug",
                "derive",
                "design",
                "diagnose",
            ),
            *("explain why", "optimise", "optimize", "plan", "proof", "prove", "refactor", "root cause", "solve"),
            *("step by step", "trade-off", "traceback"),
        ),
        description="Words in the last user message that ask for reasoning; whole words, in any case.",
    )
    long_bytes: int = Field(24_000, gt=0, description="Requests longer than this need reasoning.")
    short_bytes: int = Field(2_000, gt=0, description="Shorter ones that nothing else speaks for do not.")
    many_turns: int = Field(12, gt=0, description="Conversations of more messages than this need reasoning.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        both = set(self.reasoning_tasks) & set(self.efficiency_tasks)
        if both:
            raise ValueError(f"task {min(both)!r} is in reasoning_tasks and in efficiency_tasks")
        if self.short_bytes > self.long_bytes:
            raise ValueError("short_bytes is more than long_bytes")
        return self


class DataClass(Section):
    """Narrows where a class of data may go, beyond the `data_classes` of upstreams."""

    regions: tuple[str, ...] = Field((), description='"eu" is also eu-west and eu-west-1; empty: any.')
    providers: tuple[str, ...] = Field((), description='Of upstreams; "" is ourselves; empty: any.')
    local: bool = Field(False, description="Only upstreams with a private or loopback address, written as such.")
    note: str = Field("", description="Shown by `freehold gateway check`.")


class Route(Section):
    """The first one whose condition holds sends the request to another alias, with another effort."""

    name: Name = Field(description="What the ledger calls it.")
    when: When = Field(When(), description="For which requests; not given: for all.")
    to: Name | None = Field(None, description="The alias to send them to.")
    effort: Effort | None = Field(None, description="Replaces the effort they ask for.")
    mode: Literal["on", "shadow"] = Field("on", description="shadow: only count what it would have saved.")


class Guardrail(Section):
    """Something that the canary must not make worse."""

    metric: str = Field(description="What is compared: one of `freehold.gateway.canary.windows.METRICS`.")
    margin: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="How much worse is accepted: absolute for rates and scores, else relative; the metric's own.",
    )

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"there is no metric {self.metric!r}: {', '.join(METRICS)}")
        return self

    @property
    def accepted(self) -> float:
        """The margin."""
        return METRICS[self.metric].margin if self.margin is None else self.margin


class Judging(Section):
    """A model that scores pairs of answers to the same request: the control's, and the canary's in its shadow."""

    model: Name = Field(description="Alias that judges. Its calls are calls like others: policy, budget, a row each.")
    key_env: str = Field(default="", description="Environment variable with the gateway's key that the judge uses.")
    key_file: Path | None = Field(default=None, description="File with that key.")
    share: Share = Field(default=1.0, description="Of the mirrored calls that are judged; at most one a sticky unit.")
    pairs_per_day: int = Field(default=500, gt=0, description="The key's budget limits it in USD.")
    groundedness: bool = Field(default=False, description="Also ask how well the answer keeps to what it was given.")


class Experiment(Section):
    """A canary: how a second arm of an alias gets its traffic, and what stops it."""

    alias: Name = Field(description="One of `[models]`; each has one experiment at most.")
    control: Name = Field(description="An arm of the alias.")
    canary: Name = Field(description="Another.")
    sticky: Literal["conversation", "user", "key"] = Field(
        "conversation", description="The unit that stays on one arm, and is counted."
    )
    steps: tuple[Share, ...] = Field((0.05, 0.25, 0.5, 1.0), description="Canary's share of the units, ascending.")
    shadow: Share = Field(0.0, description="Share of the control's requests that are mirrored to the canary.")
    guardrails: tuple[Guardrail, ...] = Field(min_length=1, description="At least one.")
    judge: Judging | None = Field(None, description="Scores pairs of answers, for quality and groundedness.")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Chance of a false rollback, over the whole experiment.")
    aa_units: int = Field(0, ge=0, description="A/A first: so many units with both arms the control.")
    warm_up_requests: int = Field(20, ge=0, description="First requests of the canary that are not analysed.")
    min_step_requests: int = Field(200, ge=0, description="Of the canary, before the next step.")
    max_requests: int = Field(4000, gt=0, description="Of the canary; then it is inconclusive.")
    when_inconclusive: Literal["hold", "rollback"] = Field(
        "rollback", description="hold: the canary keeps its share; rollback: it loses it."
    )


class Key(Section):
    """A key of a caller. Others are made with `freehold gateway key new`."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="Of the key, in hex; the key itself is nowhere."
    )
    team: str = Field("", description="One of `[teams]`, whose budget counts too.")
    scopes: tuple[Literal["chat", "completions", "responses", "messages", "embeddings", "feedback"], ...] = Field(
        ("chat", "completions", "responses", "messages", "embeddings", "feedback"), description="What it may ask for."
    )
    models: tuple[Name, ...] = Field((), description="Aliases it may use; empty: all.")
    data_class: str = Field("", description="Class of the data in its prompts.")
    requests_per_minute: int | None = Field(None, gt=0, description="Counted by each gateway on its own.")
    tokens_per_minute: int | None = Field(None, gt=0, description="Input and output; by each gateway on its own.")
    max_concurrent: int | None = Field(None, gt=0, description="Calls at once; by each gateway on its own.")
    budget_per_day: Dollars | None = Field(None, description="USD a UTC day.")


class Team(Section):
    """What keys have in common."""

    budget_per_day: Dollars | None = Field(None, description="USD a UTC day, of all of its keys together.")


class Telemetry(Section):
    """OpenTelemetry; needs the extra `otel`."""

    endpoint: Annotated[str, Field(pattern=r"^(https?://[^@?#]+)?$")] = Field(
        default="", description="Where spans go, by OTLP over HTTP: http://127.0.0.1:4318/v1/traces. Empty: none."
    )


class Settings(Section):
    """Every table of the file."""

    gateway: Gateway = Field(Gateway(), description="Address, data, limits of requests.")
    store: Store = Field(Store(), description="The database.")
    upstreams: dict[Name, Upstream] = Field(min_length=1, description="Engines and APIs. At least one.")
    models: dict[Name, Model] = Field(min_length=1, description="What clients ask for. At least one.")
    routes: tuple[Route, ...] = Field((), description="Rules, in order.")
    paths: Paths = Field(Paths(), description="The reasoning path and the efficiency path.")
    data_classes: dict[Name, DataClass] = Field(default_factory=dict, description="Where classes of data may go.")
    experiments: dict[Name, Experiment] = Field(default_factory=dict, description="Canaries.")
    keys: dict[Name, Key] = Field(default_factory=dict, description="Keys of callers.")
    teams: dict[Name, Team] = Field(default_factory=dict, description="Budgets that keys share.")
    telemetry: Telemetry = Field(Telemetry(), description="Spans.")

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for alias, model in self.models.items():
            for arm in model.arms:
                upstream = self.upstreams.get(arm.upstream)
                if upstream is None:
                    raise ValueError(f"models.{alias}: there is no upstream {arm.upstream!r}")
                if arm.model not in upstream.models:
                    raise ValueError(f"models.{alias}: upstream {arm.upstream!r} has no model {arm.model!r}")
            if len({arm.name for arm in model.arms}) < len(model.arms):
                raise ValueError(f"models.{alias}: two arms have the same name")
            if not any(arm.weight for arm in model.arms):
                raise ValueError(f"models.{alias}: no arm has a weight")
            for other in model.fallback:
                if other not in self.models or other == alias:
                    raise ValueError(f"models.{alias}: fallback {other!r} is not another alias")
        for route in self.routes:
            for name in (*route.when.model, *((route.to,) if route.to else ())):
                if name not in self.models:
                    raise ValueError(f"routes {route.name!r}: there is no model {name!r}")
            if route.to is None and route.effort is None:
                raise ValueError(f"routes {route.name!r}: give to, effort or both")
        if len({route.name for route in self.routes}) < len(self.routes):
            raise ValueError("routes: two have the same name")
        aliases = [each.alias for each in self.experiments.values()]
        for name, each in self.experiments.items():
            if aliases.count(each.alias) > 1:
                raise ValueError(f"experiments.{name}: {each.alias!r} has another experiment; one at a time")
            if each.judge is not None and each.judge.model not in self.models:
                raise ValueError(f"experiments.{name}: there is no model {each.judge.model!r} to judge")
            arms = {arm.name for arm in self.models[each.alias].arms} if each.alias in self.models else set()
            if not {each.control, each.canary} <= arms or each.control == each.canary:
                raise ValueError(f"experiments.{name}: control and canary must be two arms of {each.alias!r}")
            if not each.steps or list(each.steps) != sorted(set(each.steps)) or each.steps[0] <= 0:
                raise ValueError(f"experiments.{name}: steps must rise, from above 0")
        for name, key in self.keys.items():
            unknown = [alias for alias in key.models if alias not in self.models]
            if unknown or (key.team and key.team not in self.teams):
                raise ValueError(f"keys.{name}: there is no {'model ' + unknown[0] if unknown else 'team ' + key.team}")
        return self


def read(path: Path) -> Settings:
    """Read and check the file. Raises ConfigError that names the key and what is wrong with it."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str, name: str = "config") -> Settings:
    """Settings from TOML text. Raises ConfigError."""
    try:
        return Settings.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: it is nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {where + ': ' if where else ''}{first['msg']}") from None
    except ValueError as error:  # of Python's own: a number of thousands of digits
        raise ConfigError(f"{name}: {error}") from None

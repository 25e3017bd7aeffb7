"""The tables of an experiment: frozen, validated, every field with its default and meaning.

Ground floor: imports nothing of the project but its errors and clock.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sim.clock import Span

ARMS: dict[str, str] = {
    "frozen": "the shared base model, trained on nothing: the floor",
    "majority": "the history's most frequent label (classification and rating): what needs no model",
    "shared": "one LoRA a task from disjoint users",
    "rag": "the base model with the BM25 top-k of the history in its prompt",
    "rag_adapter": "the collaborative adapter with the same retrieval",
    "local": "LoRA on the user's real history",
    "local_matched": "the same, with as many optimizer steps as `collaborative`",
    "synthetic_only": "LoRA on the filtered synthetic samples",
    "unfiltered": "LoRA on real and all synthetic samples",
    "unfiltered_matched": "LoRA on real and as many random synthetic samples as `collaborative` accepted",
    "placebo": "LoRA on real and as many accepted samples made for another user",
    "collaborative": "LoRA on real and filtered synthetic samples (CDCDA-PLM)",
    "cloud": "the cloud model answers with the history in its prompt",
}

Reads = Literal["input", "output", "pair"]


def _spans(texts: tuple[str, ...], groups: bool) -> tuple[str, ...]:
    for text in texts:
        if not Span.parse(text).everybody and not groups:
            raise ValueError(f"`{text}`: the cloud's outages meet every device. For a group: network.outages")
    return texts


def _day_hours(hours: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= hour <= 24 for hour in hours) or hours[0] % 24 == hours[1] % 24:
        raise ValueError(f"{list(hours)}: give [from, to], two different hours of the day between 0 and 24")
    return hours


class Section(BaseModel):
    """A frozen table of the experiment; unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Population(Section):
    """Who the users are."""

    source: Literal["world", "lamp"] = Field("world", description="`world` (embedded, synthetic) or `lamp` (files)")
    path: str = Field("", description="folder of LaMP files (one task's, or a parent of several); only for `lamp`")
    split: str = Field(
        "", description="lamp: file prefix (empty: `dev`); world: `evaluation` or `validation` (empty: `evaluation`)"
    )
    users: int = Field(12, ge=1, description="how many users, so devices, each seed draws (disjoint across seeds)")
    tasks: tuple[str, ...] = Field((), description="tasks such as LaMP_4; empty: all that the source has")
    history: tuple[int, int] = Field((4, 8), description="world: least and most history items a user and task")
    queries: int = Field(10, ge=1, description="most queries a user and task")
    min_history: int = Field(3, ge=1, description="users with fewer items (of a task) are excluded and counted")
    max_history: int = Field(0, ge=0, description="train on at most the latest so many items a task; 0: all")
    shared_users: int = Field(48, ge=0, description="disjoint users that the `shared` arm's adapter is trained on")
    replay: bool = Field(
        False, description="rounds deliver later interactions in order of time and ask each query in the round of its "
        "date; false: every round has the history before the first query, and asks all queries"
    )
    arrivals: float = Field(0.5, ge=0, description="world, replay: new interactions a user, task and round")
    round_days: float = Field(30.0, gt=0, description="files, replay: days of a real history that a round stands for")

    @model_validator(mode="after")
    def _consistent(self) -> Population:
        if self.source == "lamp" and not self.path:
            raise ValueError('source = "lamp" needs population.path, a folder with LaMP files')
        if self.history[0] < 1 or self.history[1] < self.history[0]:
            raise ValueError(f"history = {list(self.history)}: give [least, most] with 1 <= least <= most")
        return self


class Model(Section):
    """The on-device base model, frozen."""

    base: str = Field("embedded", description="`embedded`, or any Hugging Face causal LM by name or path")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="of the frozen base; adapters stay float32. auto: bfloat16 on a GPU, float32 on a CPU"
    )


class Lora(Section):
    """The private adapter (PEFT's meaning of every field)."""

    rank: int = Field(8, ge=1, le=1024, description="LoRA rank r")
    alpha: float = Field(16.0, gt=0, description="scaling is alpha / rank (rsLoRA: alpha / sqrt(rank))")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] = Field(("all-linear",), description="module suffixes, or all-linear")
    use_rslora: bool = Field(False, description="rank-stabilised scaling")


class Training(Section):
    """How an adapter is trained on its device (loss on the answer only)."""

    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    epochs: float = Field(4.0, gt=0, description="passes over the device's samples")
    steps: int = Field(0, ge=0, description="optimizer steps; 0: follow epochs")
    batch_size: int = Field(8, ge=1, description="samples a step")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="after warm-up")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, an adapter at a time")
    start: Literal["continue", "anew"] = Field("continue", description="later rounds: go on, or start anew")


class Generation(Section):
    """How a device answers."""

    max_new_tokens: int = Field(0, ge=0, description="0: the task's own limit")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    classify: Literal["generate", "likelihood"] = Field(
        "generate", description="classification and rating: decode freely, or pick the likeliest label"
    )
    rag_items: int = Field(3, ge=1, description="history items in the prompt of the rag arms")


class CloudCapacity(Section):
    """How much the cloud can serve in virtual time, and how a device tries again. The default cloud has no limits."""

    concurrency: int = Field(0, ge=0, description="requests served at once; 0: any number")
    queue: int = Field(-1, ge=-1, description="requests that may wait; -1: any number; beyond: `server_error`")
    prompt_tokens_per_s: float = Field(0.0, ge=0, description="prompt tokens a request reads a second; 0: no time")
    output_tokens_per_s: float = Field(0.0, ge=0, description="tokens a request writes a second; 0: no time")
    requests_per_minute: float = Field(0.0, ge=0, description="accepted for all devices together; 0: any number")
    tokens_per_minute: float = Field(0.0, ge=0, description="prompt and output together, of all devices; 0: any number")
    price_in: float = Field(0.0, ge=0, description="of a million prompt tokens")
    price_out: float = Field(0.0, ge=0, description="of a million output tokens")
    budget: float = Field(0.0, ge=0, description="what a device may spend in the whole run; 0: no limit")
    outages: tuple[str, ...] = Field(
        (), description="when the cloud is down, such as `36h+6h`: from hour 36 of the run, for 6 hours (s, m, h, d)"
    )
    retries: int = Field(8, ge=0, description="attempts after the first, a request")
    backoff_s: float = Field(2.0, gt=0, description="the first wait; it doubles, with jitter; Retry-After is honoured")
    max_backoff_s: float = Field(1800.0, gt=0, description="the longest wait between attempts")

    @field_validator("outages")
    @classmethod
    def _outages(cls, outages: tuple[str, ...]) -> tuple[str, ...]:
        return _spans(outages, groups=False)


class Cloud(Section):
    """The cloud that writes synthetic samples: any OpenAI-compatible chat-completions endpoint."""

    provider: str = Field(
        "world", description="`openai`: an endpoint at base_url. Otherwise the generator that the run itself serves on "
        "loopback: `world`, `recombine`, `transformers`"
    )
    base_url: str = Field("", description="endpoint, such as https://api.openai.com/v1 (provider = openai)")
    model: str = Field("", description="model name at the endpoint; for `transformers`: model name or path")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    samples: int = Field(16, ge=0, description="synthetic samples asked for a user and task")
    samples_per_request: int = Field(8, ge=1, description="larger orders are split into requests of so many")
    show_items: int = Field(16, ge=1, description="most history items shown in a request (latest first)")
    show_chars: int = Field(12000, ge=200, description="most characters of history shown in a request")
    temperature: float = Field(0.8, ge=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: int = Field(2048, ge=16, description="most tokens an answer may have")
    structured: bool = Field(True, description="ask for JSON by schema where the endpoint supports it")
    timeout_s: float = Field(60.0, gt=0, description="a request's time limit")
    max_retries: int = Field(4, ge=0, description="retries of a request after its first attempt")
    concurrency: int = Field(8, ge=1, description="requests in flight at once, a worker")
    cache: str = Field("", description="SQLite file of answers already paid for (may be shared); empty: the run's own")
    knowledge: Literal["none", "pretraining", "full"] = Field(
        "pretraining", description="world: archetypes that the cloud model knows; `full` is an oracle"
    )
    hallucination_rate: float = Field(0.10, ge=0, le=1, description="world: right form, wrong persona")
    off_topic_rate: float = Field(0.05, ge=0, le=1, description="world: samples about something else")
    duplicate_rate: float = Field(0.05, ge=0, le=1, description="world: copies of the user's own items")
    malformed_rate: float = Field(0.03, ge=0, le=1, description="world: broken pairs")
    verbosity: float = Field(0.05, ge=0, le=1, description="world: share of outputs that ramble")
    capacity: CloudCapacity = CloudCapacity()

    @model_validator(mode="after")
    def _endpoint(self) -> Cloud:
        if self.provider == "openai" and not (self.base_url and self.model):
            raise ValueError('provider = "openai" needs cloud.base_url and cloud.model')
        if self.provider != "openai" and self.base_url:
            raise ValueError(
                f'base_url = "{self.base_url}" is for provider = "openai", but provider = "{self.provider}" is served '
                'by the run itself. Set cloud.provider = "openai", or leave base_url empty'
            )
        if self.provider == "transformers" and not self.model:
            raise ValueError('provider = "transformers" needs cloud.model, a causal LM by name or path')
        return self


class SemanticFilter(Section):
    """Is the sample about what this user's samples are about? Cosine to the user's real samples."""

    enabled: bool = Field(True, description="apply this filter")
    reads: Reads = Field("pair", description="what is embedded: input, output or the pair")
    reduce: Literal["mean", "max"] = Field("max", description="over the user's real samples of the task")
    low: float = Field(0.15, ge=-1, le=1, description="least cosine accepted")
    high: float = Field(0.98, ge=-1, le=1, description="greatest cosine accepted (above: a copy)")


class DiversityFilter(Section):
    """Is it new? No near-duplicate of a real or an already accepted sample."""

    enabled: bool = Field(True, description="apply this filter")
    reads: Reads = Field("pair", description="what is embedded: input, output or the pair")
    max_similarity: float = Field(0.9, ge=-1, le=1, description="greatest cosine to a real or accepted sample")


class LengthFilter(Section):
    """Is it as long as what the user writes? Words relative to the median of the user's own."""

    enabled: bool = Field(True, description="apply this filter")
    reads: Reads = Field("output", description="whose words are counted: input, output or the pair")
    low: float = Field(0.4, ge=0, description="least ratio accepted")
    high: float = Field(2.5, gt=0, description="greatest ratio accepted")


class Filters(Section):
    """What a device keeps of the samples that the cloud wrote for it."""

    order: tuple[str, ...] = Field(("semantic", "diversity", "length"), description="the filters, first to last")
    encoder: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="sentence-transformers model, by name or path"
    )
    semantic: SemanticFilter = SemanticFilter()
    diversity: DiversityFilter = DiversityFilter()
    length: LengthFilter = LengthFilter()


class Network(Section):
    """The devices' links to the cloud, in virtual time. The default link is always up."""

    kind: Literal["always", "onoff", "trace"] = Field(
        "always", description="when a link is up: always; generated spells; what `traces` say"
    )
    availability: float = Field(
        1.0, ge=0, le=1, description="share of time a link is up, in one knob: below 1 it adds on/off spells to any "
        "kind, with gaps of mean_down_s and mean_up_s made to fit"
    )
    mean_up_s: float = Field(1200.0, gt=0, description="onoff: mean length of a spell with a link")
    mean_down_s: float = Field(1200.0, gt=0, description="mean length of a gap")
    distribution: Literal["exponential", "constant", "lognormal"] = Field(
        "exponential", description="of the spells' lengths (lognormal: sigma 1)"
    )
    rhythm: float = Field(0.0, ge=0, le=1, description="onoff: share of the spells that are lost at the quietest hour")
    quiet_hour: float = Field(3.0, ge=0, lt=24, description="the quietest hour of the day")
    wifi_only: bool = Field(False, description="only on Wi-Fi: within wifi_hours, or where state traces say so")
    wifi_hours: tuple[float, float] = Field((19.0, 7.0), description="from and to, hours of the day, about an hour off")
    traces: str = Field("", description="a log or a folder of logs: sabre JSON, Pensieve, mahimahi, FLASH states")
    scale: float = Field(1.0, gt=0, description="factor on every bandwidth")
    downlink_mbps: float = Field(28.8, gt=0, description="Mbit/s; bandwidth logs take its place")
    uplink_mbps: float = Field(10.0, gt=0, description="Mbit/s; beside a log: in its ratio to downlink_mbps")
    rtt_s: float = Field(0.05, ge=0, description="round-trip time; logs with a latency take its place")
    outages: tuple[str, ...] = Field(
        (), description="`36h+6h`: no link from hour 36 for 6 hours; `36h+6h:25%` for a random quarter of the devices, "
        "`36h+6h:0-99` for those numbers"
    )
    ask_within_h: float = Field(1.0, ge=0, le=24, description="devices ask at a random moment of a round's first hours")
    fallback: Literal["real_data", "wait", "stale_samples"] = Field(
        "real_data", description="when asking fails, until samples come: train on real data, wait, or train on the "
        "last samples that came"
    )

    @field_validator("outages")
    @classmethod
    def _outages(cls, outages: tuple[str, ...]) -> tuple[str, ...]:
        return _spans(outages, groups=True)

    @field_validator("wifi_hours")
    @classmethod
    def _hours(cls, hours: tuple[float, float]) -> tuple[float, float]:
        return _day_hours(hours)

    @model_validator(mode="after")
    def _traces(self) -> Network:
        if self.kind == "trace" and not self.traces:
            raise ValueError('kind = "trace" needs network.traces, a log or a folder of logs')
        if self.kind == "always" and self.traces:
            raise ValueError(
                f'traces = "{self.traces}" is not read with kind = "always". Set network.kind to "trace", or to '
                '"onoff" for bandwidth logs beside generated spells'
            )
        return self


class Hardware(Section):
    """The machines, in virtual time; costs are those of `nominal_model`, not of the model that learns here."""

    profiles: tuple[str, ...] = Field(
        ("pixel-8",), min_length=1,
        description="names of the catalogue, one drawn for each device; `name:3` is three times as likely"
    )
    catalogue: str = Field("", description="TOML file with profiles of your own, beside the built-in ones")
    nominal_model: str = Field("Qwen2.5-0.5B", description="the model that a real device would run")
    weight_bits: Literal[4, 8, 16, 32] = Field(16, description="of the frozen base's weights on the device")
    train_when: Literal["always", "idle", "charging", "battery", "schedule", "trace"] = Field(
        "always", description="idle: unused, with battery; charging: unused and plugged in; battery: above "
        "battery_threshold or plugged in; schedule: within train_hours; trace: as network.traces' states say"
    )
    train_hours: tuple[float, float] = Field((22.0, 6.0), description="schedule: from and to, hours of the day")
    battery_threshold: float = Field(0.5, ge=0, lt=1, description="no training on battery below this level")
    queries: Literal["round_end", "day"] = Field(
        "round_end", description="when users ask: after the round's work, or through the day, answered by whatever "
        "adapter is live"
    )

    @field_validator("train_hours")
    @classmethod
    def _hours(cls, hours: tuple[float, float]) -> tuple[float, float]:
        return _day_hours(hours)


class Drift(Section):
    """How users change (world), and when a device asks the cloud and trains again."""

    kind: Literal["none", "gradual", "abrupt", "recurring"] = Field(
        "none", description="world: how users change from one persona to another"
    )
    day: float = Field(10.0, ge=0, description="world: day of the run on which the change begins")
    rate: float = Field(0.05, gt=0, description="gradual: share of the way a day")
    period: float = Field(14.0, gt=0, description="recurring: days of one turn, half of them in each persona")
    size: float = Field(1.0, ge=0, le=1, description="how far the way goes; 1: into another persona altogether")
    share: float = Field(1.0, ge=0, le=1, description="share of the users that change at all")
    jitter_days: float = Field(7.0, ge=0, description="a user's change begins up to so many days later")
    policy: str = Field(
        "every", description="when a device asks and trains again: `every` so many rounds; `never` after its first "
        "time; `on_drift`, when its detector finds its answers worse; `when_online`, as every, but only in rounds with "
        "a link; `budget`, as every, while drift.tokens last"
    )
    every: int = Field(1, ge=1, description="every, budget: rounds from one time to the next")
    stagger: int = Field(
        1, ge=1, description="device i asks for the first time in round i mod stagger, so that an adapter's age is not "
        "the calendar"
    )
    tokens: int = Field(0, ge=0, description="budget: cloud tokens, read and written, that a device may spend")
    detector: Literal["adwin", "page_hinkley"] = Field(
        "adwin", description="on_drift: watches how wrong the device's answers were, as its user corrected them"
    )
    false_alarms: float = Field(
        0.2, gt=0, lt=1, description="on_drift: share of devices whose user did not change that may raise an alarm"
    )
    samples: Literal["refresh", "keep", "age"] = Field(
        "refresh", description="synthetic samples of earlier rounds: dropped, kept, or kept for max_age rounds"
    )
    max_age: int = Field(7, ge=1, description="age: most rounds that a synthetic sample is used")


class Strategy(Section):
    """The Flower strategy: who takes part, what is shared, how it is aggregated."""

    name: str = Field("private", description="`private`: nothing is shared")


class Engine(Section):
    """How the simulation runs on this machine; changes the speed, never the numbers."""

    workers: int = Field(0, ge=0, description="worker processes; 0: one a core (one where there is a GPU)")
    hosts: int = Field(0, ge=0, description="Flower nodes; 0: one a worker")
    threads: int = Field(0, ge=0, description="torch threads a worker; 0: the cores divided by the workers")
    memory_gib: float = Field(
        0.0, ge=0, description="a worker's budget for a cohort; 0: its part of half of what is free"
    )
    cohort: int = Field(0, ge=0, description="most adapters trained together; 0: what the budget allows")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    shard: int = Field(256, ge=1, description="most devices a worker handles at once: bounds a host's memory")
    strict: bool = Field(False, description="stop at the first worker that dies, instead of retrying its devices")
    deadline_s: float = Field(3600.0, gt=0, description="longest a worker may go without getting on")
    cache: str = Field(
        "", description="folder that keeps adapters and embeddings, so that no run makes again what another one made; "
        "empty: none"
    )


class Evaluation(Section):
    """How arms are compared (paired, over users)."""

    margin: float = Field(0.02, ge=0, description="non-inferiority margin on the primary metric")
    resamples: int = Field(10_000, ge=100, description="bootstrap and permutation resamples")


class ArmSettings(Section):
    """Hyper-parameters of one arm that differ from the common ones: `[by_arm.local.training] learning_rate = 1e-3`."""

    training: dict[str, Any] = Field({}, description="fields of [training]")
    lora: dict[str, Any] = Field({}, description="fields of [lora]")

    @field_validator("training")
    @classmethod
    def _training_known(cls, own: dict[str, Any]) -> dict[str, Any]:
        Training.model_validate(own)
        return own

    @field_validator("lora")
    @classmethod
    def _lora_known(cls, own: dict[str, Any]) -> dict[str, Any]:
        Lora.model_validate(own)
        return own

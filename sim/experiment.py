"""Experiment: the frozen, validated description of a run. TOML in, TOML out; every field says what it means.

Ground floor: imports nothing of the project but its errors. A mistake in an experiment ends in one readable message
that names the field, the value, the rule and the fix (exit code 2).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sim.clock import Span
from sim.errors import UserError

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
    users: int = Field(24, ge=1, description="how many users, so devices, each seed draws (disjoint across seeds)")
    tasks: tuple[str, ...] = Field((), description="tasks such as LaMP_4; empty: all that the source has")
    history: tuple[int, int] = Field((4, 8), description="world: least and most history items a user and task")
    queries: int = Field(10, ge=1, description="most queries a user and task")
    min_history: int = Field(3, ge=1, description="users with fewer items (of a task) are excluded and counted")
    max_history: int = Field(0, ge=0, description="train on at most the latest so many items a task; 0: all")
    shared_users: int = Field(48, ge=0, description="disjoint users that the `shared` arm's adapter is trained on")

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
    epochs: float = Field(6.0, gt=0, description="passes over the device's samples")
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
    samples: int = Field(24, ge=0, description="synthetic samples asked for a user and task")
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


class Strategy(Section):
    """The Flower strategy: who takes part, what is shared, how it is aggregated."""

    name: str = Field("private", description="`private`: nothing is shared")


class Engine(Section):
    """How the simulation runs on this machine; changes the speed, never the numbers."""

    workers: int = Field(0, ge=0, description="worker processes; 0: one a core (one where there is a GPU)")
    hosts: int = Field(0, ge=0, description="Flower nodes; 0: one a worker")
    threads: int = Field(0, ge=0, description="torch threads a worker; 0: the cores divided by the workers")
    memory_gib: float = Field(0.0, ge=0, description="a worker's budget for a cohort; 0: a share of what is free")
    cohort: int = Field(0, ge=0, description="most adapters trained together; 0: what the budget allows")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    shard: int = Field(256, ge=1, description="most devices a worker handles at once: bounds a host's memory")
    strict: bool = Field(False, description="stop at the first worker that dies, instead of retrying its devices")
    deadline_s: float = Field(3600.0, gt=0, description="longest a host may take over one pass")


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


class Experiment(Section):
    """The whole run. Read with `Experiment.read`, written with `to_toml`."""

    name: str = Field("main", description="a name for reports and run directories")
    seeds: tuple[int, ...] = Field((1,), min_length=1, description="each seed draws its own, disjoint users")
    rounds: int = Field(1, ge=1, description="rounds of virtual time; each asks the cloud and trains again")
    arms: tuple[str, ...] = Field(
        ("frozen", "majority", "rag", "local", "local_matched", "unfiltered_matched", "placebo", "collaborative",
         "cloud"),
        min_length=1, description="treatments compared on the same devices: " + ", ".join(ARMS),
    )
    population: Population = Population()
    model: Model = Model()
    lora: Lora = Lora()
    training: Training = Training()
    generation: Generation = Generation()
    cloud: Cloud = Cloud()
    filters: Filters = Filters()
    network: Network = Network()
    hardware: Hardware = Hardware()
    strategy: Strategy = Strategy()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    by_arm: dict[str, ArmSettings] = Field({}, description="hyper-parameters by arm")

    @field_validator("arms")
    @classmethod
    def _arms_known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if arm not in ARMS:
                raise ValueError(unknown("arm", arm, ARMS))
        return tuple(arm for arm in ARMS if arm in arms)

    @field_validator("by_arm")
    @classmethod
    def _by_arm_known(cls, by_arm: dict[str, ArmSettings]) -> dict[str, ArmSettings]:
        for arm in by_arm:
            if arm not in ARMS:
                raise ValueError(unknown("arm", arm, ARMS))
        return by_arm

    @field_validator("seeds")
    @classmethod
    def _seeds_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds = {list(seeds)}: give distinct integers, none negative")
        return seeds

    @classmethod
    def read(cls, path: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> Experiment:
        """Reads a TOML file (none: the default experiment) and applies dotted overrides such as `lora.rank=4`.

        Raises UserError naming the file or override, the field, the value, the rule and the nearest known key.
        """
        where, data = "the default experiment", {}
        if path is not None:
            where = str(path)
            try:
                data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise UserError(f"{path}: no such experiment file. `untether experiment show` prints one.") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
                raise UserError(f"{path}: not a TOML file: {error}") from None
        for key, text in (overrides or {}).items():
            _assign(data, key, parse_value(cls, key, text))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(_explain(error, where)) from None

    def for_arm(self, arm: str) -> tuple[Lora, Training]:
        """The LoRA and training settings of one arm, with `by_arm` applied."""
        own = self.by_arm.get(arm, ArmSettings())
        return (
            Lora.model_validate({**self.lora.model_dump(), **own.lora}),
            Training.model_validate({**self.training.model_dump(), **own.training}),
        )

    def to_toml(self, comments: bool = False) -> str:
        """The resolved experiment as TOML; with `comments`, each field followed by its meaning."""
        document = tomlkit.document()
        _write(document, self, comments)
        return tomlkit.dumps(document)


def unknown(what: str, value: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """One message for every unknown name: the value, the nearest known one, all known ones."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"unknown {what} `{value}`.{hint} Known: {', '.join(names)}"


def fields(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every field of the experiment as (dotted name, default, meaning), sections opened up."""
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True)
            yield f"{prefix}{name}", list(default) if isinstance(default, tuple) else default, info.description or ""


def parse_value(model: type[BaseModel], key: str, text: Any) -> Any:
    """A `--set` or run-config text as a value: TOML where it parses as TOML, else the text; lists may be a,b,c."""
    if not isinstance(text, str):
        return text
    annotation = _annotation_of(model, key)
    wants_list = get_origin(annotation) is tuple
    if annotation is str:
        stripped = text.strip()
        return stripped[1:-1] if len(stripped) > 1 and stripped[0] == stripped[-1] == '"' else text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if wants_list and not isinstance(value, list):
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        value = [parse_plain(part) for part in parts]
    return value


def parse_plain(text: str) -> Any:
    """One item of a comma-separated list: an integer or float where it is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _annotation_of(model: type[BaseModel], key: str) -> Any:
    annotation: Any = model
    for part in key.split("."):
        section = _section(annotation)
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
    return annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Annotated, Union):
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {key}: `{part}` is a value, not a section")
    data[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            lines.append(f"{path}: {unknown('key', str(item['loc'][-1]), known)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], (dict, BaseModel)) else f" (got {item['input']!r})"
            lines.append(f"{path}: {message}{value}" if path else message + value)
    return f"{where} is not a valid experiment:\n  " + "\n  ".join(lines)


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `place` may have."""
    if place[:1] == ("by_arm",):
        if len(place) == 2:
            return list(ArmSettings.model_fields)
        place = place[2:]  # an arm's own tables are those of the experiment
    section: type[BaseModel] = Experiment
    for part in place:
        section = _section(section.model_fields[str(part)].annotation) or section
    return list(section.model_fields)


def _write(table: Any, model: BaseModel, comments: bool) -> None:
    sections = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel) or name == "by_arm":
            sections.append((name, value))
            continue
        item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
        if comments and info.description:
            item.comment(info.description)
        table.add(name, item)
    for name, value in sections:
        inner = tomlkit.table()
        if isinstance(value, BaseModel):
            if comments and type(value).__doc__:
                inner.add(tomlkit.comment(" ".join(type(value).__doc__.split())))
            _write(inner, value, comments)
        else:
            if not value:
                continue
            for arm, settings in value.items():
                inner.add(arm, {k: v for k, v in settings.model_dump().items() if v})
        table.add(name, inner)

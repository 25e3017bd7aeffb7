"""The tables of an experiment: frozen, validated, every field with its default and meaning.

Those of its virtual time are in `sim.experiment.virtual_sections`.
"""

from __future__ import annotations

import math
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from untether.sim.core.errors import unknown
from untether.sim.core.kinds import METRICS
from untether.sim.core.learning import ALL_LINEAR, LoraSpec, RateSchedule, TrainSettings
from untether.sim.core.records import Reads
from untether.sim.experiment.endpoint import check_key_name, check_url
from untether.sim.experiment.section import Section
from untether.sim.experiment.virtual_sections import CloudCapacity

NOW, SYSTEM = "strftime_now", "system_prompt"
"""Template arguments with a meaning of their own: the day that `strftime_now` tells, and the text of a system turn."""

_NOT_ARGUMENTS = frozenset((
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
))  # fmt: skip
"""What transformers' `apply_chat_template` is told by whoever asks, never by an experiment."""


def check_template_args(given: dict[str, Any]) -> dict[str, Any]:
    """Checks arguments of a chat template (see `sim.prompts.chat_template`) and returns them.

    Raises:
        ValueError: One cannot be such an argument; the message has the fix.
    """
    for name, value in given.items():
        if not name.isidentifier() or name in _NOT_ARGUMENTS:
            raise ValueError(f"{name!r} cannot be set: give variables that the chat template reads (date_string, ...)")
        if name == SYSTEM and not isinstance(value, str):
            raise ValueError(f"{SYSTEM} = {value!r}: give the system turn's text")
        if not _plain(value):
            raise ValueError(f"{name} = {value!r}: give text, a number, true, false, or lists and tables of these")
    try:
        date.fromisoformat(given.get(NOW, "2024-07-26"))
    except (TypeError, ValueError):
        raise ValueError(f'{NOW} = {given[NOW]!r}: give the day that it tells, such as "2024-07-26"') from None
    return given


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _plain(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


TemplateArgs = Annotated[dict[str, Any], AfterValidator(check_template_args)]


class PopulationSection(Section):
    """Who the users are."""

    source: str = Field(
        "world", description="`world` (embedded, synthetic), `lamp` (files), `jsonl` (a line an interaction) or "
        "`nodes` (a deployment: each node has its own user's data)"
    )
    path: str = Field(
        "", description="lamp: folder of files (one task's, or a parent of several); jsonl: a file, or a folder of them"
    )
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
    skip_users: int = Field(
        0, ge=0, description="files: users passed over before the first is drawn, such as those that are evaluated"
    )
    replay: bool = Field(
        False, description="rounds deliver later interactions in order of time and ask each query in the round of its "
        "date; false: every round has the history before the first query, and asks all queries"
    )
    arrivals: float = Field(0.5, ge=0, description="world, replay: new interactions a user, task and round")
    round_days: float = Field(30.0, gt=0, description="files, replay: days of a real history that a round stands for")

    only: int = Field(
        -1, ge=-1, description="a deployed node: the device whose user these data are of; -1: they are of all devices"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PopulationSection:
        if self.source == "lamp" and not self.path:
            raise ValueError('source = "lamp" needs population.path, a folder with LaMP files')
        if self.source == "jsonl" and not self.path:
            raise ValueError('source = "jsonl" needs population.path, a .jsonl file or a folder of them')
        if self.history[0] < 1 or self.history[1] < self.history[0]:
            raise ValueError(f"history = {list(self.history)}: give [least, most] with 1 <= least <= most")
        return self


class TaskSection(Section):
    """A task of one's own, for data in JSON lines: how it is asked and scored."""

    name: str = Field("", pattern=r"^([A-Za-z]\w*)?$", description="what data call it, such as `replies`; empty: none")
    title: str = Field("", description="its name in reports; empty: `name`")
    instruction: str = Field("{content}", description="what the model is asked; `{content}` is the line's input")
    kind: Literal["text", "label", "rating"] = Field("text", description="what is answered")
    labels: tuple[str, ...] = Field((), description="label: the closed answers; rating: the stars (empty: 1 to 5)")
    metric: str = Field("", description="what tests are made on; empty: rouge1, accuracy or mae, by kind")
    max_new_tokens: int = Field(48, ge=1, description="longest answer, in tokens")

    @model_validator(mode="after")
    def _askable(self) -> TaskSection:
        if self.instruction.count("{content}") != 1:
            raise ValueError(f"instruction = {self.instruction!r}: must hold {{content}} once, where the input goes")
        if self.kind == "label" and len(set(self.labels)) < 2:
            raise ValueError(f'kind = "label" needs two labels or more, and labels = {list(self.labels)}')
        if self.kind == "text" and self.labels:
            raise ValueError('labels are for kind = "label" and "rating". Leave them empty')
        if self.metric and self.metric not in METRICS:
            raise ValueError(unknown("metric", self.metric, METRICS))
        return self


class Model(Section):
    """The on-device base model, frozen."""

    base: str = Field("embedded", description="`embedded`, or any Hugging Face causal LM by name or path")
    dtype: Literal["auto", "fastest", "float32", "mixed", "bfloat16", "float64"] = Field(
        "auto", description="of the frozen base; adapters stay float32. auto: bfloat16 on a GPU, float32 on a CPU. "
        "mixed: float32, but products with the base's layers, and the encoder, in bfloat16. fastest: what this machine "
        "is measured to be faster in, auto or mixed; the run keeps it"
    )
    template_args: TemplateArgs = Field(
        {}, description="what the chat template is given, such as {enable_thinking = true}; also `strftime_now` "
        "(the day that it tells) and `system_prompt`. Unless named: no thinking, and a fixed date"
    )


class Lora(Section):
    """The private adapter (PEFT's meaning of every field)."""

    rank: int = Field(LoraSpec.rank, ge=1, le=1024, description="LoRA rank r")
    alpha: float = Field(LoraSpec.alpha, gt=0, description="scaling is alpha / rank (rsLoRA: alpha / sqrt(rank))")
    dropout: float = Field(LoraSpec.dropout, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] = Field((ALL_LINEAR,), description="module suffixes, or all-linear")
    use_rslora: bool = Field(LoraSpec.use_rslora, description="rank-stabilised scaling")


class Training(Section):
    """How an adapter is trained on its device (loss on the answer only). Other bases have other defaults than the
    embedded one, whose these are (docs/models.md).
    """

    learning_rate: float = Field(TrainSettings.learning_rate, gt=0, description="peak learning rate of AdamW")
    epochs: float = Field(TrainSettings.epochs, gt=0, description="passes over the device's samples")
    steps: int = Field(TrainSettings.steps, ge=0, description="optimizer steps; 0: follow epochs")
    batch_size: int = Field(TrainSettings.batch_size, ge=1, description="samples a step")
    schedule: RateSchedule = Field(TrainSettings.schedule, description="after warm-up")
    warmup_ratio: float = Field(
        TrainSettings.warmup_ratio, ge=0, lt=1, description="share of the steps spent warming up"
    )
    weight_decay: float = Field(TrainSettings.weight_decay, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(
        TrainSettings.max_grad_norm, gt=0, description="gradient clipping, an adapter at a time"
    )
    start: Literal["continue", "anew", "shared", "on_shared"] = Field(
        "continue", description="where a round's training begins: later rounds go on, or start anew; `shared`: from "
        "what the strategy shares; `on_shared`: on top of that, which stays as it is"
    )

    @property
    def needs_shared(self) -> bool:
        """Whether training begins with what the strategy shares."""
        return self.start in ("shared", "on_shared")


class Generation(Section):
    """How a device answers."""

    max_new_tokens: int = Field(0, ge=0, description="0: the task's own limit")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    classify: Literal["auto", "generate", "likelihood"] = Field(
        "auto", description="classification and rating: decode freely, or pick the likeliest label. auto: likelihood, "
        "but for the embedded model, which knows the labels"
    )
    rag_items: int = Field(3, ge=1, description="history items in the prompt of the rag arms")


_OF = {
    "template_args": ("transformers", "llama_cpp"), "dtype": ("transformers",),
    "threads": ("transformers", "llama_cpp"), "batch": ("transformers", "llama_cpp"), "context": ("llama_cpp",),
    "recording": ("recorded",), "otherwise": ("recorded",),
}  # fmt: skip
"""Fields of some providers only, and whose they are."""


class CloudSection(Section):
    """The cloud that writes synthetic samples: any OpenAI-compatible chat-completions endpoint."""

    provider: str = Field(
        "world", description="`openai`: an endpoint at base_url. Otherwise the generator that the run itself serves on "
        "loopback: `world`, `recombine`, `transformers`, `llama_cpp`, `recorded`"
    )
    base_url: str = Field("", description="endpoint, such as https://api.openai.com/v1 (provider = openai)")
    model: str = Field(
        "", description="model name at the endpoint; transformers: a causal LM by name or path; llama_cpp: a name of "
        "`untether model list`, or a GGUF file"
    )
    template_args: TemplateArgs = Field(
        {}, description="transformers, llama_cpp: what the model's chat template is given (see model.template_args)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="transformers: of the weights. auto: bfloat16 on a GPU, float32 on a CPU"
    )
    threads: int = Field(0, ge=0, description="transformers, llama_cpp: threads of the model; 0: a choice of its own")
    batch: int = Field(0, ge=0, description="transformers, llama_cpp: requests answered together; 0: 8, and 2")
    recording: str = Field("", description="recorded: the file of `untether cloud record` to answer from")
    otherwise: str = Field(
        "", description="recorded: the provider that answers what is not in the file; empty: that is an error"
    )
    context: int = Field(0, ge=0, description="llama_cpp: most tokens of a request and its answer; 0: 4096")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key: ..._API_KEY, UNTETHER_... or HF_TOKEN; "
        "empty: send none"
    )
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
    def _endpoint(self) -> CloudSection:
        check_key_name(self.api_key_env)
        check_url(self.base_url)
        if self.provider == "openai" and not (self.base_url and self.model):
            raise ValueError('provider = "openai" needs cloud.base_url and cloud.model')
        if self.provider != "openai" and self.base_url:
            raise ValueError(
                f'base_url = "{self.base_url}" is for provider = "openai", but provider = "{self.provider}" is served '
                'by the run itself. Set cloud.provider = "openai", or leave base_url empty'
            )
        for name, of in _OF.items():
            asked = {self.provider, self.otherwise} - {""}
            replayed = self.provider == "recorded" and name not in ("recording", "otherwise")  # it may be theirs
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and not replayed and not asked & set(of):
                whose = " and ".join(f'"{provider}"' for provider in of)
                raise ValueError(f'{name} is for provider = {whose}, and this is "{self.provider}". Leave it out')
        if self.provider == "recorded" and not self.recording:
            raise ValueError('provider = "recorded" needs cloud.recording, a file of `untether cloud record`')
        if self.otherwise in ("openai", "recorded"):
            raise ValueError(
                f'otherwise = "{self.otherwise}": name a provider that the run itself serves, such as "recombine" or '
                '"llama_cpp"'
            )
        if "transformers" in (self.provider, self.otherwise) and not self.model:
            raise ValueError('provider = "transformers" needs cloud.model, a causal LM by name or path')
        if "llama_cpp" in (self.provider, self.otherwise) and not self.model:
            raise ValueError(
                'provider = "llama_cpp" needs cloud.model, a name of `untether model list` or the path of a GGUF file'
            )
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


class AdversarialFilter(Section):
    """Would a classifier take it for real? A logistic regression on embeddings learns to tell real samples, of this
    user and of `population.shared_users` others, from this user's synthetic ones; each is judged by one that did not
    see it.
    """

    enabled: bool = Field(True, description="apply this filter where `order` names it")
    reads: Reads = Field("pair", description="what is embedded: input, output or the pair")
    low: float = Field(0.1, ge=0, le=1, description="least share of real samples that look no more real than it")
    folds: int = Field(4, ge=2, description="parts of both kinds; each is judged by a classifier of the others")


class SelfConsistencyFilter(Section):
    """Does the cloud say the same again? It is asked the synthetic input, with the history in the prompt."""

    enabled: bool = Field(True, description="apply this filter where `order` names it")
    low: float = Field(
        0.5, ge=0, le=1, description="least agreement of both outputs that is accepted: the task's primary metric, of "
        "stars the share of four that they are not apart"
    )


class HumanFilter(Section):
    """What the user says of it: decisions of `untether review`, or the world's user, who knows their own answers."""

    enabled: bool = Field(True, description="apply this filter where `order` names it")
    decisions: str = Field("", description="decisions of `untether review RUN`, a JSONL file; empty: the world's user")
    undecided: Literal["accept", "reject"] = Field("accept", description="what becomes of samples nobody decided on")
    error_rate: float = Field(0.05, ge=0, le=1, description="world: share of the user's decisions that are wrong")


class Filters(Section):
    """What a device keeps of the samples that the cloud wrote for it."""

    order: tuple[str, ...] = Field(
        ("semantic", "diversity", "length"),
        description="the filters, first to last; also `adversarial`, `self_consistency`, `human`"
    )
    encoder: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="sentence-transformers model, by name or path"
    )
    semantic: SemanticFilter = SemanticFilter()
    diversity: DiversityFilter = DiversityFilter()
    length: LengthFilter = LengthFilter()
    adversarial: AdversarialFilter = AdversarialFilter()
    self_consistency: SelfConsistencyFilter = SelfConsistencyFilter()
    human: HumanFilter = HumanFilter()


class Engine(Section):
    """How the simulation runs on this machine; changes the speed, never the numbers of a device that learns."""

    learners: int = Field(
        0, ge=0, description="devices that really ask, train and answer, drawn from the seed; the others do so in "
        "virtual time alone, with what a learner got; 0: all"
    )

    workers: int = Field(0, ge=0, description="worker processes; 0: one a core (one where there is a GPU)")
    hosts: int = Field(0, ge=0, description="Flower nodes; 0: one a worker")
    threads: int = Field(0, ge=0, description="torch threads a worker; 0: the cores divided by the workers")
    memory_gib: float = Field(
        0.0, ge=0, description="a worker's budget for a cohort; 0: its part of half of what is free"
    )
    cohort: int = Field(0, ge=0, description="most adapters trained together; 0: 32 on a CPU, as the budget allows")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    shard: int = Field(256, ge=1, description="most devices a worker handles at once: bounds a host's memory")
    strict: bool = Field(False, description="stop at the first worker that dies, instead of retrying its devices")
    deadline_s: float = Field(3600.0, gt=0, description="longest a worker may go without getting on")
    cache: str = Field(
        "", description="folder that keeps adapters, embeddings and answers, so that no run makes again what another "
        "one made; empty: none"
    )
    track: tuple[str, ...] = Field(
        (), description="where each round's figures go too: tensorboard, mlflow, wandb, or a plug-in's tracker"
    )

    def learning(self, devices: int) -> int:
        """Returns how many of so many devices learn."""
        return min(self.learners or devices, devices)


class Evaluation(Section):
    """How arms are compared (paired, over clusters of users)."""

    margin: float = Field(
        0.02, ge=0, le=1, description="non-inferiority margin where the primary metric is a share (accuracy, ROUGE)"
    )
    margin_stars: float = Field(
        0.1, ge=0, le=4, description="non-inferiority margin where it is an error in stars (MAE)"
    )
    resamples: int = Field(10_000, ge=100, description="permutations, where there are too many to try them all")


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

"""The one typed configuration of the life cycle: YAML and `key=value` in, frozen models out. Knows no Ray, no tensors.

Each default stands here and nowhere else; the files in `configs/` hold only what differs from them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from medusa.config import DEFAULT_DELTA, DEFAULT_EPSILON, MAX_TEMPERATURE
from pipelines.credentials import without_credentials, without_credentials_in
from pipelines.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"

Share = Annotated[float, Field(ge=0, lt=1)]
Timed = Annotated[int, Field(ge=2)]  # tokens of an answer whose steps are timed: the first comes before any step
PositiveFloat = Annotated[float, Field(gt=0)]
Threshold = Annotated[float, Field(gt=0, le=1)]


def _absolute_folder(text: str) -> str:
    """A folder is named absolutely, because Ray's workers run in folders of their own; other names stay."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.is_dir() else text


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _one_or_several(value: Any) -> Any:
    return (str(value),) if isinstance(value, (str, Path)) else value


def _absolute_source(source: str) -> str:
    return source if "://" in source else str(_absolute(Path(source)))


def _no_uri(path: object) -> object:
    if "://" in str(path):
        raise ValueError("must be a path, on a cluster one that every node mounts, not a URI")
    return path


def _key_hash(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("must be the SHA-256 of a key, 64 hexadecimal digits, as `medusa key new` prints it")
    return text


def _tree_name(tree: object) -> int | str:
    if isinstance(tree, str) and re.fullmatch(r"dynamic(:[1-9]\d*)?", tree):
        return tree
    if isinstance(tree, (int, str)) and not isinstance(tree, bool) and re.fullmatch(r"0*[1-9]\d*", str(tree)):
        return int(tree)
    raise ValueError('must be a number of nodes from 1 (plain), "dynamic" or "dynamic:N"')


NameOrFolder = Annotated[str, AfterValidator(_absolute_folder)]
Source = Annotated[str, Field(min_length=1), AfterValidator(_absolute_source)]
Sources = Annotated[tuple[Source, ...], Field(min_length=1), BeforeValidator(_one_or_several)]
KeyHash = Annotated[str, AfterValidator(_key_hash)]
TreeName = Annotated[int | str, BeforeValidator(_tree_name)]
MountedPath = Annotated[Path, BeforeValidator(_no_uri), AfterValidator(_absolute)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BackboneSection(Section):
    """The model that is sped up. `dtype` is what it decodes in; "auto" is bfloat16."""

    name: NameOrFolder = "smollm2-135m"
    dtype: str = "auto"
    device: str | None = None

    @property
    def decodes_in(self) -> str:
        """`dtype` by the type's own name."""
        return "bfloat16" if self.dtype == "auto" else self.dtype


class HeadsSection(Section):
    """Shape of fresh heads (`train.init_from: none`); null is the default of `medusa.HeadsConfig`.

    Heads that training goes on from have a shape of their own: what is set here and contradicts it is refused.
    `kind` hydra: heads that also read the tokens before their own on the path; no export.
    """

    num_heads: PositiveInt | None = None
    num_layers: PositiveInt | None = None
    lm_heads: Literal["shared", "own"] | None = None
    kind: Literal["medusa", "hydra"] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What is not null."""
        return self.model_dump(exclude_none=True)


class RaySection(Section):
    """Where Ray runs and how the work lies on it.

    `address` null joins the cluster that RAY_ADDRESS names, as it does in a submitted job; without one, and always with
    "local", an in-process Ray starts and ends with the command. "auto" or host:port insist on a cluster.
    `num_cpus` (in-process) are logical: null declares at least 4, so that actors never starve the tasks that feed them.
    `placement` of training workers: PACK on few nodes, SPREAD over many; STRICT_ refuses what is not exactly that.
    `min_workers` lets training go on with any number of workers from this to `train.num_workers` as nodes leave and come
    (looked for every `resize_every_s`); null: always `train.num_workers`. `max_preemptions` announced losses of a node are
    survived beside `train.max_failures` (null: any number). `wait_s`: how long an autoscaler may take to add nodes that a
    stage needs; 0 refuses at once. `measure_on` ({GPU: 1}) are the resources of the task in which calibrate and evaluate
    run and promote compares; null does that in the driver, which may sit on a node without the device.
    """

    address: str | None = None
    num_cpus: PositiveInt | None = None
    object_store_mb: PositiveInt | None = None
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    min_workers: PositiveInt | None = None
    resize_every_s: PositiveFloat = 60.0
    max_preemptions: NonNegativeInt | None = None
    wait_s: Annotated[float, Field(ge=0)] = 0.0
    measure_on: dict[str, PositiveFloat] | None = None


class SelfPromptSection(Section):
    """How many prompts the backbone writes itself, and how (after Magpie, arXiv 2406.08464).

    It continues the chat template's open user turn, sampled, a seed per row. Degenerate turns are dropped, and so is
    one whose character 5-grams have a Jaccard similarity of `max_similarity` or more with those of an earlier one.
    At most `max_tries` × `num` turns are written.
    """

    num: NonNegativeInt = 0
    max_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: NonNegativeInt = 0
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_tries: Annotated[float, Field(ge=1)] = 4.0


class PromptsSection(Section):
    """What is asked. `path` is a file, folder or glob of any common shape, local or a URI (s3://, gs://), or several.

    Without a path they are the `self_prompt.num` that the backbone writes itself; with neither, the built-in ones.
    `calibration_share` of them (the built-in set has its own; of few, one) calibrate the tree and are not trained on. Limits null
    mean all. A prompt that is cut to other `max_turns`, or otherwise edited, is answered anew.
    """

    path: Sources | None = None
    self_prompt: SelfPromptSection = SelfPromptSection()
    limit: PositiveInt | None = None
    calibration_limit: PositiveInt | None = None
    calibration_share: Share = 0.1
    max_turns: PositiveInt = 4


class DistillSection(Section):
    """How the backbone answers; a prompt may carry a temperature, top-p or seed of its own.

    `heads` ("default", "plain", a folder, "none") only speed it up: the text is the same. `tree_nodes` null takes their own tree
    for small batches and plain decoding for large ones, which use the arithmetic that a tree would spend (see
    `answering`); 1 is plain decoding always. `rows_per_file` prompts are answered and committed together, fewer where
    that would leave actors idle. `cpus_per_actor` is Ray's logical share; `threads` are real ones, null divides the
    cores that a process may use among the actors.
    """

    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: NonNegativeInt = 0
    heads: NameOrFolder = "default"
    tree_nodes: PositiveInt | None = None
    num_actors: PositiveInt = 1
    batch_size: PositiveInt = 32
    rows_per_file: PositiveInt = 128
    context_length: PositiveInt = 2048
    cpus_per_actor: PositiveFloat = 0.5
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    threads: PositiveInt | None = None
    retry_errors: bool = False


class TrainSection(Section):
    """How the heads learn (arXiv 2401.10774 §2.2), and with `method: medusa2` the backbone with them.

    MEDUSA-1: a step takes `batch_positions` positions over all workers; hidden states are computed once a row and kept
    on disk while they all fit `cache_quota_gb`, else computed again each epoch. `soft_labels` > 0 mixes the backbone's
    own best so many tokens into each label, with `soft_weight`.
    MEDUSA-2: a step takes `batch_sequences` rows of `sequence_length` packed tokens (a longer answer is a row of its
    own), `sequences_at_once` in a forward; heads learn `lr_ratio` times as fast as the backbone. The defaults are the
    second of two stages, from heads that MEDUSA-1 trained; in one stage: lambda0 0.01, sine, lr_backbone 1e-4.
    `tune`: LoRA against the original's distribution; the whole backbone, or LoRA beside 4-bit weights, against labels.

    The rows are cut into `shards` lanes (null: one per worker); the run is the same function of the data for any number
    of workers that divides them. `init_from`: "default", "plain" or "medusa2" (shipped heads), a checkpoint folder, or "none"
    (fresh heads).
    A run stops where a loss stays above `divergence_ratio` times its lowest median (null: never).
    """

    method: Literal["medusa1", "medusa2"] = "medusa1"
    init_from: NameOrFolder = "default"
    steps: PositiveInt = 1000
    batch_positions: PositiveInt = 1024
    lr_heads: PositiveFloat = 1e-3
    soft_labels: NonNegativeInt = 0
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    cache_quota_gb: Annotated[float, Field(ge=0)] = 8.0
    tune: Literal["lora", "full", "qlora"] = "lora"
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Share = 0.05
    batch_sequences: PositiveInt = 8
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    sequences_at_once: PositiveInt = 1
    lr_backbone: PositiveFloat = 5e-4
    lr_ratio: PositiveFloat = 4.0
    lambda0: PositiveFloat = 0.2
    lambda0_schedule: Literal["constant", "sine"] = "constant"
    warmup_steps: NonNegativeInt = 40
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    divergence_ratio: Annotated[float, Field(gt=1)] | None = 3.0
    chunk_size: PositiveInt = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_workers: PositiveInt = 1
    shards: PositiveInt | None = None
    cpus_per_worker: PositiveFloat = 1.0
    threads: PositiveInt | None = None
    use_gpu: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 2
    holdout_share: Share = 0.05
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 5
    max_failures: NonNegativeInt = 2
    seed: NonNegativeInt = 0

    @property
    def num_lanes(self) -> int:
        return self.shards or self.num_workers


class CalibrateSection(Section):
    """How the tree is chosen: nested trees up to `max_nodes`, the cost of each of `sizes` measured on this device.

    Where weights, answers and settings are as they were, the earlier measurement stands, unless `again`.
    """

    max_nodes: Annotated[int, Field(ge=2)] = 64
    num_ranks: Annotated[int, Field(ge=2)] = 16
    sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64)
    tokens_per_size: Timed = 48
    rounds: PositiveInt = 3
    again: bool = False


def _scheme(text: str) -> str:
    """A decoding scheme in words: "greedy", or "typical@0.7" and "rejection@1": acceptance at a temperature above 0."""
    name, _, temperature = text.partition("@")
    if text == "greedy":
        return text
    try:
        good = name in ("typical", "rejection") and 0 < float(temperature) <= MAX_TEMPERATURE
    except ValueError:
        good = False
    if not good:
        raise ValueError(f'must be "greedy", "typical@T" or "rejection@T", 0 < T <= {MAX_TEMPERATURE:g}')
    return text


SchemeName = Annotated[str, AfterValidator(_scheme)]


class EvaluateSection(Section):
    """What is measured on: prompts never trained or calibrated on, up to `max_turns` of each, fed in order.

    `path` is read as `prompts.path` is; without one they are built-in. Greedy decoding with the checkpoint's own
    tree is always measured; `schemes` and sizes of trees (`nodes`) are measured beside it, each with each.
    `identity_prompts` prompts are decoded again in float32. `text` is a file of human-written text, a paragraph a line, for
    the quality guard of a tuned backbone; null is the built-in one.
    Where checkpoint, prompts and settings are as they were, the earlier report stands, unless `again`.
    """

    path: Sources | None = None
    num_prompts: PositiveInt = 12
    max_turns: PositiveInt = 2
    max_tokens: Timed = 128
    rounds: PositiveInt = 1
    schemes: tuple[SchemeName, ...] = ("greedy",)
    nodes: tuple[PositiveInt, ...] = ()
    identity_prompts: PositiveInt = 4
    text: MountedPath | None = None
    again: bool = False


class RegistrySection(Section):
    """Where runs and versions live. Null URIs mean SQLite and a folder inside the working directory.

    `lock_lease_s`: how long one may take over moving an alias, before others may think it dead and go on.
    """

    tracking_uri: str | None = None
    artifact_uri: str | None = None
    experiment: str = "medusa"
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "medusa-heads"
    lock_lease_s: PositiveFloat = 20.0


class PromoteSection(Section):
    """The gate: a challenger may fall below the champion by these relative margins, no more. Speed is noisier.

    Both are measured as `evaluate` says, side by side. Whether there is a champion or not, a challenger must accept and
    speed up at least `min_acceleration` and `min_speedup`: 1 is plain decoding. `perplexity_margin` bounds what a tuned
    backbone may lose against the original. `version` null promotes the challenger. `lock_timeout_s` should exceed
    `registry.lock_lease_s`: only then is the lock of a process that died ever taken over. `rollback` restores the
    previous champion instead.
    """

    version: PositiveInt | None = None
    acceleration_margin: Share = 0.02
    speedup_margin: Share = 0.10
    perplexity_margin: Share = 0.01
    min_acceleration: PositiveFloat = 1.0
    min_speedup: PositiveFloat = 1.0
    lock_timeout_s: PositiveFloat = 60.0
    force: bool = False
    rollback: bool = False


StageName = Literal["distill", "train", "calibrate", "evaluate", "register", "promote"]


class RunSection(Section):
    """Which part of the life cycle `run` goes through: from stage `first` to stage `last`, both included."""

    first: StageName = "distill"
    last: StageName = "promote"


class ServeSection(Section):
    """What serving needs to know; the serving layer reads it, this layer only carries it.

    A replica follows `alias`: every `follow_s` seconds it looks who bears it (0: never) and serves that. Beside the
    `max_batch_size` requests that run, `max_waiting` may wait, none longer than about `max_wait_s` for others; more are
    refused with 429 at once. A replica whose engine takes `stall_after_s` over one step is replaced. One that stops gives
    its running requests `drain_s` to end. `prefix_cache_tokens` of earlier prompts and answers are kept for prompts that
    begin alike (0: none). `tree` is a number of nodes, "dynamic" or "dynamic:N" (the likeliest nodes for each context), or null
    for the checkpoint's own. With `adaptive_tree`, trees shrink as more requests run, where that is faster; answers of typical
    acceptance, which depend on their tree, keep it. On a GPU decode steps are replayed as CUDA graphs, unless `cuda_graphs` is
    false: then each is launched kernel by kernel.

    `acceptance`, `epsilon` and `delta` hold for requests above temperature 0 that say nothing of them. One request has at
    most `max_choices` answers (prompts × n), takes at most `request_timeout_s`, waiting included, and sends at most
    `max_body_bytes`. Where there are API keys, clients must send one: `api_keys` are their SHA-256 hashes, as
    `medusa key new` prints them, `api_keys_file` has one hash a line and is read again when it changes. Browsers of
    `cors_origins` ("*": any) may ask. `access_log` writes one JSON line a request, without what was asked unless `log_prompts`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    max_batch_size: PositiveInt = 8
    context_length: PositiveInt = 2048
    alias: str = "champion"
    follow_s: Annotated[float, Field(ge=0)] = 30.0
    max_waiting: NonNegativeInt = 64
    max_wait_s: PositiveFloat = 120.0
    stall_after_s: PositiveFloat = 60.0
    drain_s: PositiveFloat = 120.0
    prefix_cache_tokens: NonNegativeInt = 4096
    tree: TreeName | None = None
    adaptive_tree: bool = True
    cuda_graphs: bool = True
    acceptance: Literal["typical", "rejection"] = "typical"
    epsilon: Threshold = DEFAULT_EPSILON
    delta: Threshold = DEFAULT_DELTA
    max_choices: PositiveInt = 16
    max_body_bytes: PositiveInt = 4 * 2**20
    request_timeout_s: PositiveFloat = 570  # below the 600 s of Ray Serve's proxy, whose refusal is plain text
    api_keys: tuple[KeyHash, ...] = ()
    api_keys_file: MountedPath | None = None
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    log_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each stage leaves its product below the working directory; the only place that names these files."""

    root: Path

    @property
    def distilled(self) -> Path:
        """Parquet files of `records.ANSWERS`."""
        return self.root / "distilled"

    @property
    def training(self) -> Path:
        """Ray Train's storage: one folder per training run."""
        return self.root / "training"

    @property
    def hidden(self) -> Path:
        """The backbone's hidden states that training keeps between epochs and runs; may be deleted at any time."""
        return self.root / "hidden"

    @property
    def checkpoint(self) -> Path:
        """The heads being made: written by train, given its tree by calibrate, read by evaluate and register."""
        return self.root / "checkpoint"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def versions(self) -> Path:
        """Registered versions fetched from the registry, one folder each; those not used for a day may go."""
        return self.root / "versions"

    @property
    def tracking_db(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"


class Config(Section):
    """Everything that the life cycle can be told."""

    workdir: MountedPath = Field(default=Path("medusa-work"), validate_default=True)
    backbone: BackboneSection = BackboneSection()
    heads: HeadsSection = HeadsSection()
    ray: RaySection = RaySection()
    prompts: PromptsSection = PromptsSection()
    distill: DistillSection = DistillSection()
    train: TrainSection = TrainSection()
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    registry: RegistrySection = RegistrySection()
    promote: PromoteSection = PromoteSection()
    run: RunSection = RunSection()
    serve: ServeSection = ServeSection()

    @property
    def layout(self) -> Layout:
        return Layout(root=self.workdir)


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Configuration from a YAML file (None: defaults alone) with `section.key=value` laid over it.

    `path` is a file, or the bare name of one that ships in `configs/` ("laptop"). Raises ConfigError, one line,
    naming the file or key, the value and the fix.
    """
    tree = _read_yaml(_find(path)) if path is not None else {}
    for override in overrides:
        _apply(tree, override)
    _refuse_unknown(tree, Config)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back equal, but for passwords in URIs, which are left out."""
    return yaml.safe_dump(without_credentials_in(config.model_dump(mode="json")), sort_keys=False)


def _find(path: Path) -> Path:
    shipped = CONFIGS / f"{path}.yaml"
    if path.is_file():
        return path
    if path.suffix == "" and path.parent == Path() and shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise ConfigError(f"no configuration file at {path}; give a YAML file or one of the shipped names: {known}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path} is not valid YAML, {_place_and_problem(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text; a date that is none
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got a {type(tree).__name__}")
    return tree


def _place_and_problem(error: yaml.MarkedYAMLError) -> str:
    """Without what stands there, which may be a key or a password: PyYAML quotes the line, and names in its problem."""
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1} column {mark.column + 1}: "
    return place + re.sub(r" '[^'<]{2,}'", "", error.problem or error.context or "it does not parse")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Lay one `a.b=value` over `tree`; the value is read as YAML, so 3, true, null and [1, 2] mean what they say."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        named = re.split(r"[^\w.]", override)[0]  # the rest may be a key or a password
        raise ConfigError(f"override {named + ' …'!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a date that is none
        value = text
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        node = child
    node[parts[-1]] = value


def _refuse_unknown(tree: Mapping[str, Any], model: type[Section], prefix: str = "") -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        field = model.model_fields.get(str(key))
        if field is None:
            raise ConfigError(f"unknown configuration key {name!r}{_nearest(name)}")
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            if not isinstance(value, Mapping):
                one = f"{name}.{next(iter(section.model_fields))}"
                raise ConfigError(
                    f"{name} is a section, so give one of its keys, such as {one}; got a value of type {type(value).__name__}"
                )
            _refuse_unknown(value, section, f"{name}.")


def _nearest(name: str) -> str:
    """The known key most like `name`; a key that stands in another section counts as close."""
    known = list(_keys(Config))
    by_leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = by_leaf[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(Config.model_fields)}"


def _keys(model: type[Section], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _describe(item: Any) -> str:
    told = f"{'.'.join(map(str, item['loc']))}: {reason_of(item)}"
    if item["loc"][:2] == ("serve", "api_keys"):  # it may be a key, given in place of its hash
        return told
    return f"{told}, got {without_credentials(repr(item['input']))}"


def reason_of(error: Any) -> str:
    """What pydantic, or a validator of ours, finds wrong with a value, as the end of a sentence."""
    reason = str(error["msg"]).removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]

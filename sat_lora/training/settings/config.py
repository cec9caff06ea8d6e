"""`TrainConfig`: every setting of a run, as frozen values in sections.

The fields are the one source of the command line, of a --config file, of run.json, of docs/options.md, and of what is
refused. None stands for a value that is decided later, as the comment beside it says.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sat_lora.cogvlm.inputs.prompts import PROMPTS
from sat_lora.data.reading import READERS, SHARDS
from sat_lora.data.records.record import IMAGE_MARK
from sat_lora.data.records.registry import RECORDS
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import parse_json
from sat_lora.lora.config import LoraConfig
from sat_lora.printable import printable
from sat_lora.quantization.config import ALL, NAMES, Quantization
from sat_lora.terminal.option_types import (
    accumulation,
    batch,
    count,
    fraction,
    not_negative,
    positive,
    positive_int,
    proportions,
    rate,
    seconds,
    share,
    workers,
)
from sat_lora.training.metrics.generated import GENERATED
from sat_lora.training.metrics.registry import LOSS, METRICS
from sat_lora.training.settings.fields import Known, fields_of, flag, frozen, plain, setting
from sat_lora.training.settings.lora_options import ABOUT, LORA_FIELDS, lora_fields, patterns_of
from sat_lora.training.settings.schedule import DECAY_STYLES, learning_rate_factor, warmup_steps

if TYPE_CHECKING:
    from sat_lora.cogvlm.checkpoints.quantized_files import QuantizationNote

Paths = tuple[str, ...]
BASIC = "what people set"
NONE = "none"
GROUPS = {
    BASIC: "the options that most runs need",
    "model": None,
    "LoRA": ABOUT,
    "data": None,
    "schedule": "--lr and the number of steps matter most",
    "parallelism and memory": "out of memory: checkpoint activations, then ZeRO 3",
    "saving and evaluating": None,
    "checking": "why a backward hangs, or why nothing learns",
    "accepted for compatibility": "of published scripts, without effect",
}
"""The headings of --help in their order, and what stands below them."""


class Origin(Enum):
    """A source of values, in the order in which one beats the next."""

    OPTION = "given as an option"
    FILE = "from the --config file"
    RUN = "from the run to go on with"
    DEEPSPEED = "from the DeepSpeed file"
    RUN_DEFAULT = "as the run to go on with had it"
    BASE = "from the base's config"
    DEMO = "the demo's"
    DEFAULT = "default"


BY_HAND = frozenset({Origin.OPTION, Origin.FILE, Origin.RUN})
HERE = frozenset({Origin.OPTION, Origin.FILE})


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base, and how it reads a sample."""

    from_pretrained: str | None = setting(
        None,
        "SAT or Hugging Face folder of the base (default: the demo's, where sat_lora is a clone)",
        "--from_pretrained",
        group=BASIC,
        metavar="DIR",
    )
    local_tokenizer: str | None = setting(  # then the --from_pretrained folder
        None, "tokenizer folder (default: the --from_pretrained folder)", "--local_tokenizer", metavar="DIR"
    )
    version: str = setting(  # unless the base says another, see `settings_of_base`; so for the length
        "chat", "prompt format of the base, if its config names none", "--version", choices=lambda: PROMPTS
    )
    max_length: int = setting(
        1288,
        "longest sequence in tokens, the image's included; the default of CogVLM2 is 2432, of CogVLM2-Video 2048, of "
        "CogAgent 400",
        "--max_length",
        type=positive_int,
        metavar="N",
    )

    @property
    def base(self) -> str:
        """The folder of the base. Raises ConfigError where none is named."""
        if self.from_pretrained is None:
            raise ConfigError("--from_pretrained: missing; give the base's folder")
        return self.from_pretrained

    @property
    def tokenizer(self) -> str:
        """The folder of the tokenizer, or its name; the base's where none is named."""
        return self.local_tokenizer or self.base


@dataclass(frozen=True, kw_only=True)
class Data:
    """The places of the samples, and which of them count."""

    train_data: Paths | None = setting(
        None,
        "folders of images, files of samples (json, csv, parquet) or .tar shards",
        "--train-data",
        group=BASIC,
        nargs="+",
        metavar="PATH",
    )
    valid_data: Paths | None = setting(  # then a part of --train-data, by --split
        None, "the same, for the validation loss", "--valid-data", group=BASIC, nargs="+", metavar="PATH"
    )
    test_data: Paths | None = setting(  # then nothing is generated after training
        None, "folders or .jsonl, answered after training", "--test-data", group=BASIC, nargs="+", metavar="PATH"
    )
    prompt: str = setting("What is this?", "the query of every image that comes without one of its own", "--prompt")
    split: tuple[float, ...] = setting(
        (1.0,), "train,valid,test shares, of sum 1; without --valid-data", "--split", type=proportions, metavar="A,B,C"
    )
    special_tokens_in_text: bool = flag(
        False, "a text that spells a special token, such as </s>, means it", "--special-tokens-in-text"
    )
    ignore_keys: Paths = setting(
        (), "keys of records and turns to pass over", "--ignore-keys", nargs="+", metavar="KEY"
    )
    images_from: Paths = setting(
        (), "folders that .jsonl lines may lead to by ..", "--images-from", nargs="+", metavar="DIR"
    )
    data_format: str | None = setting(  # then recognised, path by path
        None,
        "the layout of the data, where it is not to be recognised",
        "--data-format",
        choices=lambda: (*READERS, SHARDS, *RECORDS),
    )
    columns: Paths = setting(
        (),
        "keys or columns that are meant, such as prompt=question,answer=text",
        "--columns",
        nargs="+",
        metavar="OURS=THEIRS",
    )
    image_mark: str = setting(
        IMAGE_MARK, 'what stands for an image in a text; "": images come first', "--image-mark", metavar="TEXT"
    )
    images_per_sample: int = setting(
        1,
        "most images of a sample; the published bases were trained with one",
        "--images-per-sample",
        type=positive_int,
        metavar="N",
    )
    loss_on: str = setting(
        "all", "the answers of a conversation that are learnt", "--loss-on", choices=lambda: ("all", "last")
    )
    names_are_answers: bool = flag(
        False, "file names are the answers, whatever texts lie in or beside a folder", "--names-are-answers"
    )
    max_broken_share: float = setting(
        0.05, "the run stops when more of the samples are broken", "--max-broken-share", type=share, metavar="X"
    )
    max_pixels: int = setting(  # where Pillow warns of a decompression bomb
        89_478_485, "a larger picture is a broken sample, not read", "--max-pixels", type=positive_int, metavar="N"
    )
    num_workers: int = setting(2, "processes that read images, per rank", "--num-workers", type=workers, metavar="N")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The settings of a step of AdamW."""

    lr: float = setting(1e-4, "peak learning rate; LoRA wants 1e-4 or more", "--lr", group=BASIC, type=rate)
    clip_grad: float = setting(
        1.0, "largest gradient norm; 0: not clipped", "--clip-grad", type=not_negative, metavar="X"
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay", "--weight-decay", type=not_negative, metavar="X")
    skip_nonfinite: int = setting(
        0, "steps with a NaN or infinity to leave out", "--skip-nonfinite", type=count, metavar="N"
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.95),
        "AdamW's decay rates of its moments",
        accepts=lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_below_one, value)),
        wanted="two numbers below 1",
    )
    eps: float = setting(
        1e-8, "what AdamW adds to a root", accepts=lambda value: _is_below_one(value), wanted="a number below 1"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The number of steps, their samples, and the learning rate at each."""

    train_iters: int | None = setting(  # then --epochs; if that is None too, one epoch
        None, "optimizer steps (default: one epoch)", "--train-iters", group=BASIC, type=positive_int, metavar="N"
    )
    epochs: float | None = setting(
        None, "passes over the data, instead of --train-iters", "--epochs", group=BASIC, type=positive, metavar="N"
    )
    batch_size: int = setting(4, "samples a GPU takes at once", "--batch-size", group=BASIC, type=batch, metavar="N")
    warmup: float = setting(
        0.01, "steps of warm-up; below 1: their share of all steps", "--warmup", type=not_negative, metavar="N"
    )
    lr_decay_style: str = setting(
        "cosine", "how the learning rate falls after it", "--lr-decay-style", choices=lambda: DECAY_STYLES
    )
    min_lr_ratio: float = setting(
        0.0, "the rate falls to this share of --lr", "--min-lr-ratio", type=fraction, metavar="X"
    )
    gradient_accumulation_steps: int = setting(
        1, "batches per optimizer step", "--gradient-accumulation-steps", type=accumulation, metavar="N"
    )
    seed: int = setting(1234, "of the adapters, the data order and dropout", "--seed", type=count, metavar="N")

    def factor(self, step: int, steps: int) -> float:
        """Return the factor in (0, 1] of the peak rate at `step` of `steps`, counted from 0."""
        return learning_rate_factor(
            step,
            total_steps=steps,
            warmup_steps=warmup_steps(self.warmup, steps),
            style=self.lr_decay_style,
            floor=self.min_lr_ratio,
        )

    @property
    def steps(self) -> int:
        """The optimizer steps of the run. Raises ConfigError where its data are not known yet."""
        if self.train_iters is None:
            raise ConfigError("--train-iters: not known before the data are; give it")
        return self.train_iters


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The way in which ranks share model, gradients and optimizer."""

    zero_stage: int = setting(
        2, "DeepSpeed ZeRO stage; 3 shards the base too", "--zero-stage", type=int, choices=lambda: range(4)
    )
    deepspeed_config: str | None = setting(
        None, "DeepSpeed json; an option given here beats it", "--deepspeed_config", metavar="FILE"
    )
    model_parallel_size: int = setting(
        1, "ranks that share one copy of the model", "--model-parallel-size", type=positive_int, metavar="N"
    )
    distributed_backend: str | None = setting(
        None,
        "default: nccl on CUDA, gloo on CPU",
        "--distributed-backend",
        resumed=False,
        choices=lambda: ("nccl", "gloo"),
    )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtype of the base. With neither flag it is bfloat16 on CUDA and float32 on a CPU."""

    bf16: bool = flag(False, "bfloat16 (default on CUDA)", "--bf16", left_to="the machine")
    fp16: bool = flag(False, "float16 with loss scaling, for GPUs without bfloat16", "--fp16", left_to="the machine")


@dataclass(frozen=True, kw_only=True)
class Quantizing:
    """How many bits the weights of the base are held in, and which of them."""

    quantize: str = setting(
        NONE,
        "hold the linears of a whole base in 4.25 or 8.25 bits",
        "--quantize",
        left_to="the base",
        choices=lambda: (NONE, *NAMES),
    )
    quantize_modules: tuple[str, ...] = setting(
        (ALL,), "which of them, in the forms of --target_modules", "--quantize_modules", nargs="+", metavar="NAME"
    )
    keep_modules: tuple[str, ...] = setting(
        (), "what --quantize leaves whole, in the same forms", "--keep_modules", nargs="+", metavar="NAME"
    )
    quantize_partition: bool = flag(
        False,
        "with --zero-stage 3: each data-parallel rank keeps a part of the quantised weights and gathers them for use",
        "--quantize_partition",
    )

    def flat(self) -> dict[str, Any]:
        """Return the values that decide what the weights are, by their names, as JSON has them."""
        names = (source.name for source in fields(self) if source.name != "quantize_partition")
        return {name: plain(getattr(self, name)) for name in names}

    def unheeded(self, given: Collection[str], held: "QuantizationNote | None", base: str) -> list[str]:
        """Return the problems that options among the `given` names say how the base is held, and it is held otherwise:
        patterns where nothing is quantised, and another scheme, `none` or patterns alone where its folder has a scheme.

        held: what the folder of the base says of its weights; None where they are whole.
        """
        is_open = self.quantize == NONE
        patterns = [name for name in ("quantize_modules", "keep_modules") if name in given and is_open]
        names = [name for name in patterns if plain(getattr(self, name)) != DEFAULTS[name]]
        if held is None:
            why = "it says which linears are quantised, and none is; give --quantize nf4 or int8"
            return [f"--{name}: {why}" for name in names]
        why = (
            f"{printable(base)} is quantised already, to {held.quantization}, and holds no other weights; leave the "
            f"option out, or give the base that it was made of, {held.base.title}"
        )
        is_other = "quantize" in given and self.quantize != held.quantization.scheme
        return [f"--quantize: got {self.quantize}, and {why}"] * is_other + [f"--{name}: {why}" for name in names]

    def of(self, lora: LoraConfig) -> Quantization | None:
        """Return the Quantization that a run with these adapters asks for; None where its base stays whole.

        What the config trains whole is not quantised.
        """
        if self.quantize == NONE:
            return None
        return Quantization(
            scheme=self.quantize,
            modules=patterns_of(self.quantize_modules),
            keep_modules=patterns_of(self.keep_modules),
            trained=lora.modules_to_save,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """The choice of layers that are computed again in backward, instead of being kept."""

    checkpoint_activations: bool = flag(False, "recompute the language layers in backward", "--checkpoint-activations")
    vit_checkpoint_activations: bool = flag(
        False, "recompute the ViT layers in backward", "--vit_checkpoint_activations"
    )
    checkpoint_offload: bool = flag(
        False,
        "keep the inputs of recomputed layers in host memory until backward; no effect on a CPU",
        "--checkpoint_offload",
    )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The place of a run's results, and how often it saves, validates and logs."""

    experiment_name: str = setting(
        "finetune", "name of the run; its folder is SAVE/NAME", "--experiment-name", group=BASIC, metavar="NAME"
    )
    save: str | None = setting(None, "folder of the runs (default: runs)", "--save", metavar="DIR")
    save_interval: int = setting(
        200, "steps between saved adapters; 0: at the end only", "--save-interval", type=count, metavar="N"
    )
    keep: int = setting(3, "newest adapters to keep, the best aside; 0: all", "--keep", type=count, metavar="K")
    eval_interval: int = setting(
        200, "steps between validation losses; 0: at the end only", "--eval-interval", type=count, metavar="N"
    )
    eval_iters: int = setting(0, "validation batches per rank; 0: all", "--eval-iters", type=count, metavar="N")
    eval_batch_size: int | None = setting(  # then --batch-size
        None,
        "for validation and --test-data (default: --batch-size)",
        "--eval-batch-size",
        type=batch,
        metavar="N",
    )
    valid_metrics: tuple[str, ...] = setting(
        (), "what a validation measures beside the loss", "--valid-metrics", nargs="+", choices=lambda: METRICS
    )
    metrics: tuple[str, ...] = setting(
        (),
        f"what is measured of the answers to --test-data: {', '.join(GENERATED)}, or MODULE:FUNCTION (default: the two "
        "exact matches)",
        "--metrics",
        nargs="+",
        metavar="NAME",
    )
    eval_samples: int | None = setting(  # then none is answered
        None,
        "validation samples that are answered at each validation, into answers/ and TensorBoard",
        "--eval-samples",
        type=positive_int,
        metavar="N",
    )
    metric: str = setting(
        LOSS,
        "what `best` and --early-stopping go by: loss, one of --valid-metrics, or one of --metrics on --eval-samples",
        "--metric",
        metavar="NAME",
    )
    early_stopping: int = setting(
        0, "end the run after so many validations that were not better; 0: never", "--early-stopping", type=count,
        metavar="N",
    )  # fmt: skip
    wandb: str = setting(
        NONE, "keep the curves in W&B too: online, or offline in the run folder", "--wandb",
        choices=lambda: (NONE, "online", "offline"), nargs="?", const="online",
    )  # fmt: skip
    log_interval: int = setting(
        10, "steps between the lines of train.jsonl", "--log-interval", type=positive_int, metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The checks that watch over a run."""

    watchdog_limit: float = setting(
        120.0,
        "end a run that gives no sign of life for so long, and for ten times the longest that its phase has taken; "
        "0: never",
        "--watchdog-limit",
        type=seconds,
        metavar="SECONDS",
    )


@dataclass(frozen=True, kw_only=True)
class Start:
    """The settings of one start of a run: no file says them, and a run that goes on has forgotten them."""

    resume: str | None = setting(
        None,
        "run folder to go on with, under its own settings",
        "--resume",
        group=BASIC,
        resumed=False,
        metavar="RUN_FOLDER",
    )
    overwrite: bool = flag(
        False,
        "start in a run folder that holds results: they are removed",
        "--overwrite",
        group="saving and evaluating",
        resumed=False,
    )
    any_data: bool = flag(
        False,
        "for --resume: go on though the training data is not what it was",
        "--any-data",
        group="saving and evaluating",
        resumed=False,
    )
    trust_checkpoint: bool = flag(
        False,
        "unpickle all of --from_pretrained: runs any code in it",
        "--trust-checkpoint",
        group="model",
        resumed=False,
    )
    any_base: bool = flag(
        False,
        "with --resume: go on with a base that the run was not trained on",
        "--any-base",
        group="model",
        resumed=False,
    )
    local_rank: int = setting(
        0, "set by the launcher", "--local_rank", group="parallelism and memory", resumed=False, type=int, metavar="N"
    )
    doctor: bool = flag(
        False, "check everything with one step per kind of batch, write nothing, and end", "--doctor", resumed=False
    )
    shrink: int | None = setting(  # then the doctor builds the whole model
        None,
        "for --doctor and --replay: the first N layers of each transformer alone",
        "--shrink",
        resumed=False,
        type=positive_int,
        metavar="N",
    )
    replay: str | None = setting(
        None,
        "run the last step of a run again: for sat-lora doctor --replay",
        "--replay",
        resumed=False,
        metavar="RUN_FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Options of published scripts, without effect."""

    mode: str = setting("finetune", "no effect: this always fine-tunes", "--mode", choices=lambda: ("finetune",))
    use_lora: bool = flag(True, "no effect: LoRA is always on", "--use_lora")
    resume_dataloader: bool = flag(True, "no effect: --resume always goes on at the next sample", "--resume-dataloader")
    skip_init: bool = flag(True, "no effect: base weights are loaded, never drawn first", "--skip-init")
    ignore_pad_token_for_loss: bool = flag(True, "no effect: padding never counts", "--ignore_pad_token_for_loss")
    deepspeed: bool = flag(True, "no effect: the engine is always DeepSpeed", "--deepspeed")
    image_length: int | None = setting(
        None, "no effect: the base says it, and has to say the same", "--image_length", type=positive_int, metavar="N"
    )
    cross_image_pix: int | None = setting(
        None,
        "no effect: the base says it, and has to say the same",
        "--cross_image_pix",
        type=positive_int,
        metavar="N",
    )
    eva_args: str | None = setting(
        None, "no effect: the base says these sizes, and has to say the same", "--eva_args", metavar="JSON"
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the base that were given, as model_config.json has them. Raises ConfigError for no such JSON."""
        given = {"image_length": self.image_length, "cross_image_pix": self.cross_image_pix}
        sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
        if self.eva_args is None:
            return sizes
        try:
            vit = parse_json(self.eva_args)
        except ValueError as error:
            raise ConfigError(f"--eva_args: {printable(error)}; wanted an object of JSON, such as {{}}") from error
        if not isinstance(vit, dict):
            raise ConfigError(
                f"--eva_args: got {printable(repr(self.eva_args))}, wanted an object of JSON, such as {{}}"
            )
        return {**sizes, "eva_args": vit}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run. Nothing changes it: `replaced` gives another one."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    quantization: Quantizing = field(default_factory=Quantizing)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    saving: Saving = field(default_factory=Saving)
    checks: Checks = field(default_factory=Checks)
    start: Start = field(default_factory=Start)
    compatibility: Compatibility = field(default_factory=Compatibility)
    origins: Mapping[str, Origin] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)
    """The origin of each value by its name; a value without one is the default."""
    problems: tuple[str, ...] = ()
    """Sentences on values that no LoraConfig can have, in place of which `lora` has the defaults: `check_options` says
    them together with all else that is wrong.
    """

    @classmethod
    def of(cls, values: Mapping[str, Any], origins: Mapping[str, Origin] | None = None) -> "TrainConfig":
        """Return the config with these values by their names, of the types that JSON has; the rest are defaults.

        The LoRA section's seed is the run's. Raises ConfigError where no LoraConfig can be made of the values.
        """
        return cls(origins=MappingProxyType(dict(origins or {}))).replaced(**values)

    @classmethod
    def of_flat(cls, values: Mapping[str, Any], given: Iterable[str] = ()) -> "TrainConfig":
        """Return the config of the values that `flat` gave. given: the names of those that were set by hand."""
        known = {name: value for name, value in values.items() if name in KNOWN}
        return cls.of(known, dict.fromkeys(given, Origin.OPTION))

    def replaced(self, origin: Origin | None = None, **values: Any) -> "TrainConfig":
        """Return this config with other values, by their names; lists are taken for tuples.

        origin: where the values come from, to be noted; None leaves what is noted. Raises ConfigError as `of` does.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            sections.setdefault(KNOWN[name].section, {})[name] = frozen(value)
        if "seed" in values:
            sections.setdefault("lora", {})["seed"] = values["seed"]
        changed: dict[str, Any] = {name: replace(getattr(self, name), **own) for name, own in sections.items()}
        if origin is not None:
            changed["origins"] = MappingProxyType({**self.origins, **dict.fromkeys(values, origin)})
        return replace(self, **changed)

    def flat(self) -> dict[str, Any]:
        """Return every value by its name, as JSON has it: lists for tuples."""
        return {name: plain(getattr(getattr(self, known.section), name)) for name, known in KNOWN.items()}

    def value(self, name: str) -> Any:
        """Return the value of that name, as JSON has it."""
        return plain(getattr(getattr(self, KNOWN[name].section), name))

    def origin(self, name: str) -> Origin:
        """Return where the value of that name comes from."""
        return self.origins.get(name, Origin.DEFAULT)

    @property
    def given(self) -> frozenset[str]:
        """The names of the values that were set by hand: as an option, in a file, or so in the run to go on with."""
        return frozenset(name for name, origin in self.origins.items() if origin in BY_HAND)

    @property
    def given_here(self) -> frozenset[str]:
        """The names of those that were set by hand for this start: as an option, or in a file."""
        return frozenset(name for name, origin in self.origins.items() if origin in HERE)

    @property
    def run_folder(self) -> str:
        """The folder that holds all of the run: SAVE/NAME, or that of the run to go on with."""
        return self.start.resume or str(Path(self.saving.save or "runs") / self.saving.experiment_name)


def _is_below_one(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _known() -> dict[str, Known]:
    """Return every field of every section by its name, in the order of the sections."""
    headings = {
        Model: "model",
        Data: "data",
        Optimizer: "schedule",
        Schedule: "schedule",
        Parallel: "parallelism and memory",
        Precision: "parallelism and memory",
        Quantizing: "parallelism and memory",
        Checkpointing: "parallelism and memory",
        Saving: "saving and evaluating",
        Checks: "checking",
        Start: "checking",
        Compatibility: "accepted for compatibility",
    }
    settings: list[Known] = []
    for section in fields(TrainConfig):
        factory: Any = section.default_factory
        if factory is LoraConfig:
            settings += lora_fields("LoRA")
        elif factory in headings:
            settings += fields_of(section.name, headings[factory], factory)
    return {known.name: known for known in settings}


KNOWN: Mapping[str, Known] = MappingProxyType(_known())
"""Every setting by its name."""
SECTIONS = tuple(dict.fromkeys(known.section for known in KNOWN.values()))
DEFAULTS: Mapping[str, Any] = MappingProxyType({name: known.default for name, known in KNOWN.items()})
"""The settings for a real CogVLM, as JSON has them."""
NOT_RESUMED = frozenset(name for name, known in KNOWN.items() if not known.resumed)
"""The names of the settings that belong to one start of a run."""
__all__ = ["DEFAULTS", "KNOWN", "LORA_FIELDS", "NOT_RESUMED", "Origin", "TrainConfig"]

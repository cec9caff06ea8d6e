"""Mistakes that are known before the model loads: all of them, in one error."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.load import check_files, read_config
from sat_lora.cogvlm.checkpoints.quantized_files import KEY, note_of_folder
from sat_lora.cogvlm.families import family_of
from sat_lora.cogvlm.inputs.films import MOST_FRAMES, film_pictures, with_frames
from sat_lora.cogvlm.inputs.pictures import read_picture
from sat_lora.cogvlm.inputs.text import (
    IMAGE_PLACE,
    PROMPTS,
    load_tokenizer,
    prompt_for,
    prompt_text,
    shortest_length,
    turn_texts,
)
from sat_lora.cogvlm.network.model import parallel_problems
from sat_lora.cogvlm.sizes import contradictions, image_length_problem, missing_sizes
from sat_lora.data.layouts import missing_file_hint, no_samples
from sat_lora.data.reading import READERS, Reading
from sat_lora.data.samples import DataCounts, ImageTextDataset, Item, picture_content, read_items, reading_options
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.errors import CheckpointError, ConfigError, DataError, SatLoraError
from sat_lora.files.foreign import os_problem
from sat_lora.files.paths import is_shard, missing_data, split_weight, weights_problem
from sat_lora.lora.config import LOFTQ
from sat_lora.printable import printable
from sat_lora.training.early import WANTED, data_hint, raise_problems
from sat_lora.training.resume import settled_problems, state_to_resume
from sat_lora.training.settings.config import (
    DEFAULTS,
    NONE,
    Checkpointing,
    Data,
    Model,
    Parallel,
    Quantizing,
    Schedule,
    Start,
    TrainConfig,
)
from sat_lora.training.settings.deepspeed_config import settle
from sat_lora.training.settings.deepspeed_file import read_deepspeed_file
from sat_lora.training.settings.deepspeed_problems import file_problems
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.source_settings import source_settings
from sat_lora.training.steps.checkpoint import samples_per_step

IMAGES_TRIED = 300  # one readable image among so many is enough to begin
FILMS_TRIED = 8  # one among so many has to fit into --max_length


def check_options(
    config: TrainConfig,
    environ: Mapping[str, str] = os.environ,
    *,
    device: str | None = None,
    more: Iterable[str] = (),
    demo: Demo | None = None,
) -> None:
    """Raise one ConfigError, or DataError when only the data is wrong, with every problem found.

    Every rank finds the same. It reads configs, the tokenizer, the headers of weight files and some images, but no
    weights, and changes nothing.
    device: `cuda` or `cpu`; None asks torch. more: problems with settings that are known already.
    """
    settings, data = option_problems(config, environ, device, demo)
    raise_problems([*more, *settings], data)


def option_problems(
    config: TrainConfig, environ: Mapping[str, str], device: str | None = None, demo: Demo | None = None
) -> tuple[list[str], list[str]]:
    """Return (problems with the settings, problems with the data), each a sentence that names its option."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = [
        *_base_and_prompt_problems(config, environ),
        *config.problems,
        *_quantization_problems(config),
        *_partition_problems(config.model.base, config.quantization),
        *_checkpointing_problems(config.checkpointing),
        *_engine_problems(config, environ, device),
        *_resume_problems(config, environ),
    ]
    return settings, list(_data_problems(config, demo))


def _base_and_prompt_problems(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the base, the tokenizer and the prompt, or does not fit together."""
    sizes = None
    tokenizer = None
    try:
        sizes = read_config(config.model.base)
        check_files(config.model.base, trust=config.start.trust_checkpoint)
    except SatLoraError as error:
        yield f"--from_pretrained: {error}"
    except OSError as error:
        yield f"--from_pretrained: {os_problem(error)}"
    yield from _model_parallel_problems(config.parallel, config.start, sizes or {}, environ)
    if sizes is not None and not missing_sizes(sizes) and not config.start.doctor:  # which has a finding of its own
        problem = image_length_problem(sizes)
        if problem:
            yield f"--from_pretrained: {config.model.base}: {problem}; copy its config again"
    try:
        said = config.compatibility.sizes
    except ConfigError as error:
        yield str(error)
        said = {}
    if sizes is not None:
        yield from contradictions(said, sizes)
        most = family_of(sizes).most_images
        if most is not None and config.data.images_per_sample > most:
            yield f"--images-per-sample: {family_of(sizes).title} takes {most} for each sample; leave the option out"
    if config.model.version not in PROMPTS:
        got = f"got {config.model.version!r}"
        if "version" not in config.given:
            got = f"the config of {config.model.base} names {config.model.version!r}"
        yield f"--version: {printable(got)}, wanted one of {', '.join(PROMPTS)}"
    # Without an option of its own the tokenizer is the base's; one wrong folder then is one problem, not two.
    if config.model.tokenizer != config.model.base or sizes is not None:
        try:
            tokenizer = load_tokenizer(config.model.tokenizer)
        except ConfigError as error:
            yield str(error)
    if tokenizer is None or sizes is None:
        return
    try:
        config.data.prompt.encode()
    except UnicodeEncodeError:
        shown = printable(config.data.prompt)
        yield f"--prompt: {shown} holds half a character, or bytes that are no UTF-8; write it anew"
        return
    missing = [name for name in ("bos_token_id", "eos_token_id") if getattr(tokenizer, name, None) is None]
    if missing:
        lacking = " and no ".join(missing)
        yield f"--local_tokenizer: {config.model.tokenizer} has no {lacking}; give the base's own"
    yield from _vocabulary_problems(config.model, config.data, sizes, tokenizer)
    image_length = sizes.get("image_length")
    if not isinstance(image_length, int):
        file = f"{config.model.base}/model_config.json"
        yield f"--from_pretrained: {file} has no image_length; it is no CogVLM"
    elif config.model.version in PROMPTS:
        takes_frames = family_of(sizes).takes_frames
        try:
            needed = _shortest(config.model, config.data, tokenizer, image_length)
            most = _shortest(config.model, config.data, tokenizer, image_length, MOST_FRAMES if takes_frames else 1)
        except DataError as error:
            yield f"--prompt: {error}"
            return
        if config.model.max_length < needed:
            of_film = f", with {MOST_FRAMES} frames of a film {most}" if takes_frames else ""
            yield (
                f"--max_length: {config.model.max_length} is too short: an image of {image_length} patches, the prompt "
                f"{config.data.prompt!r} and one token of answer take {needed}{of_film}; give {most} plus the answers' "
                "length"
            )


def _shortest(model: Model, data: Data, tokenizer, image_length: int, frames: int = 1) -> int:
    """Return how many tokens the shortest sample has with an image, or a film of so many frames, and --prompt.

    Raises DataError where the prompt cannot be encoded.
    """
    special = data.special_tokens_in_text
    prompt: str | tuple[str, ...] = ("", prompt_text(model.version, data.prompt))
    if special:
        prompt = prompt_for(model.version, data.prompt)
    if frames > 1:
        parts = prompt.split(IMAGE_PLACE) if isinstance(prompt, str) else prompt
        prompt = with_frames(parts, [frames], model.version)
    return shortest_length(tokenizer, prompt, image_length, special)


def _vocabulary_problems(model: Model, data: Data, sizes: dict, tokenizer) -> Iterator[str]:
    """Yield the problem that a token of every sample is none of the base's; `check_vocabulary` looks at the samples."""
    size = sizes.get("vocab_size")
    if not isinstance(size, int) or model.version not in PROMPTS:
        return
    text = prompt_for(model.version, data.prompt).replace(IMAGE_PLACE, "")
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id, tokenizer.eos_token_id]
    outside = [number for number in ids if number is not None and not 0 <= number < size]
    if outside:
        yield (
            f"--local_tokenizer: {model.tokenizer} makes token {max(outside)}, the base has a vocabulary "
            f"of {size}, from 0 to {size - 1}; give the base's own tokenizer"
        )


def _quantization_problems(config: TrainConfig) -> Iterator[str]:
    """Yield what says how the base is quantised, or begins with that, where it is not."""
    if config.lora.loftq_iter != 1 and config.lora.init_lora_weights != LOFTQ:
        yield f"--loftq_iter: it is of --init_lora_weights loftq, got {config.lora.init_lora_weights}"
    note = None
    with suppress(SatLoraError):  # which is a problem of the base
        note = note_of_folder(config.model.base)
    yield from config.quantization.unheeded(config.given_here, note, config.model.base)
    if config.quantization.quantize == NONE and config.lora.init_lora_weights == LOFTQ:
        yield (
            "--init_lora_weights loftq: it begins with what quantisation misses of the base's weights; give the base "
            "itself with --quantize nf4 or int8, or another --init_lora_weights, such as pissa"
        )


def _partition_problems(base: str, quantizing: Quantizing) -> Iterator[str]:
    """Yield the problem that quantised weights are to be partitioned and none is; a folder may hold some already."""
    if not quantizing.quantize_partition or quantizing.quantize != NONE:
        return
    try:
        is_quantized = KEY in read_config(base)
    except (SatLoraError, OSError):  # which has a problem of its own
        return
    if not is_quantized:
        yield "--quantize_partition: it cuts quantised weights, and none is; give --quantize nf4 or int8"


def _checkpointing_problems(checkpointing: Checkpointing) -> Iterator[str]:
    """Yield what says where the inputs of recomputed layers are kept, where none is recomputed."""
    if checkpointing.checkpoint_offload and not (
        checkpointing.checkpoint_activations or checkpointing.vit_checkpoint_activations
    ):
        yield (
            "--checkpoint_offload: it keeps the inputs of layers that are recomputed, and none is; give "
            "--checkpoint-activations, --vit_checkpoint_activations or both"
        )


def _model_parallel_problems(
    parallel: Parallel, start: Start, sizes: dict, environ: Mapping[str, str]
) -> Iterator[str]:
    """Yield what is wrong with the number of model-parallel ranks, for this base and this number of ranks."""
    mp_size = parallel.model_parallel_size
    ranks = int(environ.get("WORLD_SIZE", 1))
    problems = parallel_problems(sizes, mp_size, ranks)
    if start.doctor and ranks == 1 < mp_size:
        problems[0] += f"; for the doctor alone: sat-lora doctor --ranks {mp_size}"
    yield from (f"--model-parallel-size: {problem}" for problem in problems)


def _engine_problems(config: TrainConfig, environ: Mapping[str, str], device: str) -> Iterator[str]:
    """Yield what is wrong with the precision and the DeepSpeed file, or does not fit together."""
    if config.precision.bf16 and config.precision.fp16 and {"bf16", "fp16"} & config.given:
        yield "--bf16 and --fp16: both given; choose one (bf16 where the GPU has it)"
    path = config.parallel.deepspeed_config
    if path is not None:
        try:
            content = read_deepspeed_file(path)
        except ConfigError as error:
            yield str(error)
            return
        errors, _ = file_problems(content, path)
        if errors:
            yield from errors
            return
        stage = content.get("zero_optimization", {}).get("stage")
        if "zero_stage" in config.given and stage is not None and stage != config.parallel.zero_stage:
            yield (
                f"--zero-stage: got {config.parallel.zero_stage}, but --deepspeed_config {path} says stage {stage}; "
                "leave out the option or change the file, whose other entries are meant for its stage"
            )
    try:
        settled = settle(config, device=device, environ=environ).config
    except ConfigError as error:
        yield str(error)
        return
    if config.quantization.quantize_partition and settled.parallel.zero_stage != 3:
        yield (
            f"--quantize_partition: ZeRO stage 3 partitions weights, and this is stage {settled.parallel.zero_stage}; "
            "give --zero-stage 3 as well"
        )
    if settled.precision.fp16 and not device.startswith("cuda"):
        source = "--fp16" if "fp16" in config.given else f'--deepspeed_config: {path}: "fp16"'
        yield f"{source}: float16 trains on CUDA only and there is no CUDA device; use --bf16, or neither for fp32"


def _resume_problems(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield why the run of --resume cannot go on with this config and this number of ranks."""
    if config.start.resume is None:
        return
    try:
        state = state_to_resume(config.start.resume)
    except CheckpointError as error:
        yield str(error)
        return
    stored = settings_of_run(config.start.resume)
    yield from settled_problems(config, state)
    ranks = max(1, int(environ.get("WORLD_SIZE", 1)) // config.parallel.model_parallel_size)
    if config.data.train_data and is_shard(config.data.train_data[0]):
        yield from _stream_problems(config, stored, state["layout"][0], ranks)
    else:
        yield from _global_batch_problems(config.schedule, state["samples_per_step"], ranks)


def _stream_problems(config: TrainConfig, stored: dict, ranks_before: int, ranks: int) -> Iterator[str]:
    """Yield the problem that a run on tar shards would go on with other readers.

    Which reader has which samples depends on how many readers there are, and on the size of a batch.
    """
    before = {name: stored.get(name, DEFAULTS[name]) for name in ("batch_size", "num_workers")}
    changed = [f"--{n.replace('_', '-')} {config.value(n)}, was {v}" for n, v in before.items() if config.value(n) != v]
    if ranks != ranks_before:
        changed.append(f"{ranks} data-parallel ranks, were {ranks_before}")
    if changed:
        yield (
            "--resume: a run on tar shards goes on with the readers it had, or samples are left out and others come "
            f"twice; now {'; '.join(changed)}"
        )


def _global_batch_problems(schedule: Schedule, samples: int, ranks: int) -> Iterator[str]:
    """Yield the problem that a step would take another number of samples: the place in the data is a number
    of steps.
    """
    now = samples_per_step(schedule, ranks)
    if now == samples:
        return
    if samples % ranks:
        fitting = f"start a number of data-parallel ranks that divides {samples}"
    else:
        share = samples // ranks
        batch = max(size for size in range(1, schedule.batch_size + 1) if share % size == 0)
        fitting = f"give --batch-size {batch} --gradient-accumulation-steps {share // batch}"
    yield (
        f"--resume: the run took {samples} samples a step, now it would be {now}: --batch-size {schedule.batch_size} x "
        f"--gradient-accumulation-steps {schedule.gradient_accumulation_steps} x {ranks} data-parallel ranks; {fitting}"
    )


def _data_problems(config: TrainConfig, demo: Demo | None) -> Iterator[str]:
    """Yield what is wrong with the paths of data and what lies there."""
    if not config.data.train_data:
        yield "--train-data: nothing given; give folders of images named LABEL.png, .jsonl files or tar shards"
    try:
        options = Reading.of(source_settings(config)).records
    except ConfigError as error:
        yield str(error)
        return
    streamed = is_shard((config.data.train_data or ("",))[0])
    if streamed and not config.data.valid_data and "split" in config.given and sum(config.data.split[1:]) > 0:
        yield "--split: tar shards are streamed and cannot be split; give --valid-data, or leave --split out"
    for name in ("train_data", "valid_data", "test_data"):
        option = "--" + name.replace("_", "-")
        texts = config.value(name) or []
        paths = [split_weight(text)[0] for text in texts]
        if problem := weights_problem(texts, option):
            yield f"{option}: {problem}"
            continue
        if any(map(is_shard, paths)):
            if config.data.data_format in READERS:
                yield f"{option}: tar shards are not of --data-format {config.data.data_format}; leave it out"
                continue
            try:
                problems = problems_with_shards(paths, option, options, _Trial(config))
                yield from (f"{option}: {problem}" for problem in problems)
            except OSError as error:
                yield f"{option}: {os_problem(error)}"
            continue
        for path in paths:
            try:
                problem = _problem_with_path(Path(path), config)
            except OSError as error:  # a folder that this user may not list, or not even look for
                problem = os_problem(error)
            if problem:
                yield f"{option}: {problem}{data_hint(config.given, name, demo)}"


def _problem_with_path(path: Path, config: TrainConfig) -> str | None:
    """Return what is wrong with a folder or file of data; None where some of its samples can be read.

    Raises OSError where it may not be looked at.
    """
    problem = missing_data(str(path), WANTED)
    if problem:
        return problem
    path.stat()
    counts = DataCounts()
    try:
        items = read_items([path], **reading_options(source_settings(config)), counts=counts)
    except DataError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    if not items:
        return no_samples(path, counts.unused)
    if problem := _problem_with_turns(items, config.model.version):
        return f"{path}: {problem}"
    trial = _Trial(config)
    with_images = [item for item in items if item.image is not None][:IMAGES_TRIED]
    first_error = None
    too_long: list[str] = []
    for item in with_images:
        try:
            trial.try_item(item)
            return None
        except ConfigError as error:
            too_long.append(str(error))
            if len(too_long) == FILMS_TRIED:
                break
        except (DataError, OSError, ValueError) as error:
            first_error = first_error or f"{error}{missing_file_hint(item.image)}"
    if too_long:
        return f"{path}: {too_long[0]}"
    if with_images:
        count = len(with_images)
        return f"none of the first {count} images of {path} can be read; mend or replace them; {first_error}"
    return None


class _Trial:
    """Tries samples as the run will use them: whether a picture can be read, and whether a film fits.

    Where the base's config or the tokenizer cannot be read, which is said elsewhere, less is tried.
    """

    def __init__(self, config: TrainConfig):
        self._model = config.model
        self._data = config.data
        self.max_pixels = config.data.max_pixels
        self._takes_frames = False
        self._dataset: ImageTextDataset | None = None
        try:
            sizes = read_config(config.model.base)
            self._takes_frames = family_of(sizes).takes_frames
            if self._takes_frames and not missing_sizes(sizes) and config.model.version in PROMPTS:
                self._dataset = self._dataset_of(sizes)
        except (SatLoraError, OSError):
            return

    def _dataset_of(self, sizes: dict) -> ImageTextDataset:
        return ImageTextDataset(
            [],
            load_tokenizer(self._model.tokenizer),
            version=self._model.version,
            prompt=self._data.prompt,
            image_size=tuple(sizes["eva_args"]["image_size"]),
            image_length=sizes["image_length"],
            max_length=self._model.max_length,
            special_tokens=self._data.special_tokens_in_text,
            takes_frames=True,
        )

    def try_item(self, item: Item) -> None:
        """Read the images of a sample; where the base takes films, lay the sample out as well.

        Raises DataError, OSError or ValueError if that fails, and ConfigError if it is longer than --max_length.
        """
        if not self._takes_frames:
            for image in item.images:
                read_picture(picture_content(image), max_pixels=self.max_pixels, name=item.name)
            return
        frames: list[int] = []
        for image in item.images:
            name = None if isinstance(image, Path) else item.name
            pictures = film_pictures(picture_content(image), self._model.version, max_pixels=self.max_pixels, name=name)
            frames.append(len(pictures))
        if self._dataset is None or not frames:
            return
        try:
            self._dataset.lay_out(item, frames=frames)
        except ConfigError as error:
            whole = copy(self._dataset)
            whole.max_length = sys.maxsize
            needed = len(whole.lay_out(item, frames=frames).input_ids)
            what = "a picture" if sum(frames) == 1 else f"a film of {sum(frames)} frames"
            raise ConfigError(
                f"--max_length: {self._model.max_length} is too short: {what} with its prompt and answer takes "
                f"{needed}; give that or more, as a film has up to {MOST_FRAMES} frames"
            ) from error
        except DataError:  # of a text, which the run names
            return


def _problem_with_turns(items: list[Item], version: str) -> str | None:
    """Return why the template has no place for the turns or the system text of a sample; None if it has."""
    if version not in PROMPTS:
        return None
    for item in items:
        if item.history or item.system:
            try:
                turn_texts(version, [*(query for query, _ in item.history), ""], item.system)
            except ConfigError as error:
                return str(error)
    return None

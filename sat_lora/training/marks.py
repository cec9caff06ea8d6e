"""Marks of all that a run is made of, which ranks compare: options, versions and code, DeepSpeed's config, the data."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sat_lora.files.paths import is_shard
from sat_lora.parallel.agreement import code_mark, mark
from sat_lora.training.runs.run_folder import versions
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.options import option_names

SAT_DEFAULTS = {"layernorm_epsilon": 1e-5, "rotary_base": 10000.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
# A machine may mount these elsewhere, so what lies there is compared instead: samples, tokenizer, DeepSpeed's config
# and, by its fingerprint, the base. The number of data workers decides which samples come only with tar shards.
PATHS = frozenset({"from_pretrained", "local_tokenizer", "train_data", "valid_data", "test_data", "deepspeed_config"})
OF_ONE_RANK = frozenset({"local_rank", "num_workers"})


def marks_of_options(config: TrainConfig) -> dict[str, str]:
    """Return the marks of options, versions and code that all ranks have to share, by their names in messages."""
    names = option_names()
    streams = any(map(is_shard, config.data.train_data or ()))
    left_out = PATHS | (OF_ONE_RANK - {"num_workers"} if streams else OF_ONE_RANK)
    values = {name: value for name, value in config.flat().items() if name not in left_out}
    marks = {names.get(name, f"--{name}"): mark(value) for name, value in sorted(values.items())}
    return marks | {f"which data of {names[name]}": mark(len(config.value(name) or ())) for name in
                    ("train_data", "valid_data", "test_data")} | marks_of_code()  # fmt: skip


def marks_of_code() -> dict[str, str]:
    """Return the versions that a run's numbers depend on, and a mark of this package's source, by their names in
    messages.
    """
    return {f"the version of {name}": version for name, version in versions().items()} | {
        "the code of sat_lora": code_mark()
    }


def marks_of_engine(config: Mapping) -> dict[str, str]:
    """Return a mark of each section of the config that DeepSpeed gets, by its name in messages."""
    return {f'"{name}" of --deepspeed_config': mark(value) for name, value in config.items()}


def marks_of_config(config: Mapping) -> dict[str, str]:
    """Return marks of the numbers that a base computes with beside its weights, which its fingerprint covers.

    config: the content of its model_config.json.
    """
    sections = {"": config, "eva_args.": config.get("eva_args", {})}
    return {
        f"{prefix}{name} in the config of --from_pretrained": mark(float(section.get(name, default)))
        for prefix, section in sections.items()
        for name, default in SAT_DEFAULTS.items()
    }


def marks_of_tokenizer(folder: str | Path) -> dict[str, str]:
    """Return a digest of the files of a tokenizer's folder by its name in messages; nothing for a tokenizer's name."""
    digest = hashlib.sha256()
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*") if p.name.startswith(("token", "vocab", "merges", "special", "added")))
    for path in files:
        if path.is_file():
            digest.update(path.name.encode("utf-8", "surrogateescape") + path.read_bytes())
    return {"the files of --local_tokenizer": digest.hexdigest()[:12]} if files else {}

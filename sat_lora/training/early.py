"""Mistakes that are known before anything slow is imported: folders and files that are not there, and a run folder
that holds results. The module needs nothing but Python's own library; `preflight` finds the rest.
"""

import importlib.util
import netrc
import os
import socket
import sys
import urllib.parse
from collections.abc import Collection, Iterator, Sequence

from sat_lora.errors import ConfigError, DataError
from sat_lora.files.paths import is_shard, missing_base, missing_data, split_weight, weights_problem
from sat_lora.parallel.launch import Place
from sat_lora.printable import printable, printable_lines
from sat_lora.terminal.edge import MISTAKE, let_first_rank_speak
from sat_lora.training.metrics.generated import is_code, metric_problem, name_problem
from sat_lora.training.metrics.registry import LOSS, METRICS
from sat_lora.training.runs.results import DATA, results_problems
from sat_lora.training.settings.config import NONE, Origin, TrainConfig
from sat_lora.training.settings.demo import Demo

WANTED = "give a folder of images named LABEL.png, or a .jsonl file"


def raise_problems(settings: Sequence[str], data: Sequence[str]) -> None:
    """Raise one ConfigError, or DataError where only the data is wrong, with all problems; nothing without any."""
    problems = [*settings, *data]
    if not problems:
        return
    kind = ConfigError if settings else DataError
    several = f"{len(problems)} problems with the options:\n"
    raise kind(problems[0] if len(problems) == 1 else several + "\n".join(f"- {problem}" for problem in problems))


def check_early(
    config: TrainConfig,
    place: Place,
    *,
    demo: Demo | None = None,
    writes: bool = True,
    trains: bool = True,
    more: Sequence[str] = (),
    program: str = "sat-lora",
) -> None:
    """Raise ConfigError or DataError with all that is known to be wrong this early.

    Every rank calls it, before any waits for another. The ranks on the machine of rank 0 find the same and leave it to
    rank 0 to speak. On another machine other files may be missing: its first rank says so itself, with its name, and
    its ranks end with SystemExit. demo: the Demo whose data are made where they are not there. writes: whether a run
    begins in `config.run_folder`. trains: whether steps and validations follow. more: problems that are known already.
    program: its name in a message.
    """
    settings = results_problems(config) if writes else []
    settings += [*base_problems(config.model.base), *more]
    if not config.start.replay:
        settings += [*metric_problems(config, trains=trains), *(validation_problems(config) if trains else ())]
    data = [*data_problems(config, demo)]
    try:
        raise_problems(settings, data)
    except (ConfigError, DataError) as error:
        if place.rank == 0 or place.rank == place.local_rank:
            raise
        if place.local_rank == 0:
            where = f"rank {place.rank} on {socket.gethostname()}"
            print(f"{program}: error: {where}: {printable_lines(error)}", file=sys.stderr)
        else:
            let_first_rank_speak()
        raise SystemExit(MISTAKE) from error


def metric_problems(config: TrainConfig, *, trains: bool) -> Iterator[str]:
    """Yield a sentence for each metric that does not exist or cannot be used. trains: --metric counts too."""
    named: list[tuple[str, str, tuple[str, ...]]] = [("metrics", name, ()) for name in config.saving.metrics]
    if trains:
        named.append(("metric", config.saving.metric, (LOSS, *METRICS)))
    for field, name, others in named:
        if name in others:
            continue
        problem = name_problem(name, others)
        if problem is None and is_code(name) and config.origin(field) is not Origin.OPTION:
            problem = f"{printable(name)} names code, which no file may; give it as an option"
        if problem is None:
            problem = metric_problem(name)
        if problem is not None:
            yield f"--{field}: {problem}"


def validation_problems(config: TrainConfig) -> Iterator[str]:
    """Yield a sentence for each option on validations that cannot be followed."""
    saving = config.saving
    asked = {
        "--eval-samples": saving.eval_samples is not None,
        "--metric": saving.metric != LOSS,
        "--early-stopping": saving.early_stopping > 0,
    }
    options = [option for option, is_asked in asked.items() if is_asked]
    if options and not config.data.valid_data and not sum(config.data.split[1:2]):
        yield f"{', '.join(options)}: there is no validation data; give --valid-data, or --split 0.95,0.05"
    elif saving.early_stopping and not saving.eval_interval:
        yield "--early-stopping: --eval-interval 0 validates at the end alone; give it a number of steps"
    is_measured_on_answers = saving.metric not in (LOSS, *METRICS)
    if is_measured_on_answers and saving.eval_samples is None and name_problem(saving.metric, [*METRICS]) is None:
        yield f"--metric: {printable(saving.metric)} is measured on answers; give --eval-samples N, how many"
    if saving.wandb != NONE:
        if importlib.util.find_spec("wandb") is None:
            yield "--wandb: needs the package wandb: pip install wandb"
        elif saving.wandb == "online" and os.environ.get("WANDB_MODE", "online") == "online" and not _knows_wandb():
            yield "--wandb: nobody is logged in here; run `wandb login`, or give --wandb offline"


def _knows_wandb() -> bool:
    """Return whether there is a key for W&B's server: in the environment, or in ~/.netrc where its login puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def base_problems(folder: str) -> list[str]:
    """Return the sentence that there is no base at --from_pretrained, in a list; an empty list where there is one."""
    try:
        problem = missing_base(folder)
    except OSError:  # it may not be looked for: `preflight` says so
        return []
    return [f"--from_pretrained: {problem}"] if problem else []


def data_problems(config: TrainConfig, demo: Demo | None = None) -> Iterator[str]:
    """Yield a sentence for each path of data that leads to nothing, and for weights that cannot be meant."""
    for name in DATA:
        option = f"--{name.replace('_', '-')}"
        texts = getattr(config.data, name) or ()
        if problem := weights_problem(texts, option):
            yield f"{option}: {problem}"
        for text in texts:
            path, _ = split_weight(text)
            is_made = demo is not None and demo.makes(path)
            if is_made or (is_shard(path) and (path.startswith("pipe:") or "{" in path)):
                continue
            problem = missing_data(path, "mend the path or copy it" if is_shard(path) else WANTED)
            if problem:
                yield f"{option}: {problem}{data_hint(config.given, name, demo)}"


def data_hint(given: Collection[str], name: str, demo: Demo | None) -> str:
    """Return how the demo's data are made, as the end of a sentence; an empty text where other data were named.

    given: names of the settings that were.
    """
    return f"; {demo.data_hint}" if demo is not None and name not in given else ""

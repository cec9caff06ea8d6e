"""Mistakes that are known before anything slow is imported: folders and files that are not there, and a run folder
that holds results. The module needs nothing but Python's own library; `preflight` finds the rest.
"""

import socket
import sys
from collections.abc import Collection, Iterator, Sequence

from sat_lora.errors import ConfigError, DataError
from sat_lora.files.paths import is_shard, missing_base, missing_data, split_weight, weights_problem
from sat_lora.parallel.launch import Place
from sat_lora.printable import printable_lines
from sat_lora.terminal.edge import MISTAKE, let_first_rank_speak
from sat_lora.training.runs.results import DATA, results_problems
from sat_lora.training.settings.config import TrainConfig
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
    more: Sequence[str] = (),
    program: str = "sat-lora",
) -> None:
    """Raise ConfigError or DataError with all that is known to be wrong this early.

    Every rank calls it, before any waits for another. The ranks on the machine of rank 0 find the same and leave it to
    rank 0 to speak. On another machine other files may be missing: its first rank says so itself, with its name, and
    its ranks end with SystemExit. demo: the Demo whose data are made where they are not there. writes: whether a run
    begins in `config.run_folder`. more: problems that are known already. program: its name in a message.
    """
    settings = results_problems(config) if writes else []
    settings += [*base_problems(config.model.base), *more]
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

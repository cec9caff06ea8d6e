"""`sat-lora data`: what lies in data paths, and what a run would train on."""

import argparse
from pathlib import Path

from sat_lora.commands.parts import demo_of_clone, examples
from sat_lora.terminal.option_types import count


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "data",
        help="tell what lies in data, and show samples as they are trained on",
        usage="%(prog)s PATH [PATH ...] [--samples N] [--pictures N] [--html FILE] [options of sat-lora train]",
        description="Says the layout, counts, lengths, cut answers, broken and unused files, what comes twice and the "
        "sizes of pictures, and shows samples with what is trained on between « and ». Needs no GPU and no weights. "
        "docs/data.md has the layouts.",
        takes_more=True,
        **examples(
            "sat-lora data my_images --from_pretrained cogvlm-base-490",
            "sat-lora data llava.json --images-from images/ --html report.html --samples 50",
            "sat-lora data train.parquet --columns prompt=problem,answer=solution",
        ),
    )
    command.add_argument("--samples", type=count, default=3, metavar="N", help="to show (default: 3)")
    command.add_argument("--pictures", type=count, default=1000, metavar="N", help="most to decode (default: 1000)")
    command.add_argument("--html", metavar="FILE", help="write a page with all this and the samples' pictures")
    command.set_defaults(run_command=run, takes_more=True)


def run(options: argparse.Namespace) -> int:
    """Print what lies in the data; return 0, or 1 where more samples are broken than --max-broken-share.

    Raises a SatLoraError for a user's mistake.
    """
    from sat_lora.errors import ConfigError
    from sat_lora.training.early import base_problems, data_problems, raise_problems
    from sat_lora.training.settings.options import parse_options

    demo = demo_of_clone()
    config = parse_options(options.more, prog="sat-lora data", environ={}, demo=demo, takes_paths=True)
    if "train_data" not in config.given:
        raise ConfigError("no data named; give folders of images or files of samples: sat-lora data PATH")
    if options.html is not None:
        _refuse_other_file(Path(options.html))
    config = config.replaced(valid_data=None, test_data=None)
    raise_problems(base_problems(config.model.base), [*data_problems(config, demo)])
    return _report(config, options)


def _report(config, options: argparse.Namespace) -> int:
    """Print what lies in --train-data, write the page, and return the exit status. Raises a SatLoraError."""
    from functools import partial

    from sat_lora.cogvlm.checkpoints.load import read_config
    from sat_lora.cogvlm.sizes import lacking
    from sat_lora.data.overview.examine import evenly, examine
    from sat_lora.data.overview.texts import lines_of, page, rows_of, sample_lines
    from sat_lora.data.reading import Reading
    from sat_lora.errors import CheckpointError, ConfigError
    from sat_lora.files.atomic import replace_text
    from sat_lora.files.paths import split_weight
    from sat_lora.printable import printable
    from sat_lora.terminal.progress import shown
    from sat_lora.training.prepare import dataset_maker
    from sat_lora.training.settings.config import Origin
    from sat_lora.training.source_settings import source_settings

    sizes = read_config(config.model.base)
    if missing := lacking(sizes):
        raise CheckpointError(f"--from_pretrained: {missing}")
    paths = [split_weight(path)[0] for path in config.data.train_data]
    dataset = dataset_maker(config.model, config.data, sizes)([])
    reading = Reading.of(source_settings(config), run_folder=None)
    overview = examine(paths, reading, dataset, options.pictures, partial(shown, unit="samples"))
    rows = rows_of(overview, dataset)
    if config.origin("from_pretrained") is Origin.DEMO:
        rows.insert(0, ("base", "none given: lengths are those of the embedded tiny one (--from_pretrained)"))
    items = evenly(overview.items, options.samples)
    print(lines_of(rows))
    if items:
        print(f"\n{sample_lines(items, dataset)}")
    if options.html is not None:
        title = f"{', '.join(map(printable, paths))[:200]}: {overview.samples:,} samples"
        try:
            replace_text(options.html, page(title, rows, items, dataset))
        except OSError as error:
            raise ConfigError(f"--html: {printable(options.html)}: cannot be written: {error.strerror}") from error
        print(f"\npage: {printable(options.html)}")
    return 1 if len(overview.broken) > config.data.max_broken_share * max(1, overview.samples) else 0


def _refuse_other_file(file: Path) -> None:
    """Raise ConfigError where something lies at --html that is no page of this command, or nothing can be there."""
    from sat_lora.data.overview.html_page import is_page_of
    from sat_lora.data.overview.texts import GENERATOR
    from sat_lora.errors import ConfigError
    from sat_lora.printable import printable

    shown = f"--html: {printable(file)}"
    if not file.parent.is_dir():
        raise ConfigError(f"{shown}: its folder does not exist; make it, or give another file")
    if file.is_dir():
        raise ConfigError(f"{shown} is a folder; give a file, such as {printable(file / 'report.html')}")
    if file.exists():
        with open(file, "rb") as content:
            if not is_page_of(GENERATOR, content.read(400)):
                raise ConfigError(f"{shown} exists and is no page of sat-lora data; give another file")

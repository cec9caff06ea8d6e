"""`sat-lora import`."""

import argparse

from sat_lora.commands.parts import bar, examples, refuse_existing, refuse_missing
from sat_lora.printable import printable
from sat_lora.terminal.option_types import number


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    take = commands.add_parser(
        "import",
        help="make an adapter of a PEFT adapter, or of a checkpoint of the whole model by SAT",
        **examples(
            "sat-lora import --from peft mine_peft --base cogvlm-base-490 --out mine",
            "sat-lora import --from lora2 checkpoints/finetune --base cogvlm-base-490 --out mine",
            "sat-lora import --from sat checkpoints/finetune --lora-alpha 32 --out mine",
        ),
    )
    take.add_argument("folder", metavar="FOLDER", help="PEFT adapter folder or SAT folder")
    take.add_argument("--from", dest="origin", required=True, choices=["peft", "lora2", "sat"], help="what FOLDER is")
    take.add_argument("--out", required=True, metavar="DIR", help="new adapter folder")
    take.add_argument(
        "--base",
        metavar="DIR",
        help="model folder of the base; peft: needed, its names and shapes have to fit; lora2: what differs from it "
        "was trained whole and is taken along",
    )
    alpha = number(float, "a number")
    take.add_argument(
        "--lora-alpha",
        type=alpha,
        metavar="ALPHA",
        help="lora2: as in training, by default SAT's 1; sat: as in training, where the checkpoint does not say it",
    )
    take.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Write the adapter. Raises a SatLoraError for a user's mistake."""
    refuse_existing(options.out)
    wanted = {
        "peft": "give the folder of a PEFT adapter, with adapter_config.json in it",
        "lora2": "give the folder that SAT saved, with latest in it",
        "sat": "give the folder that SAT saved, with latest in it",
    }
    refuse_missing(options.folder, base=options.base, option="", wanted=wanted[options.origin])
    progress = bar("importing", "layers")
    if options.origin == "peft":
        from sat_lora.errors import ConfigError
        from sat_lora.interop.peft_import import import_from_peft

        if options.base is None or options.lora_alpha is not None:
            raise ConfigError("--from peft needs --base, the model folder of the base, and takes no --lora-alpha")
        import_from_peft(options.folder, options.out, base=options.base, progress=progress)
    elif options.origin == "sat":
        from sat_lora.adapters.whole_model import import_from_whole_model
        from sat_lora.errors import ConfigError

        if options.base is not None:
            raise ConfigError("--base: --from sat takes none, the checkpoint holds the whole model")
        import_from_whole_model(options.folder, options.out, lora_alpha=options.lora_alpha)
    else:
        from sat_lora.interop.lora2_import import import_from_lora2

        alpha = 1.0 if options.lora_alpha is None else options.lora_alpha
        import_from_lora2(options.folder, options.out, lora_alpha=alpha, base=options.base, progress=progress)
        if options.base is None:
            print("without --base only the LoRA was taken: what that run trained whole, if anything, was left out")
    print(f"adapter in {printable(options.out)}")

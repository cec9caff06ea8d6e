"""`sat-lora export`, `import` and `inspect`."""

import argparse


def add_commands(commands) -> None:
    """commands: what `ArgumentParser.add_subparsers` gave."""
    _add_export(commands)
    _add_import(commands)
    _add_inspect(commands)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="make a PEFT adapter for Hugging Face's CogVLM",
        epilog="example: sat-lora export --to peft --adapter runs/mine/adapter --out mine_peft",
    )
    export.add_argument("--to", required=True, choices=["peft"], help="format to write")
    export.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder")
    export.add_argument(
        "--base",
        metavar="DIR",
        help="model folder of the base; needed for DoRA on some of q, k, v and for modules of which a part was trained",
    )
    export.set_defaults(run=_export)


def _add_import(commands) -> None:
    take = commands.add_parser(
        "import",
        help="make an adapter of a PEFT adapter or of a checkpoint of SAT's lora2",
        epilog="examples: sat-lora import --from peft mine_peft --base cogvlm-base-490 --out mine; "
        "sat-lora import --from lora2 checkpoints/finetune --lora-alpha 1 --out mine",
    )
    take.add_argument("folder", metavar="FOLDER", help="PEFT adapter folder or SAT folder")
    take.add_argument("--from", dest="origin", required=True, choices=["peft", "lora2"], help="what FOLDER is")
    take.add_argument("--out", required=True, metavar="DIR", help="new adapter folder")
    take.add_argument(
        "--base",
        metavar="DIR",
        help="model folder of the base; peft: needed, its names and shapes have to fit; lora2: what differs from it "
        "was trained whole and is taken along",
    )
    take.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="lora2: as in training, by default SAT's 1")
    take.set_defaults(run=_import)


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show ranks, sizes and delta norms of an adapter",
        epilog="examples: sat-lora inspect runs/mine; sat-lora inspect runs/mine/adapter --json --plot norms.png",
    )
    inspect.add_argument("path", metavar="PATH", help="adapter folder or run folder")
    inspect.add_argument("--json", action="store_true", help="everything, layer by layer, for programs")
    inspect.add_argument("--plot", metavar="PNG", help="bar chart of the delta norm per layer")
    inspect.set_defaults(run=_inspect)


def _export(options: argparse.Namespace) -> None:
    from sat_lora.interop.peft_export import export_to_peft

    export_to_peft(options.adapter, options.out, base=options.base)
    print(f"PEFT adapter in {options.out}")


def _import(options: argparse.Namespace) -> None:
    if options.origin == "peft":
        from sat_lora.errors import ConfigError
        from sat_lora.interop.peft_import import import_from_peft

        if options.base is None or options.lora_alpha is not None:
            raise ConfigError("--from peft needs --base, the model folder of the base, and takes no --lora-alpha")
        import_from_peft(options.folder, options.out, base=options.base)
    else:
        from sat_lora.interop.lora2_import import import_from_lora2

        alpha = 1.0 if options.lora_alpha is None else options.lora_alpha
        import_from_lora2(options.folder, options.out, lora_alpha=alpha, base=options.base)
    print(f"adapter in {options.out}")


def _inspect(options: argparse.Namespace) -> None:
    from sat_lora.inspect_adapter import describe_adapter, draw_norms, inspect_adapter, to_json

    report = inspect_adapter(options.path)
    if options.plot:
        draw_norms(report, options.plot)
    print(to_json(report) if options.json else describe_adapter(report))

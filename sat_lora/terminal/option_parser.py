"""The parser of every command: options in either spelling, none abbreviated, a mistake in one line that names what was
most likely meant. It needs nothing but Python's own library.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence

from sat_lora.printable import printable
from sat_lora.terminal.edge import MISTAKE, let_first_rank_speak
from sat_lora.terminal.notice import is_first_rank

# What other trainers call it. Offered where the parser has the option.
ELSEWHERE = {
    "--lr": "learning_rate max_lr peak_lr",
    "--r": "rank lora_r lora_dim lora_rank_dim r_lora",
    "--lora_alpha": "alpha lora_scale",
    "--lora_dropout": "dropout",
    "--target_modules": "lora_target lora_target_modules targets modules",
    "--from_pretrained": "model base base_model model_name model_path model_name_or_path pretrained checkpoint ckpt",
    "--train-data": "data dataset data_path train_dataset training_data train_file data_dir",
    "--valid-data": "val_data eval_data eval_dataset validation_data val_dataset validation_file",
    "--test-data": "test_dataset test_file",
    "--local_tokenizer": "tokenizer tokenizer_path tokenizer_name",
    "--save": "output output_dir save_dir out_dir save_path checkpoint_dir",
    "--experiment-name": "name run_name experiment exp_name",
    "--train-iters": "iters steps max_steps num_steps train_steps iterations",
    "--epochs": "num_epochs num_train_epochs max_epochs epoch",
    "--batch-size": "bs per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu train_batch_size",
    "--eval-batch-size": "per_device_eval_batch_size",
    "--gradient-accumulation-steps": "grad_accum accumulation accumulate_grad_batches gradient_accumulation",
    "--checkpoint-activations": "gradient_checkpointing activation_checkpointing recompute",
    "--max_length": "max_seq_length max_seq_len seq_length cutoff_len model_max_length max_len",
    "--config": "config_file config_path yaml cfg",
    "--resume": "resume_from_checkpoint resume_from load continue",
    "--lr-decay-style": "lr_scheduler lr_scheduler_type scheduler schedule",
    "--warmup": "warmup_ratio warmup_steps warmup_iters num_warmup_steps",
    "--clip-grad": "max_grad_norm gradient_clipping grad_clip",
    "--save-interval": "save_steps save_every",
    "--eval-interval": "eval_steps eval_every val_interval",
    "--log-interval": "logging_steps log_every",
    "--keep": "save_total_limit",
    "--num-workers": "workers dataloader_num_workers",
    "--zero-stage": "zero zero_stages",
    "--model-parallel-size": "tensor_parallel_size tp tensor_model_parallel_size mp_size",
    "--version": "template prompt_version",
    "--out": "output output_dir save out_dir",
    "--adapter": "adapter_name_or_path lora lora_path peft",
    "--base": "model from_pretrained base_model",
}  # fmt: skip
# What does not exist here, and what to do instead.
ABSENT = {
    "qlora use_qlora load_in_4bit quant quantization quantization_bit bits quantize_bits": (
        "--quantize nf4 holds the base in 4.25 bits, --quantize int8 in 8.25"
    ),
    "load_in_8bit use_8bit": "--quantize int8 holds the base in 8.25 bits",
    "bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant double_quant quant_type": (
        "--quantize nf4 has no further settings: it decodes to the run's precision, with one scale for each block"
    ),
    "use_ptuning ptuning pre_seq_len prefix_len": "there is no P-tuning here, only LoRA",
    "optim optimizer optimizer_type": (
        "the optimizer is AdamW; its settings are --lr, --weight-decay, and betas and eps in a --config file"
    ),
    "num_gpus num_nodes nproc_per_node nnodes hostfile master_port master_addr include": (
        "it is an option of the launcher: give it before the script (deepspeed --num_gpus 8 SCRIPT ...)"
    ),
}
_ABSENT = {name: advice for names, advice in ABSENT.items() for name in names.split()}


PLACES = ("DIR", "FILE", "PATH", "PNG", "NAME", "RUN_FOLDER", "FOLDER", "ADAPTER")
"""Placeholders in help of what lies on a disk."""


def meant_options(name: str, spellings: Mapping[str, str]) -> list[str]:
    """Return the options that other trainers call `name`, or nearly so, of those in `spellings`."""
    bare = name.lstrip("-").replace("-", "_").lower()
    every = {other for others in ELSEWHERE.values() for other in others.split()}
    near = difflib.get_close_matches(bare, every, 1, cutoff=0.9)
    elsewhere = [flag for flag, others in ELSEWHERE.items() if near and near[0] in others.split()]
    return [flag for flag in elsewhere if flag.replace("-", "_") in spellings]


def advice_on(name: str) -> str | None:
    """Return what to do instead of an option that exists elsewhere, and not here; None if nothing is known of it."""
    return _ABSENT.get(name.lstrip("-").replace("-", "_").lower())


class OptionParser(argparse.ArgumentParser):
    """A parser of options that takes `--a-b` for `--a_b` and the other way round.

    Rank 0 alone speaks, and every rank ends with status 2.
    takes_more: options that it does not know are left to another parser, instead of refused.
    """

    def __init__(self, *, takes_more: bool = False, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.takes_more = takes_more

    @property
    def spellings(self) -> dict[str, str]:
        """Every option as it was declared, by its name with underscores."""
        flags = [flag for action in self._actions for flag in action.option_strings if flag[:2] == "--"]
        return {flag.replace("-", "_"): flag for flag in flags}

    def parse_known_args(self, args=None, namespace=None):
        """Return (options, words that are left), as argparse does, for either spelling of each option."""
        args = sys.argv[1:] if args is None else args
        spellings = self.spellings
        options, unknown = super().parse_known_args([_declared(argument, spellings) for argument in args], namespace)
        if unknown and not self.takes_more:
            self.refuse_unknown(unknown)
        return options, unknown

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """End with an error that names what was most likely meant."""
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        self.error(f"unknown: {printable(' '.join(unknown))}{self._hint(names)}")

    def _hint(self, names: Sequence[str]) -> str:
        spellings = self.spellings
        meant: list[str] = []
        advice: list[str] = []
        for name in names:
            flags = meant_options(name, spellings)
            absent = advice_on(name)
            if absent is not None:
                advice.append(absent)
            else:
                meant += flags[:1] or difflib.get_close_matches(name, spellings.values(), 1)
        hints = [f"did you mean {', '.join(dict.fromkeys(meant))}?"] if meant else []
        return "".join(f"; {hint}" for hint in [*hints, *dict.fromkeys(advice)] or ["--help lists the options"])

    def _get_value(self, action, arg_string):
        if not arg_string.strip() and action.metavar in PLACES:
            raise argparse.ArgumentError(
                action, f"got {arg_string!r}, an empty name; a variable of the shell may not be set"
            )
        return super()._get_value(action, arg_string)

    def _check_value(self, action, value):
        """Refuse a value that is none of the choices: Python's own words differ by version, and propose nothing."""
        choices = action.choices
        if choices is None or value in choices:
            return
        texts = [str(choice) for choice in choices]
        near = difflib.get_close_matches(str(value).strip().lower(), texts, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}, wanted one of {', '.join(texts)}{hint}")

    def error(self, message: str):
        """End the process with MISTAKE and one line, which rank 0 alone prints."""
        if "are required: " in message:
            commands = [name for action in self._actions if action.dest == "command" for name in action.choices or ()]
            message += f"; one of {', '.join(commands)}" if commands else "; --help says what they are"
        self._print_message(f"{self.prog}: error: {message}\n", sys.stderr)
        let_first_rank_speak()
        self.exit(MISTAKE)

    def _print_message(self, message, file=None):
        if is_first_rank():
            super()._print_message(message, file)


def _declared(argument: str, spellings: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return spellings.get(name.replace("-", "_"), name) + equals + value if name[:2] == "--" else argument

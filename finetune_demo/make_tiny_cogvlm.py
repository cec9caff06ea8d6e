"""Train the demo's base from nothing: a CogVLM of 1.2 million parameters that reads cleanly printed digits.

It is a real SAT CogVLM with the published names, small enough for a repository. It reads clean strings and cannot
read captchas, which leaves LoRA something to do. The folder written holds the weights in bfloat16, model_config.json
and the tokenizer. --family writes a sibling of another family instead, with random weights: nobody has trained it, and
what runs on it is the code of a model a hundred thousand times its size.
"""

import argparse
import math
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from clean_strings import DIGITS, PAPER, PLACES, clean_strings, colour
from make_captchas import IMAGES, draw_captcha, plan
from tiny_tokenizer import SPECIAL, write_tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from sat_lora.cogvlm import CogVLMModel, build_cogvlm, load_cogvlm
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.cogvlm.inputs.image import MEAN, STD, image_tensor
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer, prompt_for

DEFAULT_OUT = Path(__file__).resolve().parent / "tiny_cogvlm"
QUERY = "CAPTCHA:"
SIZE = 42
PATCH = 7
GRID = SIZE // PATCH

COMMON = {"model_parallel_size": 1, "num_attention_heads": 4, "hidden_size": 128, "inner_hidden_size": 256}
CONFIG = {
    "model_class": "CogVLMModel",
    "tokenizer_type": "tiny_cogvlm",
    **COMMON,
    "num_layers": 2,
    "vocab_size": 128,  # more than the tokenizer's, so that it divides well over model-parallel ranks
    "layernorm_order": "pre",
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 256,
    "use_bias": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rotary_base": 100.0,  # sequences are short; 10000 would hardly turn most of the dimensions
    "image_length": GRID**2,
    "eva_args": {
        **COMMON,
        "num_layers": 3,
        "vocab_size": 1,
        "layernorm_order": "post",
        "max_sequence_length": GRID**2 + 1,
        "use_final_layernorm": False,
        "layernorm_epsilon": 1e-6,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "row_parallel_linear_final_bias": True,
        "image_size": [SIZE, SIZE],
        "pre_len": 1,
        "post_len": 0,
        "in_channels": 3,
        "patch_size": PATCH,
    },
    "pad_token_id": SPECIAL.index("<pad>"),
    "bos_token_id": SPECIAL.index("<bos>"),
    "eos_token_id": SPECIAL.index("<eos>"),
}

SMALL = {"model_parallel_size": 1, "num_attention_heads": 4, "hidden_size": 64, "inner_hidden_size": 64}
_SIBLING = {
    **{name: value for name, value in CONFIG.items() if name != "rotary_base"},  # that of its family
    **SMALL,
    "tokenizer_type": "tiny_cogvlm",
    "eva_args": {**CONFIG["eva_args"], **SMALL, "num_layers": 2},
}
_LLAMA3 = {  # fewer heads of keys, an EOS that is a list, and a convolution, after which 3 x 3 places are left
    "num_multi_query_heads": 2,
    "image_length": (GRID // 2) ** 2,
    "eos_token_id": [SPECIAL.index("<eos>"), 3],
}
SIBLINGS = {
    "cogvlm2": {**_SIBLING, **_LLAMA3, "model_class": "CogVLM2Model"},
    "cogvlm2-video": {**_SIBLING, **_LLAMA3, "model_class": "CogVLM2VideoModel", "num_vision_layers": 0},
    "cogagent": {
        **_SIBLING,
        "model_class": "CogAgentModel",
        "text_processor_version": "chat",
        "is_decoder": [True] * CONFIG["num_layers"],
        "cross_attn_hidden_size": 32,
        "cross_hidden_size_per_attention_head": 8,
        "cross_image_pix": 2 * SIZE,
        "encoder_args": {
            "num_layers": 3, "num_layers_run": 2, "hidden_size": 32, "num_attention_heads": 4, "inner_hidden_size": 40,
            "patch_size": 14, "head_size": 8, "trained_side": 3,
        },
    },
}  # fmt: skip
"""The sizes of tiny models of other families."""

VIT = "mixins.eva.vit_model"
GAINS = {  # weights whose standard deviation is not 1 / sqrt(inputs) but this many times as much
    "transformer.layers.*.attention.dense.weight": 0.3,
    "transformer.layers.*.mlp.dense_4h_to_h.weight": 0.3,
    "mixins.rotary.vision_dense_list.*.weight": 0.3,
    "mixins.mlp.vision_dense_4h_to_h_list.*.weight": 0.3,
    "mixins.lm.lm_head.weight": 0.3,
    "mixins.eva.linear_proj.dense_4h_to_h.weight": 3.0,  # so that image tokens start at the words' scale
}


GAINS_OF_SIBLINGS = 0.5


def grid_embedding(side: int, hidden: int) -> torch.Tensor:
    """Return sines and cosines of the row, then of the column, of each place: float32 (side * side, hidden)."""
    frequencies = 4 * math.pi / side * torch.arange(1, hidden // 4 + 1) / (hidden // 4)
    angles = (torch.arange(side) - (side - 1) / 2)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, hidden / 2)
    rows = line[:, None].expand(-1, side, -1)
    columns = line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def initialise(model: CogVLMModel, answer_tokens: list[int]) -> None:
    """Give the model values from which so small a one learns within minutes; from the usual ones it stays at chance.

    `answer_tokens`: the ids that occur in answers.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name in ("transformer.word_embeddings.weight", "mixins.eva.boi", "mixins.eva.eoi"):
            nn.init.normal_(parameter)
        elif name == f"{VIT}.mixins.patch_embedding.proj.weight":
            nn.init.uniform_(parameter, -1, 1).div_(math.sqrt(parameter[0].numel()))
        elif name == f"{VIT}.transformer.word_embeddings.weight":
            nn.init.zeros_(parameter)
        elif name == f"{VIT}.transformer.position_embeddings.weight":
            parameter.zero_()[1:] = grid_embedding(GRID, parameter.shape[1])
        elif parameter.dim() == 2:
            gain = next((gain for pattern, gain in GAINS.items() if fnmatch(name, pattern)), 1.0)
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
        else:  # the weight of a norm; the ViT's norms end a branch and start small
            nn.init.constant_(parameter, 0.3 if name.startswith(VIT) else 1.0)
    # Most of the vocabulary is never an answer. Having to learn that first spoils hundreds of steps for the rest, so
    # one hidden dimension is the same for all words, and by it the other tokens begin improbable.
    embeddings = model.transformer.word_embeddings.weight
    head = model.mixins["lm"].lm_head.weight
    embeddings[:, 0] = 3.0
    head[:, 0] = -2.0
    head[answer_tokens, 0] = 0.0
    patches = model.mixins["eva"].vit_model.mixins["patch_embedding"].proj
    paper = (sum(PAPER) / 2 - MEAN) / STD
    patches.bias.copy_(-(patches.weight * paper).sum((1, 2, 3)))  # blank paper maps to zero
    frequencies = model.mixins["rotary"].rotary_emb.inv_freq
    frequencies.copy_(frequencies.bfloat16())  # train with the values that the file will hold


class Reader:
    """A model that is asked for the string on an image. All questions are alike, so a batch is one sample repeated."""

    def __init__(self, model: CogVLMModel, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = build_sample(
            tokenizer, prompt_for("base", QUERY), None, model.image_length, CONFIG["max_sequence_length"]
        )

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Return texts as digits, end of sequence and padding: int64 (texts, PLACES + 1)."""
        end = [self.tokenizer.eos_token_id]
        pad = [self.tokenizer.pad_token_id]
        rows = [self.tokenizer.encode(text, add_special_tokens=False) + end for text in texts]
        return torch.tensor([row + pad * (PLACES + 1 - len(row)) for row in rows])

    def logits(self, images: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Return the logits of what follows the prompt and each of the (batch, n) answer tokens:
        (batch, n + 1, vocabulary).
        """
        count, length = answers.shape
        prompt = self.prompt
        start = len(prompt.input_ids)
        positions = prompt.position_ids[-1] + 1 + torch.arange(length)

        def repeat(first: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
            return torch.cat([first, then]).expand(count, -1)

        nothing = torch.zeros(length, dtype=torch.long)
        output = self.model(
            torch.cat([prompt.input_ids.expand(count, -1), answers], dim=1),
            repeat(prompt.position_ids, positions),
            images=images,
            image_embed_mask=repeat(prompt.image_embed_mask, nothing),
            vision_expert_mask=repeat(prompt.vision_expert_mask, nothing),
        )
        return output[0][:, start - 1 :]

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch: int = 250) -> list[str]:
        """Return the strings on images (count, 3, height, width), the likeliest token after the other.

        Each is computed from the whole sequence. batch: images at once.
        """
        self.model.eval()
        texts = []
        for part in images.split(batch):
            answers = torch.zeros(len(part), 0, dtype=torch.long)
            for _ in range(PLACES + 1):
                answers = torch.cat([answers, self.logits(part, answers)[:, -1:].argmax(-1)], dim=1)
            for ids in answers.tolist():
                end = ids.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in ids else len(ids)
                texts.append(self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        self.model.train()
        return texts

    def exact_match(self, images: torch.Tensor, texts: list[str]) -> float:
        """Return the share of the images that are read without a mistake."""
        return sum(map(str.__eq__, self.read(images), texts)) / len(texts)


def captcha_images(seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Return the captchas of the test set as a tensor (images, 3, SIZE, SIZE), and their strings."""
    jobs = [(Path(path).stem, key) for path, key in plan("test", IMAGES["test"], seed)]
    return torch.stack([image_tensor(draw_captcha(*job), (SIZE, SIZE)) for job in jobs]), [text for text, _ in jobs]


def train(reader: Reader, *, steps: int, images: int, batch: int, learning_rate: float, seed: int) -> None:
    """Train with AdamW on clean strings, most of them of full length; the colours are new in every step."""
    model = reader.model.train()
    masks, texts = clean_strings(images, SIZE, seed, lengths=(PLACES,) * 6 + tuple(range(1, PLACES)))
    answers = reader.encode(texts)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    check, check_texts = clean_strings(200, SIZE, seed + 1)
    check_images = colour(check, torch.Generator().manual_seed(seed))
    started = time.monotonic()
    smooth = float("nan")
    for step in trange(1, steps + 1, desc="base", unit=" steps", disable=None):
        chosen = torch.randint(len(masks), (batch,))
        targets = answers[chosen]
        logits = reader.logits(colour(masks[chosen]), targets[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=CONFIG["pad_token_id"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if step == 1 else 0.97 * smooth + 0.03 * loss.item()
        if step % 250 == 0 or step == steps:
            match = reader.exact_match(check_images, check_texts)
            seconds = time.monotonic() - started
            print(f"step {step}: loss {smooth:.3f}, clean {match:.1%}, {seconds:.0f} s", flush=True)


def report(folder: Path, dtype: torch.dtype, seed: int) -> None:
    """Load the folder as anyone would and print what it reads."""
    model, _ = load_cogvlm(folder, dtype=dtype)
    reader = Reader(model, load_tokenizer(folder))
    masks, texts = clean_strings(1000, SIZE, seed + 2)
    clean = reader.exact_match(colour(masks, torch.Generator().manual_seed(seed)), texts)
    images, labels = captcha_images()
    captchas = reader.exact_match(images, labels)
    print(f"{dtype}: clean {clean:.1%} of {len(texts)}, captchas {captchas:.1%} of {len(labels)}", flush=True)


def make_tiny_cogvlm(out: Path, *, seed: int, threads: int, **settings) -> None:
    """Build, train, write to `out`, load again, report."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    write_tokenizer(out, CONFIG["max_sequence_length"])
    model = build_cogvlm(CONFIG, seed=seed)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(out)
    initialise(model, [*tokenizer.encode(DIGITS, add_special_tokens=False), tokenizer.eos_token_id])
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(Reader(model, tokenizer), seed=seed, **settings)
    save_weights(out, CONFIG, {name: value.bfloat16().clone() for name, value in model.state_dict().items()})
    for dtype in (torch.float32, torch.bfloat16):
        report(out, dtype, seed)
    print(f"{out}: {time.monotonic() - started:.0f} s in all", flush=True)


def make_tiny_sibling(out: Path, family: str, *, seed: int = 4) -> None:
    """Write a tiny base of another family, with seeded random weights, to `out`: model_config.json, weights, tokenizer.

    Norms begin at one, what ends a branch of the residual stream small, all else at the scale that keeps it.
    """
    config = SIBLINGS[family]
    write_tokenizer(out, config["max_sequence_length"], pads="num_multi_query_heads" not in config)
    model = build_cogvlm(config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                inputs = parameter[0].numel() if parameter.dim() in (2, 4) else 1
                nn.init.normal_(parameter, std=GAINS_OF_SIBLINGS / math.sqrt(inputs))
    save_weights(out, config, {name: value.bfloat16().clone() for name, value in model.state_dict().items()})
    print(f"{out}: {family}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)


def main() -> None:
    """Make the base that the options ask for."""
    parser = argparse.ArgumentParser(
        description="Train the demo's base model.",
        epilog="example: python finetune_demo/make_tiny_cogvlm.py --out tiny",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="model folder to write")
    parser.add_argument(
        "--family", choices=["cogvlm", *SIBLINGS], default="cogvlm", help="others than cogvlm get random weights"
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--images", type=int, default=24000, help="clean strings to train on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=4, help="above zero; from some, learning starts late")
    # So small matrices gain little from a second thread, and lose much where another process keeps it waiting.
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    family = options.pop("family")
    if family == "cogvlm":
        make_tiny_cogvlm(**options)
    else:
        make_tiny_sibling(options["out"], family, seed=options["seed"])


if __name__ == "__main__":
    main()

"""A small tokenizer like that of Vicuna: SentencePiece's BPE with a space in front and bytes to fall back on."""

import json
from functools import cache

TEXT = "a cat sat </ s > <b>bold</b> on the mat, s> the end. " * 20
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0 to 2


@cache
def sentence_piece_tokenizer():
    """As transformers reads it, trained on TEXT."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_as_tokens = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *bytes_as_tokens], show_progress=False)
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)

"""Keys and values of all layers, in memory that is taken once and stays where it is for a whole generation."""

import torch
from torch.nn import functional as F

from sat_lora._sat import BaseModel
from sat_lora.cogvlm.network.attention import repeat_heads

ALIGNMENT = 8  # places; SDPA's CUDA kernels copy a mask whose rows are not a multiple of 16 bytes long


class KeyValueCache:
    """What attention needs of the tokens that were read: the prompts, then one token of every row after another.

    keys, values: (layers, rows, heads of this rank, places, head_dim) in the model's dtype, the heads those of keys
    where they are fewer; row i's tokens at places 0 .. lengths[i] - 1; `places` is `max_length` rounded up to a
    multiple of 8. Prompts are padded on the right: causal attention hides the padding from them, and the mask hides it
    from later tokens, which overwrite it one by one.

    fixed_shapes: a step looks at all places, so that every shape is the same for all steps; otherwise at those that
    the longest row has filled, which gives what attention without a cache gives, bit for bit.
    A step that is run twice without `advance` between writes the same values to the same places, so it may be run
    again to be captured.
    """

    def __init__(
        self,
        model: BaseModel,
        lengths: torch.Tensor,
        max_length: int,
        dtype: torch.dtype,
        *,
        fixed_shapes: bool = False,
    ):
        """Take memory for all layers.

        lengths: (rows,) int64 on the model's device, tokens of each prompt. max_length: of a row with its answer.
        """
        layers = model.transformer.layers
        attention = layers[0].attention
        rows = len(lengths)
        device = lengths.device
        places = -(-max_length // ALIGNMENT) * ALIGNMENT
        head_dim = attention.hidden_size_per_attention_head
        heads = attention.num_multi_query_heads_per_partition or attention.num_attention_heads_per_partition
        shape = (len(layers), rows, heads, places, head_dim)
        self.lengths = lengths.clone()
        # Zeros, since a masked place gets the weight 0 and not every number times 0 is 0.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.cross: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Keys and values of a second vision encoder by layer, of the batch's rows `cross_rows`."""
        self.cross_rows: torch.Tensor | None = None
        self.holds_prompts = False
        self.fixed_shapes = fixed_shapes
        self._longest = 0  # tokens of the longest row, known without asking the device
        # A view, so that it follows `lengths`: where a step writes.
        self._write_places = self.lengths.view(rows, 1, 1, 1).expand(-1, shape[2], -1, head_dim)
        is_prompt = torch.arange(places, device=device) < lengths[:, None]
        no_more = torch.full(is_prompt.shape, float("-inf"), dtype=dtype, device=device)
        self._mask = no_more.masked_fill_(is_prompt, 0.0).view(rows, 1, 1, places)  # added to the scores

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keep keys and values; return the attention (rows, heads, seq, head_dim) of the prompts or the next tokens."""
        if not self.holds_prompts:
            self._longest = key.shape[2]
            self.keys[layer, :, :, : self._longest] = key
            self.values[layer, :, :, : self._longest] = value
            key = repeat_heads(key, query.shape[1])
            value = repeat_heads(value, query.shape[1])
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        keys, values = self._layers_in_use[layer]
        keys.scatter_(2, self._write_places, key)
        values.scatter_(2, self._write_places, value)
        # Heads that share a key are as good as several tokens of one head, all with the same mask: nothing is repeated.
        by_key = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])
        context = F.scaled_dot_product_attention(by_key, keys, values, attn_mask=self._mask_in_use)
        return context.reshape(query.shape)

    def last_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states (rows, 1, hidden) of each prompt's last token, or of the step's only one.

        hidden: (rows, seq, hidden).
        """
        if self.holds_prompts:
            return hidden
        return hidden.gather(1, (self.lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))

    def open_next_place(self) -> None:
        """Let a step's token see itself; to be called in the step, before the model."""
        self._mask.scatter_(3, self.lengths.view(-1, 1, 1, 1), 0.0)
        in_use = self.keys.shape[3] if self.fixed_shapes else self._longest + 1
        self._mask_in_use = self._mask[..., :in_use]
        # All layers at once, since a view costs as much time as a small kernel.
        self._layers_in_use = list(zip(*(tensor[..., :in_use, :].unbind() for tensor in (self.keys, self.values))))

    def advance(self) -> None:
        """Count the step's token as one that was read."""
        self.lengths += 1
        self._longest += 1

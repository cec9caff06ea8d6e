"""The output head, and the loss that needs it on labelled positions alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sat_lora._sat import BaseMixin, ColumnParallelLinear
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.cogvlm.network.key_value_cache import KeyValueCache
from sat_lora.cogvlm.network.recompute import recompute_rows
from sat_lora.cogvlm.network.routing import to_device
from sat_lora.parallel.gradient_sum import undo_gradient_sum

CHUNK_ROWS = 1024
PARTITIONED_CHUNKS = 8
OnLogits = Callable[[torch.Tensor, torch.Tensor], None]
"""Is given logits (rows, vocabulary) and labels (rows,) of the labelled positions, in their order, some at a time; once
each where autograd does not record, which alone it is for.
"""


@dataclass(frozen=True)
class LabelledRows:
    """The positions whose next token has a label."""

    rows: torch.Tensor  # (labelled,) int64, into the flattened (batch * seq) positions
    labels: torch.Tensor  # (labelled,) int64, what follows there
    on_logits: OnLogits | None = None

    @classmethod
    def from_labels(
        cls, labels: torch.Tensor, device: torch.device | None = None, on_logits: OnLogits | None = None
    ) -> "LabelledRows":
        """Return the labelled positions of (batch, seq) labels, IGNORED where there is none.

        device: of both tensors, by default the labels'.
        """
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
        rows = (following != IGNORED).nonzero()[:, 0]
        return cls(to_device(rows, device), to_device(following[rows], device), on_logits)


class LanguageModelHead(BaseMixin):
    """The column-parallel output head, its logits gathered: (batch, seq, hidden) -> (batch, seq, vocabulary).

    With a cache, those of each row's last token alone: (batch, 1, vocabulary).

    Given labelled rows, the sum of their cross-entropies instead, computed in float32: a scalar. Many rows are cut into
    chunks, and a chunk's logits are made again in backward, so that never more than those of one are alive. Under
    ZeRO-3 each call of the head gathers its weight from all ranks, so there the number of calls is a constant.
    """

    def __init__(self, vocab_size, hidden_size, params_dtype, skip_init):
        super().__init__()
        self.lm_head = ColumnParallelLinear(
            hidden_size,
            vocab_size,
            gather_output=True,
            bias=False,
            params_dtype=params_dtype,
            skip_init=skip_init,
            module=self,
            name="lm_head",
        )

    def final_forward(
        self,
        hidden_states,
        *,
        labelled: LabelledRows | None = None,
        cache: KeyValueCache | None = None,
        **kw_args,
    ):
        """Return the logits, or the loss of `labelled`, as the class says; SAT's hook."""
        if cache is not None:
            hidden_states = cache.last_tokens(hidden_states)
        if labelled is None:
            return self.lm_head(undo_gradient_sum(hidden_states))
        # Through the hook, which switches a LoRA mixin's deltas on, in the recomputation as well.
        hook = self.transformer.hooks["final_forward"]
        rows = hidden_states.flatten(0, 1).index_select(0, labelled.rows)
        chunks = self._chunks(len(rows))
        return loss_of_rows(
            lambda part: hook(part[None], **kw_args)[0], rows, labelled.labels, chunks, labelled.on_logits
        )

    def _chunks(self, rows: int) -> int:
        if hasattr(self.lm_head.weight, "ds_id"):
            return PARTITIONED_CHUNKS
        return max(1, -(-rows // CHUNK_ROWS))


def loss_of_rows(
    head: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    labels: torch.Tensor,
    chunks: int,
    on_logits: OnLogits | None = None,
) -> torch.Tensor:
    """Return the sum of the cross-entropies of `head(rows)` (rows, vocabulary): a float32 scalar.

    rows: (rows, hidden), also none. labels: (rows,). chunks: in how many parts the logits are made.
    """

    def loss(part: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(part)
        if on_logits is not None:
            on_logits(logits, labels)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    if chunks == 1:
        return loss(rows, labels)
    parts = zip(rows.tensor_split(chunks), labels.tensor_split(chunks))
    return torch.stack([recompute_rows(loss, *part) for part in parts]).sum()

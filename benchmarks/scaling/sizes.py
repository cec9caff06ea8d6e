"""The sizes of a CogVLM, and what follows from them: its linears, its weights, its adapters."""

from collections.abc import Iterator
from dataclasses import dataclass

# model_config.json of the published checkpoint with images of 490 x 490.
COGVLM_17B = dict(
    num_layers=32,
    hidden_size=4096,
    inner_hidden_size=11008,
    num_attention_heads=32,
    vocab_size=32000,
    image_length=1225,
    eva_args=dict(
        num_layers=63,
        hidden_size=1792,
        inner_hidden_size=15360,
        num_attention_heads=16,
        in_channels=3,
        patch_size=14,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer with weight (out, in); model parallelism cuts it along `cut`, and its bias with `out`."""

    inputs: int
    outputs: int
    cut: str | None = None  # "out", "in" or nothing
    slots: int = 1  # factor pairs: 3 for a fused q/k/v
    bias: bool = False

    def weights(self, parts: int = 1) -> int:
        """Elements of weight and bias on a rank, of `parts` that share the model."""
        matrix = self.inputs * self.outputs // (parts if self.cut else 1)
        return matrix + (self.outputs // (parts if self.cut == "out" else 1) if self.bias else 0)

    def adapter(self, rank: int, parts: int = 1) -> int:
        """Elements of A (slots * r, in) and B (out, r) on a rank; the weight's cut goes through one of them."""
        down, up = self.slots * rank * self.inputs, rank * self.outputs
        return down // (parts if self.cut == "in" else 1) + up // (parts if self.cut == "out" else 1)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Layers that are all alike."""

    layers: int
    hidden: int
    linears: tuple[Linear, ...]  # of one layer and one expert
    experts: int
    norms: int  # elements of the norms of one layer

    def weights(self, parts: int = 1) -> int:
        one = self.experts * sum(linear.weights(parts) for linear in self.linears) + self.norms
        return self.layers * one

    def adapter(self, rank: int, parts: int = 1) -> int:
        return self.layers * self.experts * sum(linear.adapter(rank, parts) for linear in self.linears)


@dataclass(frozen=True)
class Sizes:
    """Built from the content of a model_config.json. Every linear is adapted, the head and the patch embedding not."""

    config: dict

    @property
    def hidden(self) -> int:
        return self.config["hidden_size"]

    @property
    def inner(self) -> int:
        return self.config["inner_hidden_size"]

    @property
    def vit_inner(self) -> int:
        return self.config["eva_args"]["inner_hidden_size"]

    @property
    def vocabulary(self) -> int:
        return self.config["vocab_size"]

    @property
    def patches(self) -> int:
        return self.config["image_length"]

    @property
    def language(self) -> Tower:
        h, inner = self.hidden, self.inner
        wide = Linear(inputs=h, outputs=inner, cut="out")
        linears = (*_attention(h, bias=False), wide, wide, Linear(inputs=inner, outputs=h, cut="in"))
        return Tower(layers=self.config["num_layers"], hidden=h, linears=linears, experts=2, norms=2 * h)

    @property
    def vit(self) -> Tower:
        sizes = self.config["eva_args"]
        h, inner = sizes["hidden_size"], self.vit_inner
        mlp = (
            Linear(inputs=h, outputs=inner, cut="out", bias=True),
            Linear(inputs=inner, outputs=h, cut="in", bias=True),
        )
        linears = (*_attention(h, bias=True), *mlp)
        return Tower(layers=sizes["num_layers"], hidden=h, linears=linears, experts=1, norms=4 * h)

    @property
    def projector(self) -> tuple[Linear, ...]:
        h, inner = self.hidden, self.inner
        shapes = ((self.vit.hidden, h), (h, inner), (h, inner), (inner, h))
        return tuple(Linear(inputs=inputs, outputs=outputs) for inputs, outputs in shapes)

    def parts_that_run_forward_only(self, parts: int = 1) -> int:
        """Elements whose output asks for no gradient: word embeddings, patch embedding, position embeddings."""
        sizes, h = self.config["eva_args"], self.vit.hidden
        patch = sizes["in_channels"] * sizes["patch_size"] ** 2 * h + h
        return self.vocabulary // parts * self.hidden + patch + (1 + self.patches) * h

    def weights(self, parts: int = 1) -> int:
        """Elements of the base on a rank, of `parts` that share the model."""
        head, class_token = self.vocabulary // parts * self.hidden, self.vit.hidden
        ends_and_norms = 2 * self.hidden + self.hidden + 2 * self.hidden  # of the image, at the end, in the projector
        rest = head + class_token + ends_and_norms + sum(linear.weights() for linear in self.projector)
        return self.language.weights(parts) + self.vit.weights(parts) + self.parts_that_run_forward_only(parts) + rest

    def adapter(self, rank: int, parts: int = 1) -> int:
        """Elements of all adapters on a rank."""
        projector = sum(linear.adapter(rank) for linear in self.projector)
        return self.language.adapter(rank, parts) + self.vit.adapter(rank, parts) + projector


def _attention(hidden: int, *, bias: bool) -> Iterator[Linear]:
    yield Linear(inputs=hidden, outputs=3 * hidden, cut="out", slots=3, bias=bias)
    yield Linear(inputs=hidden, outputs=hidden, cut="in", bias=bias)

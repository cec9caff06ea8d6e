"""CogVLM with the branches of the published code: what has no token, or no image, does not run."""

import torch

from sat_lora.cogvlm.network import experts, vision


def route_or_skip(routing, vision_expert, language_expert, x):
    """Each expert on its tokens, if it has any, by boolean masks."""
    is_vision = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.bool)
    is_vision[routing.vision] = True
    flat, output = x.reshape(-1, x.shape[-1]), None
    for expert, mask in ((vision_expert, is_vision), (language_expert, ~is_vision)):
        if mask.any():
            one = expert(flat[mask])
            output = one.new_zeros(len(flat), one.shape[-1]) if output is None else output
            output[mask] = one
    return output.view(*x.shape[:-1], -1)


def embed_or_skip(self, input_ids, *, images=None, image_places=None, **kw_args):
    words = self.transformer.word_embeddings(input_ids)
    if len(image_places) == 0:
        return words
    return words.flatten(0, 1).index_copy(0, image_places, self(images).flatten(0, 1)).view_as(words)


def branch_on_data(patch=setattr) -> None:
    """Make every CogVLM that is built from now on branch. patch: `monkeypatch.setattr`, to undo it at a test's end."""
    patch(experts, "route", route_or_skip)
    patch(vision.ImageTokens, "word_embedding_forward", embed_or_skip)

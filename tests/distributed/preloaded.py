"""What the server imports before ranks are forked from it: all that a run imports on its way, once for all of them."""

import atexit
import gc
import pkgutil
from importlib import import_module

import deepspeed.module_inject.auto_ep_layer  # noqa: F401
import deepspeed.ops.op_builder.all_ops  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (torch's compiler with it: seconds for each engine)
import matplotlib.backends.backend_agg
import matplotlib.figure
import pytest  # noqa: F401
import setuptools  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import sat_lora
import tests.tiny  # noqa: F401

for module in pkgutil.walk_packages(sat_lora.__path__, "sat_lora."):
    if not module.name.endswith("kernels"):  # which are for CUDA
        import_module(module.name)

gc.collect()
gc.freeze()  # a rank's own collections need not look at it
atexit.register(gc.unfreeze)  # else the libraries that look at their ends report what is left

"""What the server imports before ranks are forked from it: all that a run imports on its way, once for all of them."""

import atexit
import gc
import pkgutil
from importlib import import_module

import transformers

import sat_lora

MODULES = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch's compiler: seconds for each engine
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pytest",
    "setuptools",
    "tests.support.tiny",
    "torch.utils.tensorboard",
)

for name in MODULES:
    import_module(name)
for module in pkgutil.walk_packages(sat_lora.__path__, "sat_lora."):
    is_for_cuda = module.name.endswith("kernels")
    if not is_for_cuda and not module.name.startswith("sat_lora.serve"):  # ranks do not serve
        import_module(module.name)
for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):  # imported when they are asked for
    getattr(transformers, name)

gc.collect()
gc.freeze()  # a rank's own collections need not look at it
atexit.register(gc.unfreeze)  # else the libraries that look at their ends report what is left

"""The kernels of bitsandbytes, which decode on CUDA in one pass over the codes; torch decodes in several elsewhere.

They give torch's values bit for bit. bitsandbytes is imported late, and for tensors on CUDA alone: 0.50.2 takes seconds
to import, warns on some CPUs, and may fetch a kernel for them from the network.
"""

import functools

import torch

from sat_lora.printable import printable
from sat_lora.terminal.notice import warn

BLOCK = 64  # the smallest that every build of bitsandbytes has
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(codes: torch.Tensor, block: int, dtype: torch.dtype) -> bool:
    """Return whether bitsandbytes decodes NF4 codes in blocks of that length to that dtype."""
    return codes.is_cuda and block == BLOCK and dtype in DTYPES and is_usable()


def look_for_kernels(scheme: str | None, device: torch.device | str) -> None:
    """Warn before a model is loaded, and not where its first weight is decoded, that the kernels are not there.

    scheme: by which its weights are held; None: they are whole. device: the one that decodes them.
    """
    if scheme == "nf4" and torch.device(device).type == "cuda":
        is_usable()


@functools.cache
def is_usable() -> bool:
    """Return whether bitsandbytes is there and can decode on this machine's CUDA; a warning says why not, once."""
    problem = problem_with_kernels()
    if problem is not None:
        warn(
            f"quantised weights are decoded by torch, which is slower: {problem}; pip install 'sat_lora[quant]' gets "
            "the kernels, and the values are the same"
        )
    return problem is None


def problem_with_kernels() -> str | None:
    """Return why bitsandbytes cannot be used here, with the real cause; None where it decoded a block of zeros."""
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        if error.name == "bitsandbytes":
            return "bitsandbytes is not installed"
        return f"bitsandbytes cannot be imported: {printable(error)}"
    except Exception as error:  # whatever an import of foreign native code raises
        return f"bitsandbytes cannot be imported: {type(error).__name__}: {_first_line(error)}"
    try:
        codes = torch.full((1, BLOCK // 2), 0x77, dtype=torch.uint8, device="cuda")
        decoded = decode_nf4(codes, torch.ones(1, 1, dtype=torch.bfloat16, device="cuda"), torch.float32)
        if decoded.any():
            return f"bitsandbytes {bitsandbytes.__version__} decodes zeros to other numbers"
    except Exception as error:  # of a missing library for this CUDA, of a GPU that the build does not know
        return f"bitsandbytes {bitsandbytes.__version__} fails on CUDA: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0][:300])


def decode_nf4(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return W (out, in) of NF4 codes (out, in / 2) and scales (out, in / 64) in bfloat16, by bitsandbytes' kernel."""
    shape = [len(codes), 2 * codes.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.float().reshape(-1), BLOCK, "nf4", shape, dtype
    )

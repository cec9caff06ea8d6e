"""Files that are made first and filled through a mapping read like any other, and cost no memory of the process."""

import os
import resource

import pytest
import safetensors.torch
import torch

from sat_lora.files.weight_files import SAFETENSORS_DTYPES, make_safetensors_file, make_sat_file

MAKERS = {
    "sat": (make_sat_file, lambda path: torch.load(path, weights_only=True)["module"]),
    "safetensors": (make_safetensors_file, safetensors.torch.load_file),
}


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


def test_what_is_written_is_read_by_the_library_whose_format_it_is(maker, tmp_path):
    make, read = maker
    generator = torch.Generator().manual_seed(0)
    values = {
        f"{dtype}.{number}": (100 * torch.rand(shape, generator=generator)).to(dtype)
        for dtype in SAFETENSORS_DTYPES
        for number, shape in enumerate([(3,), (5, 7), (1, 1, 2), ()])
    }
    tensors = make(tmp_path / "file", {name: (tuple(value.shape), value.dtype) for name, value in values.items()})
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        tensors[name].copy_(value)
    del tensors
    found = read(tmp_path / "file")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_file_has_its_place_on_the_disk_before_it_is_filled(maker, tmp_path):
    make, _ = maker
    tensors = make(tmp_path / "file", {"x": ((1 << 20,), torch.float32)})
    assert os.stat(tmp_path / "file").st_blocks * 512 >= tensors["x"].nbytes


def test_a_file_says_that_it_is_torchs(tmp_path):
    """transformers reads no safetensors file without that."""
    make_safetensors_file(tmp_path / "file", {"x": ((1,), torch.float32)})
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def anonymous_mib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024


def test_filling_a_file_takes_no_memory_of_its_own(maker, tmp_path):
    make, _ = maker
    before = anonymous_mib()
    tensors = make(tmp_path / "file", {f"{number}": ((32, 1024, 1024), torch.float32) for number in range(4)})
    for tensor in tensors.values():
        tensor.fill_(1)
    assert anonymous_mib() - before < 64  # of 512


def test_no_space_is_an_error_before_anything_is_filled(maker, tmp_path):
    make, _ = maker
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            make(tmp_path / "file", {"x": ((1 << 20,), torch.float32)})
        except (OSError, RuntimeError):
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

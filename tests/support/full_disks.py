"""A limit on the size of a file, which stands for a full disk: the same writes fail, with EFBIG in place of ENOSPC."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def largest_file(size: int):
    """Within the block no file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

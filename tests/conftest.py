import os
import tempfile

import torch

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # checksums of folders are kept there

torch.set_num_threads(1)  # as in the processes that the tests start: the number of threads decides the rounding


def pytest_configure(config):
    config.addinivalue_line("markers", "outside: compares with a library of tests/requirements.txt")

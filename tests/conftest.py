import functools
import gc
import os
import tempfile

import pytest
import torch

from common import data, resnet, vit

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # checksums of folders are kept there

torch.set_num_threads(1)  # as in the processes that the tests start: the number of threads decides the rounding


def pytest_configure(config):
    config.addinivalue_line("markers", "outside: compares with a library of tests/requirements.txt")


def pytest_collection_finish():
    """What was imported stays. Else each full garbage collection, of which every tiny run has a few, goes through
    all objects of torch and of the test files."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def drawings_are_made_once():
    """`data.load("shapes")` draws all 10,000 images, which takes longer than most of the runs on a few of them."""
    drawn = functools.cache(data.shapes)

    def copies(n, seed):
        return [part.clone() for part in drawn(n, seed)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "shapes", copies)
        yield


@pytest.fixture
def one_block(monkeypatch):
    """The slim networks have one block: for what takes its time by every operation, as tracing and counting do."""
    monkeypatch.setitem(resnet.ARCHS, "slim", ((0, 0, 0, 1), *resnet.ARCHS["slim"][1:]))
    patch, width, _, *more = vit.VITS["vit_slim"]
    monkeypatch.setitem(vit.VITS, "vit_slim", (patch, width, 1, *more))

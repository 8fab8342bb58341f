"""What the process that others are forked from imports: the libraries, and the scripts with all that they import."""
import contextlib
import gc
import importlib

import pytest  # noqa: F401
import torchvision  # noqa: F401

from tests import processes  # noqa: F401
from tests.scripts import SCRIPTS

for script in (*SCRIPTS, "eval"):
    with contextlib.suppress(Exception):  # who imports it again is told what is wrong
        importlib.import_module(script)
gc.collect()
gc.freeze()

"""python mortal.py STEP SCRIPT FLAGS...: the script, but it dies without notice before step STEP."""
import os
import runpy
import sys

from common import run

at, script, *_ = sys.argv[1:]
sys.argv = sys.argv[2:]


def die(args, env, state, step):
    if step == int(at):
        os._exit(9)


run.interrupted = die
runpy.run_path(script, run_name="__main__")

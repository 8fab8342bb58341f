"""Everything that is to be measured on a GPU, by one command, in the order of its worth.

    python -m tests.gpu --minutes 25                   in runs/gpu; again: goes on with what is left
    python -m tests.gpu --data data/cifar10.npz --out runs/h100
    python -m tests.gpu --quick --device cpu           tiny, on a CPU: shows that it works

    tests        what the test suite checks on CUDA alone
    bank         the bank's Triton kernels against plain PyTorch and torch.compile; from how many rows they pay
    step-amoc .. images/s and TFLOP/s of a script's step on 256 images, ResNet-18 or ViT-Tiny, also with --compile
                 and, where there is one, --graph; a part for each script
    autoattack   1,000 images, against pyautoattack where that is installed
    amoc         AMOC's 200 epochs, or as many as fit into two thirds of --minutes; then its SLF and ALF

One call makes as many parts as --minutes has time for. Its last lines say what is left, and the same command goes
on with that, until nothing is. How many calls that takes is not known, as no GPU has run it yet.

Each part is a process of its own, and is ended after eight minutes or at the end of the call. One that was cut
off is made anew, by a later call, after those that were not tried yet. AMOC comes last and has what time is
left: it is ended as by Ctrl-C, and the next call goes on with it where it was, and so with its evaluations.

What a part prints is in <out>/<part>.txt. <out>/summary.json says of each part whether it is done.
"""
import argparse
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

from common import files, run
from tests.scripts import SCRIPTS

HERE = pathlib.Path(__file__).resolve().parents[1]
LONGEST = 8 * 60  # seconds of a part; AMOC has what is left


class Clock:
    def __init__(self, minutes):
        self.end = time.time() + 60 * minutes

    @property
    def left(self):
        return self.end - time.time()


def call(command, path, seconds):
    """Run `command` for at most so long, its output in the file `path`; the exit status, None if it was
    interrupted."""
    with open(path, "a") as f:
        print("$", *command, file=f, flush=True)
        process = subprocess.Popen(command, cwd=HERE, stdout=f, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a training run saves itself
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None


def said(status):
    """What the exit status of a part is called."""
    return {0: "done", None: "cut off"}.get(status, f"failed, exit status {status}")


def commands(args):
    """The parts before AMOC."""
    python = [sys.executable, "-m"]
    quick = ["--quick"] if args.quick else []
    bench = [*python, "tests.bench", "--device", args.device, *quick]
    tests = ["tests/test_bank.py", "tests/test_cuda.py", "tests/test_speed.py"]
    chosen = ["-k", "argmax"] if args.quick else ["-k", "cuda or kernel"]
    return {
        "tests": [*python, "pytest", "-q", *tests, *chosen],
        "bank": [*bench, "bank"],
        **{f"step-{script}": [*bench, "step", "--scripts", script] for script in SCRIPTS},
        "autoattack": [*bench, "autoattack"],
    }


def amoc(args, clock, state, save):
    """AMOC, in `state`'s number of epochs, which the first call finds; then its evaluations. Returns the result, as
    `said`, and where that came."""
    path = args.out / "amoc.txt"
    flags = ["--data", args.data, "--device", args.device]
    if args.quick:
        flags += ["--limit", "64", "--arch", "slim", "--batch-size", "32", "--bank-size", "64", "--steps", "1"]
    else:
        flags += ["--compile"]
    script = [sys.executable, "amoc.py", *flags]
    if "epochs" not in state:  # a short run tells how many fit
        trial = args.out / "trial"
        result = said(call([*script, "--epochs", "2", "--out", str(trial)], path, clock.left))
        if result != "done":
            return f"{result}, in the trial of two epochs"
        lines = (trial / "log.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        images = json.loads(lines[0])["data"]["images"]
        an_epoch = images / last["images_per_second"]
        state["epochs"] = 2 if args.quick else max(2, min(200, int(2 / 3 * 60 * args.minutes / an_epoch)))
        save()
    out = args.out / "amoc"
    result = said(call([*script, "--epochs", str(state["epochs"]), "--out", str(out)], path, clock.left))
    if result != "done":
        return f"{result}, in training"
    quick = "--epochs 2 --milestones 1 --limit 256 --test-limit 32".split() if args.quick else []
    evaluation = [sys.executable, "eval.py", str(out / "encoder.pt"), "--data", args.data, "--device", args.device,
                  "--preset", "knn", "amoc-slf", "amoc-alf", "--attacks", "clean", "pgd20", *quick]
    result = said(call(evaluation, path, clock.left))
    return result if result == "done" else f"{result}, in its evaluations"


def kernel_rows(text):
    """Of the bank's tables, as many as `text`, the output of its last call, has: the fewest rows from which the kernels are faster than plain
    PyTorch, for every number of queries and gradient that they list; None where they are not."""
    ratios = {}
    last = re.split(r"^\$ .*$", text, flags=re.M)[-1]  # `call` writes each command before its output
    for line in last.splitlines():
        found = re.match(r"\s*\d+ x (\d+), \w+\s+(q, bank|q)\s+([\d.,]+)\s+([\d.,]+)", line)
        if found:
            ours, plain = (float(v.replace(",", "")) for v in found.group(3, 4))
            ratios.setdefault(int(found.group(1)), []).append(plain / ours)
    good = None
    for rows in sorted(ratios, reverse=True):
        if min(ratios[rows]) <= 1:
            break
        good = rows
    return good


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=run.number(above=0), default=25.0, help="that this call may take")
    p.add_argument("--data", default=None, help="for AMOC; default: cifar10, with --quick shapes")
    p.add_argument("--device", default="cuda")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu"))
    p.add_argument("--quick", action="store_true", help="tiny sizes")
    args = p.parse_args(argv)
    args.data = args.data or ("shapes" if args.quick else "cifar10")
    args.out = args.out.resolve()
    run.device(args)  # before anything else: is there one?
    args.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.minutes)
    summary_path = args.out / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}

    def save():
        with files.replacing(summary_path) as path:
            pathlib.Path(path).write_text(json.dumps(summary, indent=1) + "\n")

    parts = commands(args)
    for name in sorted(parts, key=lambda name: name in summary):  # first what was not tried yet
        if summary.get(name, {}).get("result") == "done" or clock.left < 30:
            continue
        began = time.time()
        result = said(call(parts[name], args.out / f"{name}.txt", min(clock.left, LONGEST)))
        summary[name] = {"result": result, "seconds": round(time.time() - began)}
        if name == "bank":  # also where it was cut off: a table is there as soon as it is measured
            summary[name]["kernels from rows"] = kernel_rows((args.out / "bank.txt").read_text())
        save()
        print(f"{name}: {result}, {summary[name]['seconds']} s", flush=True)
    state = summary.setdefault("amoc", {})
    if state.get("result") != "done" and clock.left > 90:
        state["result"] = amoc(args, clock, state, save)
        save()
        print(f"amoc: {state['result']}", flush=True)
    left = [name for name in (*parts, "amoc") if summary.get(name, {}).get("result") != "done"]
    failed = [name for name, part in summary.items() if part.get("result", "").startswith("failed")]
    if failed:
        print(f"failed: {', '.join(failed)}; see {args.out}")
    print(f"left for the next call: {', '.join(left) or 'nothing'}; see {summary_path}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run.cli(main)

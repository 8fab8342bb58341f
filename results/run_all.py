"""Every row of the table "cpu-20", from nothing: about twenty CPU minutes of pretraining each, one
protocol for all.

    python results/run_all.py                    all rows, 44 runs, two at a time, at low priority
    python results/run_all.py acc rocl           these
    python results/run_all.py --list             the commands of each row; nothing is run

All of them take about 13 hours on two free cores. It can be stopped at any time; the same command goes on
where it was. Of each row it keeps the log, eval.jsonl and the pictures in results/cpu-20/; and in
results/encoders/ the encoders of the main rows (those with two seeds, random and at), of the first seed.
What is there is not made again.

The protocol: CIFAR-10 (JPEG), data/cifar10.npz, all 50,000 training images, a slim encoder, one thread. With
other data, as --data cifar10, the original, everything is kept in a folder of its own, runs/cpu-20-<data>.
The number of epochs is chosen so that pretraining takes about --seconds of CPU time on this machine:
a short run of the same command is timed first. Everything else is in ROWS below. Then

    k-NN                                         all training images
    amoc-slf                                     a linear probe, all labels
    amoc-alf, 5 epochs                           an attacked linear probe, 10,000 labels

k-NN on clean images alone, the probes also under PGD-20 at 4/255 and 8/255: all on all test images, and the
probes under AutoAttack on 500. On a ViT a pass takes nine times as long as on the slim ResNet. Its rows have
k-NN and the linear probe, and PGD-20 on 1,000 of the test images.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import threading
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATIONS = [
    "--preset knn amoc-slf --attacks clean pgd20-4 pgd20",
    "--limit 10000 --preset amoc-alf --epochs 5 --milestones 3 4 --attacks clean pgd20-4 pgd20",
    "--preset amoc-slf --attacks aa --aa-limit 500",
    "--limit 10000 --preset amoc-alf --epochs 5 --milestones 3 4 --attacks aa --aa-limit 500",
]
EVALUATIONS_OF_A_VIT = [
    "--preset knn amoc-slf --attacks clean",
    "--preset amoc-slf --attacks pgd20-4 pgd20 --test-limit 1000",
]
KEPT = ("log.jsonl", "eval.jsonl", "views.png", "masks.png", "recon.png", "positions.png")
DATA = "data/cifar10.npz"  # CIFAR-10 (JPEG)
TIMED_STEPS = 50  # of each of the two epochs of a timing run


class Row(NamedTuple):
    command: str  # a script and its flags, with --batch-size; without --data, --epochs, --seed and --out
    seeds: int = 1
    needs: str = ""  # the row whose encoder the command reads
    encoder: bool = False  # whether it is kept; those of rows with two seeds are in any case

    @property
    def evaluations(self):
        return EVALUATIONS_OF_A_VIT if "vit" in self.command else EVALUATIONS

    @property
    def batch_size(self):
        words = self.command.split()
        return int(words[words.index("--batch-size") + 1])


SLIM = "--arch slim --batch-size 64"
BANK = "--arch slim --batch-size 256"  # the bank as a player
ATTACK = "--steps 2 --step-size 4"
AMOC = f"amoc.py {SLIM} --warmup 0 --bank-size 512 --ema 0.99 --lr 0.2 --weight-decay 1e-4"
ACL = f"acl.py {SLIM} --warmup 0 --lr 1.5"
ADVCL = f"advcl.py {SLIM} --warmup 0 --lr 0.1 {ATTACK}"
BYORL = f"byorl.py {SLIM} --warmup 0 --hidden 512 --lr 0.5 --ema 0.99"
ROTNET = f"rotnet.py {SLIM} --warmup 0 --optimizer sgd --lr 0.05 --weight-decay 5e-4 --steps 2"
ADIOS = f"adios.py {SLIM} --warmup 0 --lr 0.4 --mask-width 8 --mask-lr 0.5 --mask-weight 0.3"
VIT = "--arch vit_slim --batch-size 64 --decoder 64 1 4 --lr 2e-3 --warmup 1"

# In the order in which they are run: the main ones first.
ROWS = {
    "random": Row(f"{AMOC} --epochs 0", encoder=True),
    "acc": Row(f"{AMOC} {ATTACK} --variant ACC", seeds=2),
    "moco": Row(f"{AMOC} --variant CCC", seeds=2),
    "simclr": Row(f"{ACL} --variant s2s", seeds=2),
    "acl": Row(f"{ACL} {ATTACK}", seeds=2),
    "rocl": Row(f"rocl.py {SLIM} --warmup 0 --lr 1.5 {ATTACK}", seeds=2),
    "advcl": Row(ADVCL, seeds=2),
    "byol": Row(f"{BYORL} --eps 0", seeds=2),
    "byorl": Row(f"{BYORL} --steps 2 --step-size 5", seeds=2),
    "adco": Row(f"adco.py {BANK}", seeds=2),
    "caco": Row(f"caco.py {BANK}", seeds=2),
    "mae": Row(f"adv_mae.py {VIT} --eps 0", seeds=2),
    "adv_mae": Row(f"adv_mae.py {VIT} --steps 2", seeds=2),
    "at": Row(f"{ROTNET} --target labels --eps 8 --step-size 4", encoder=True),
    "trades": Row(f"{ROTNET} --target labels --loss trades --eps 8 --step-size 4"),
    "rotnet": Row(f"{ROTNET} --eps 0"),
    "adv_rotnet": Row(f"{ROTNET} --eps 8 --step-size 4"),
    "acl-a2a": Row(f"{ACL} {ATTACK} --variant a2a"),
    "aca": Row(f"{AMOC} {ATTACK} --variant ACA"),
    "advcl-labels": Row(f"{ADVCL} --teacher {{runs}}/simclr/encoder.pt", needs="simclr"),
    "hybrid": Row(f"adco.py {BANK} --eps 8 {ATTACK} --bank-temperature 0.12"),
    "clae": Row(f"clae.py {SLIM} --lr 1e-3 --lr-final 0"),
    "ifm": Row(f"hardneg.py {BANK} --negatives ifm"),
    "hcl": Row(f"hardneg.py {BANK} --negatives hcl"),
    "mochi": Row(f"hardneg.py {BANK} --negatives mochi --mix-from 1"),
    "adios": Row(ADIOS),
    "adios-s": Row(f"{ADIOS} --single"),
    "mae-plus": Row(f"adpe.py {VIT} --adv-lr 2e-3 --radius 0"),
    "adpe": Row(f"adpe.py {VIT} --adv-lr 2e-3"),
    "unified": Row(f"unified.py {VIT}"),
    "ap-dpe": Row(f"pretext.py {SLIM} --ramp 0 {ATTACK} --pool-layers 2 --lr 0.01"),
    "vit-random": Row(f"adv_mae.py {VIT} --epochs 0"),
}

# Held while a row's run is made: a row that needs another's encoder may come while that is under way.
PRETRAINING = {(name, seed): threading.Lock() for name, row in ROWS.items() for seed in range(row.seeds)}


def command_of(row, args, seed, out, epochs=None):
    """The command that pretrains `row` into the folder `out`, as words. A row that has --epochs of its own
    keeps them."""
    script, *flags = shlex.split(row.command.format(runs=args.runs))
    if "--epochs" not in flags:
        flags += ["--epochs", str(epochs)]
    return [script, "--data", args.data, *flags, "--seed", str(seed), "--out", str(out)]


def name_of(name, seed):
    """What the folder of a row is called: the seed is left out where it is 0."""
    return f"{name}-{seed}" if seed else name


def epochs_for(seconds, steps_per_epoch, first, second):
    """How many epochs take `seconds`. `first` and `second` are the times of two epochs of TIMED_STEPS each:
    what the first took longer is spent once in a run, whatever its length."""
    once = max(0.0, first - second)
    an_epoch = second / TIMED_STEPS * steps_per_epoch
    return max(1, round((seconds - once) / an_epoch))


def run(words):
    """Run a python command of the project in one thread at low priority. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["nice", "-n", "19", sys.executable, *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def timed(name, row, args):
    """The CPU times of the first and the second epoch of a short run of `row`."""
    out = args.runs / "timing" / name
    shutil.rmtree(ROOT / out, ignore_errors=True)
    limit = TIMED_STEPS * row.batch_size
    run([*command_of(row, args, 0, out, 2), "--limit", str(limit)])
    lines = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
    first, both = [line["cpu_seconds"] for line in lines[1:]]
    return first, both - first


def pretrain(name, row, seed, args):
    """The folder of a row's run, with its encoder in it, which is made if it is not there."""
    out = args.runs / name_of(name, seed)
    with PRETRAINING[name, seed]:
        take_up(name, seed, out, args)
        if not (ROOT / out / "encoder.pt").exists():
            pretrain_anew(name, row, seed, out, args)
    return out


def pretrain_anew(name, row, seed, out, args):
    """Choose the epochs of a row, if that was not done, and begin its run, or go on with it."""
    chosen = ROOT / args.runs / f"{name}.epochs"  # of all seeds, and of a run that goes on
    if "--epochs" not in row.command and not chosen.exists():
        images = args.images or 50000
        epochs = epochs_for(args.seconds, images // row.batch_size, *timed(name, row, args))
        chosen.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_text(f"{epochs}\n")
    epochs = int(chosen.read_text()) if chosen.exists() else None
    limit = ["--limit", str(args.images)] if args.images else []
    run([*command_of(row, args, seed, out, epochs), *limit])


def copy(files, source, target):
    """Copy those of `files` that are in the folder `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if (source / file).exists():
            shutil.copy(source / file, target)


def take_up(name, seed, out, args):
    """Put what is kept of a row into its run's folder `out`, where that is gone."""
    encoder = ROOT / args.encoders / f"{name}.pt"
    if seed == 0 and encoder.exists() and not (ROOT / out / "encoder.pt").exists():
        copy(KEPT, ROOT / args.results / name, ROOT / out)
        shutil.copy(encoder, ROOT / out / "encoder.pt")


def keep(name, seed, out, args):
    """Copy what is to be kept of the run in `out`."""
    copy(KEPT, ROOT / out, ROOT / args.results / name_of(name, seed))
    if seed == 0 and (ROWS[name].seeds > 1 or ROWS[name].encoder):
        (ROOT / args.encoders).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / out / "encoder.pt", ROOT / args.encoders / f"{name}.pt")


def is_complete(name, seed, args):
    """Whether the results hold all evaluations of a row."""
    path = ROOT / args.results / name_of(name, seed) / "eval.jsonl"
    if not path.exists():
        return False
    measured = set()
    for line in path.read_text().splitlines():
        line = json.loads(line)
        measured |= {(line["preset"], attack) for attack in line["results"]}
    return all(measured_by(flags) <= measured for flags in ROWS[name].evaluations)


def measured_by(flags):
    """(preset, attack) of what eval.py measures with `flags`, some of EVALUATIONS."""
    words = flags.split()
    presets = [preset for preset in ("knn", "amoc-slf", "amoc-alf") if preset in words]
    attacks = [attack for attack in ("clean", "pgd20-4", "pgd20", "aa") if attack in words]
    return {(preset, attack) for preset in presets for attack in attacks if preset != "knn" or attack == "clean"}


def make(name, row, seed, args):
    """Pretrain and evaluate a row, and keep the results after each evaluation."""
    if row.needs:
        pretrain(row.needs, ROWS[row.needs], 0, args)
    out = pretrain(name, row, seed, args)
    for flags in row.evaluations:
        test = ["--test-limit", str(args.test_images)] if args.test_images else []  # the last one counts
        run(["eval.py", str(out / "encoder.pt"), "--data", args.data, *shlex.split(flags), *test])
        keep(name, seed, out, args)


def said(error):
    """The command that failed, as one would type it."""
    return shlex.join(map(str, ["python", *error.cmd[4:]]))


def make_or_say(name, row, seed, args):
    """As `make`; what fails is said, and stops no other row. Returns whether it went well."""
    print(f"{name_of(name, seed)} begins", flush=True)
    try:
        make(name, row, seed, args)
    except subprocess.CalledProcessError as error:
        print(f"{name_of(name, seed)} FAILED: {said(error)}", flush=True)
        return False
    print(f"{name_of(name, seed)} is complete", flush=True)
    return True


def in_order(names):
    """(name, seed) of what is to be made: the first seeds of all rows before any second one; a row
    after the one that it needs."""
    jobs = []
    for seed in range(max(ROWS[name].seeds for name in names)):
        jobs += [(name, seed) for name in names if seed < ROWS[name].seeds]
    return jobs


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", metavar="row", help="default: all")
    p.add_argument("--list", action="store_true", help="print the commands")
    p.add_argument("--jobs", type=int, default=2, help="rows at a time, each on one thread")
    p.add_argument("--seconds", type=float, default=1200.0, help="of pretraining, CPU time")
    p.add_argument("--data", default=DATA, help="as of the scripts")
    p.add_argument("--images", type=int, help="training images for pretraining; default: all 50,000")
    p.add_argument("--test-images", type=int, help="default: all 10,000")
    p.add_argument("--runs", type=pathlib.Path, help="for the runs; default: runs/cpu-20")
    p.add_argument("--results", type=pathlib.Path,
                   help="for what is kept of them; default: results/cpu-20, of other data <runs>/results")
    p.add_argument("--encoders", type=pathlib.Path,
                   help="for the encoders that are kept; default: results/encoders, of other data <runs>/encoders")
    return p


def parse(argv):
    """The flags, with the folders that fit the data: rows of two data sets never lie side by side."""
    args = parser().parse_args(argv)
    ours = args.data == DATA
    args.runs = args.runs or pathlib.Path("runs/cpu-20" if ours else f"runs/cpu-20-{pathlib.Path(args.data).stem}")
    kept = pathlib.Path("results") if ours else args.runs
    args.results = args.results or kept / ("cpu-20" if ours else "results")
    args.encoders = args.encoders or kept / "encoders"
    return args


def main(argv=None):
    args = parse(argv)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    names = args.rows or list(ROWS)
    without = [name for name in names if "--batch-size" not in ROWS[name].command.split()]
    if without:
        raise SystemExit(f"ROWS[{without[0]!r}] has no --batch-size, from which its epochs are chosen; "
                         "add it to the command of this row")
    if args.list:
        for name in names:
            words = command_of(ROWS[name], args, 0, args.runs / name, "EPOCHS")
            print(f"{name}: python {shlex.join(words)}")
        return
    if args.data.endswith(".npz") and not (ROOT / args.data).exists():
        raise SystemExit(f"{args.data} is not there; --data cifar10 downloads the original")
    jobs = [job for job in in_order(names) if not is_complete(*job, args)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(make_or_say, name, ROWS[name], seed, args) for name, seed in jobs]
        went_well = [future.result() for future in futures]
    if not all(went_well):
        raise SystemExit("not all rows are complete; what failed is named above")


if __name__ == "__main__":
    main()

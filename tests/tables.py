"""The tables of docs/evaluation.md, as the code has them.

    python -m tests.tables     prints them
"""
from evaluation.attacks import ATTACKS, Attack, AutoAttack, Corruptions, DeepFool
from evaluation.presets import PRESETS


def presets():
    rows = ["| preset | trains | on | epochs | lr | batch | augmentation |", "|---|---|---|---|---|---|---|"]
    losses = {"clean": "clean images", "pgd": "PGD-10 images", "trades": "TRADES",
              "at+ss": "two views, PGD-10 images, contrast"}
    for name, p in PRESETS.items():
        schedule = f", ×0.1 at {', '.join(map(str, p.milestones))}" if p.milestones else ", cosine"
        length = p.epochs or f"{p.steps} steps"
        trains = {"linear": "the linear layer", "last": "the last stage, anew", "all": "everything"}[p.trains]
        if p.fresh_last and p.trains == "all":
            trains += ", the last stage anew"
        rows.append(f"| `{name}` | {trains} | {losses[p.loss]} | {length} | {p.lr:g}{schedule} ({p.optimizer}) "
                    f"| {p.batch_size} | {p.augment} |")
    return "\n".join(rows)


def attacks():
    rows = ["| attack | what it is |", "|---|---|"]
    for name, row in ATTACKS.items():
        rows.append(f"| `{name}` | {describe(row)} |")
    return "\n".join(rows)


def length(norm, eps):
    return f"{255 * eps:g}/255" if norm == "linf" else f"{eps:g}"


def describe(row):
    if isinstance(row, Attack):
        return (f"PGD of {row.steps} steps of {length(row.norm, row.step_size)}, {row.norm.replace('_', ' ')} "
                f"{length(row.norm, row.eps)}, from a uniform start")
    if isinstance(row, AutoAttack):
        return f"AutoAttack, version {row.version}, {row.norm} {length(row.norm, row.eps)}"
    if isinstance(row, DeepFool):
        return f"DeepFool, cut to linf {length('linf', row.eps)}; a weak attack"
    assert isinstance(row, Corruptions)
    origin = "of the public CIFAR-10-C or CIFAR-100-C files in `--data-dir`" if row.public else "made anew, for side 32"
    return f"no attack: the mean over {len(row.kinds)} common corruptions of severity 1 to 5, {origin}"


if __name__ == "__main__":
    print(presets(), attacks(), sep="\n\n")

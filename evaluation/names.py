"""The names of attacks: those of ATTACKS (evaluation/attacks.py), and a grammar for all others.

    pgd<steps>-<eps>[-l2|-l1][/<step>]     PGD as pgd20 has it; pgd50-8/0.8, pgd20-1-l2
    aa-<eps>[-l2]                          AutoAttack, version standard; aa-2, aa-1-l2

In linf, eps and step are in 1/255; in l2 and l1 they are in units of pixels in [0, 1]. A step that is left
out is eps / 4 in linf, eps / 5 in l2, and eps / 10 in l1, as it is for pgd20, pgd20-l2 and pgd20-l1.
"""
import decimal
import math
import re

from evaluation.attacks import ATTACKS, CURVE, Attack, AutoAttack

NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
PGD = re.compile(rf"pgd0*([1-9][0-9]{{0,4}})-({NUMBER})(?:-(l2|l1))?(?:/({NUMBER}))?")
AUTOATTACK = re.compile(rf"aa-({NUMBER})(?:-(l2))?")
GRAMMAR = ("pgd<steps>-<eps>[-l2|-l1][/<step>] as pgd50-8/0.8 or pgd20-1-l2, or aa-<eps>[-l2] as aa-2; linf eps "
           "and step in 1/255, steps from 1 to 99999")
STEPS_PER_EPS = {"linf": 4, "l2": 5, "l1": 10}  # eps over the step that is left out

CURVES = {
    "curve": CURVE,
    "curve-l2": ("clean", "pgd20-0.25-l2", "pgd20-l2", "pgd20-1-l2", "pgd20-2-l2", "pgd20-4-l2"),
    # Only the number of steps changes: pgd1-8 too moves by 2/255, from a uniform start; it is not FGSM
    "curve-steps": ("pgd1-8", "pgd5-8", "pgd10-8", "pgd20", "pgd50-8", "pgd100-8"),
}


def attack_named(name):
    """The row of ATTACKS, or what the grammar makes of `name`; None for "clean". Raises ValueError where it
    is no name of an attack."""
    if name == "clean":
        return None
    if name in ATTACKS:
        return ATTACKS[name]
    found = PGD.fullmatch(name)
    if found:
        norm = found[3] or "linf"
        eps = length(name, "eps", found[2], norm)
        step_size = length(name, "step", found[4], norm) if found[4] else eps / STEPS_PER_EPS[norm]
        return Attack(norm, eps, step_size, int(found[1]))
    found = AUTOATTACK.fullmatch(name)
    if found:
        norm = found[2] or "linf"
        return AutoAttack(norm, length(name, "eps", found[1], norm))
    raise ValueError(f"{name}: no attack; take a name that --help lists, or {GRAMMAR}")


def length(name, what, text, norm):
    """The number `text` in pixels. ValueError where the attack `name` cannot have it as `what`."""
    value = float(text)
    most = 255 if norm == "linf" else 1e6
    if not 0 < value <= most:
        unit = " in 1/255" if norm == "linf" else ""
        raise ValueError(f"{name}: its {what} must be above 0 and at most {most:g}{unit}")
    return value / 255 if norm == "linf" else value


def same(row, other):
    """Whether two rows are one attack, up to rounding."""
    return type(row) is type(other) and all(
        math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b
        for a, b in zip(row, other))


def canonical(name):
    """The one name of the attack `name`: that of ATTACKS with the same settings, else the grammar's shortest.
    Raises ValueError as `attack_named` does."""
    row = attack_named(name)
    if row is None or name in ATTACKS:
        return name
    for known, other in ATTACKS.items():
        if same(row, other):
            return known
    if isinstance(row, AutoAttack):
        eps, norm = AUTOATTACK.fullmatch(name).groups()
        return f"aa-{shortest(eps)}" + (f"-{norm}" if norm else "")
    steps, eps, norm, step = PGD.fullmatch(name).groups()
    short = f"pgd{steps}-{shortest(eps)}" + (f"-{norm}" if norm else "")
    if step and not same(row, attack_named(short)):
        short += f"/{shortest(step)}"
    return short


def shortest(number):
    """The decimal `number`, a text, without zeros that mean nothing."""
    return format(decimal.Decimal(number).normalize(), "f")

"""What stands beside our figures in the table: how methods are grouped, and what was published of
them.

    python -m evaluation.published     all published figures, as docs/published.md has them

Figures are in %; a triple is accuracy on clean images, under PGD-20 and under AutoAttack, linf 8/255.
"""
from typing import NamedTuple


def not_zero(number):
    return bool(number)


def linf(norm):
    return norm in (None, "linf")  # older logs do not name it


GROUPS = {  # what is adversarial: scripts, with the flags that make them so
    "not pretrained": [(None, {"epochs": 0})],
    "with labels": [("rotnet", {"target": "labels"})],
    "nothing adversarial": [
        ("amoc", {"variant": "CCC"}), ("amoc", {"variant": "CCA"}), ("acl", {"variant": "s2s"}),
        ("byorl", {"eps": 0.0}), ("adv_mae", {"eps": 0.0}), ("unified", {"eps": 0.0}),
        ("unified", {"attack": "none"}), ("adpe", {"radius": 0.0}),
        ("adios", {"masker": "none"}), ("adios", {"masker": "random"}), ("rotnet", {"eps": 0.0}),
        ("pretext", {"eps": 0.0}), ("hardneg", {"negatives": "plain"}), ("clae", {"eps": 0.0}),
        ("clae", {"random": True})],
    "pixels": [(script, {}) for script in (
        "rocl", "acl", "advcl", "clae", "amoc", "byorl", "adv_mae", "unified",
        "rotnet", "pretext")],
    "pixels and bank": [(script, {"eps": not_zero}) for script in ("adco", "caco")],
    "bank": [(script, {}) for script in ("adco", "caco")],
    "masks and positions": [(script, {}) for script in ("adpe", "adios")],
    "negatives, by a rule": [("hardneg", {})],
}

# Sources
FAN = "Fan et al. 2021"
ROBUSTSSL = "RobustSSL benchmark"
AMOC = "Xu & Yang 2020"
README = "Xu & Yang, an older README"
ROCL = "Kim et al., README"
ACL = "Jiang et al. 2020"
SURVEY = "Qi & Shah 2022"
DEACL = "DeACL, README"
TARO = "TARO's paper"
CLAE = "Ho & Vasconcelos 2020"

NOTHING = (None, None, None)


class Row(NamedTuple):
    """What a source says of a ResNet-18: each figure a triple, None where it says nothing."""

    method: str
    source: str
    data: str  # "A to B": pretrained on A, its classifier trained and judged on B
    epochs: int  # of pretraining; None: not stated, or there is none
    slf: tuple = NOTHING
    alf: tuple = NOTHING
    aff: tuple = NOTHING


ROWS = [
    # Tables 1, 2, 4
    Row("supervised AT", FAN, "CIFAR-10", None, (79.77, 44.40, 42.22), (79.06, 46.75, None),
        (79.86, 49.89, 46.19)),
    Row("supervised AT", FAN, "CIFAR-100", None, (50.53, 23.41, 19.53), NOTHING, (52.22, 25.86, 21.61)),
    Row("supervised AT", FAN, "CIFAR-10 to STL-10", None, (54.70, 30.45, 22.26), NOTHING,
        (62.78, 36.70, 33.10)),
    Row("supervised AT", FAN, "CIFAR-100 to STL-10", None, (51.11, 23.63, 19.54), NOTHING,
        (55.85, 32.43, 29.18)),
    Row("AP-DPE", FAN, "CIFAR-10", None, (78.30, 18.22, 16.07), NOTHING, (81.19, 51.52, 48.13)),
    Row("AP-DPE", FAN, "CIFAR-100", None, (47.91, 6.23, 4.17), NOTHING, (55.27, 26.89, 22.53)),
    Row("RoCL", FAN, "CIFAR-10", 1000, (79.90, 39.54, 28.38), (77.33, 43.11, None), (81.01, 51.35, 47.88)),
    Row("RoCL", FAN, "CIFAR-100", 1000, (49.53, 18.79, 8.66), NOTHING, (55.10, 27.49, 22.38)),
    Row("RoCL", FAN, "CIFAR-10 to STL-10", 1000, (54.56, 28.18, 18.65), NOTHING, (61.75, 34.65, 29.40)),
    Row("RoCL", FAN, "CIFAR-100 to STL-10", 1000, (47.86, 21.93, 12.39), NOTHING, (57.83, 31.38, 27.55)),
    Row("ACL", FAN, "CIFAR-10", 1000, (77.88, 42.87, 39.13), (77.71, 45.40, None), (82.19, 52.82, 49.27)),
    Row("ACL", FAN, "CIFAR-100", 1000, (47.51, 20.97, 16.33), NOTHING, (56.61, 29.38, 23.63)),
    Row("ACL", FAN, "CIFAR-10 to STL-10", 1000, (55.81, 31.80, 25.29), NOTHING, (62.65, 35.93, 32.50)),
    Row("ACL", FAN, "CIFAR-100 to STL-10", 1000, (45.91, 26.32, 21.75), NOTHING, (57.16, 32.41, 28.68)),
    Row("AdvCL", FAN, "CIFAR-10", 1000, (80.85, 50.45, 42.57), (79.39, 52.01, None), (83.62, 52.77, 49.77)),
    Row("AdvCL", FAN, "CIFAR-100", 1000, (48.34, 27.67, 19.78), NOTHING, (56.77, 28.73, 24.72)),
    Row("AdvCL", FAN, "CIFAR-10 to STL-10", 1000, (63.73, 35.80, 25.74), NOTHING, (63.52, 37.78, 34.70)),
    Row("AdvCL", FAN, "CIFAR-100 to STL-10", 1000, (50.71, 30.35, 20.86), NOTHING, (61.56, 33.70, 30.51)),
    Row("AdvCL, no pseudo-labels", FAN, "CIFAR-10", 1000, (77.73, 48.89, None)),
    # Tables 3 to 6
    Row("CCC (MoCo)", AMOC, "CIFAR-10", 200, (82.01, 0.14, None), (15.44, 8.04, None)),
    Row("CAC", AMOC, "CIFAR-10", 200, (78.46, 0.00, None), (12.39, 8.69, None)),
    Row("CAA", AMOC, "CIFAR-10", 200, (79.29, 0.00, None), (15.39, 5.54, None)),
    Row("ACC", AMOC, "CIFAR-10", 200, (78.74, 36.87, None), (74.84, 44.16, None), (83.04, 52.09, None)),
    Row("ACA", AMOC, "CIFAR-10", 200, (77.52, 37.01, None), (73.33, 44.50, None), (82.67, 52.97, None)),
    Row("ACL", AMOC, "CIFAR-10", 200, NOTHING, NOTHING, (81.21, 48.83, None)),
    Row("ACC", AMOC, "CIFAR-10", 1000, (86.15, 44.89, None), (84.22, 50.83, None), (83.39, 53.35, 48.06)),
    Row("ACA", AMOC, "CIFAR-10", 1000, (86.09, 46.09, None), (83.98, 51.35, None), (83.13, 53.05, 47.85)),
    Row("ACL", AMOC, "CIFAR-10", 1000, (79.76, 30.31, None), (74.22, 44.22, None)),
    Row("adversarial training", AMOC, "CIFAR-10", None, NOTHING, NOTHING, (84.91, 45.12, 41.33)),
    Row("TRADES", AMOC, "CIFAR-10", None, NOTHING, NOTHING, (80.68, 51.64, 47.30)),
    Row("ACC", README, "CIFAR-10", None, NOTHING, (84.22, 50.89, 40.89)),
    Row("ACA", README, "CIFAR-10", None, NOTHING, (83.98, 51.35, 41.53)),
    Row("ACA*", README, "CIFAR-10", None, NOTHING, (84.34, 50.69, 40.90), (83.20, 52.89, 47.71)),
    Row("RoCL", ROCL, "CIFAR-10", 1000, (83.71, 40.27, None), (80.43, 47.69, None), (91.34, 49.66, None)),
    Row("ACL", ACL, "CIFAR-10", 1000, NOTHING, NOTHING, (82.19, 52.82, None)),
    Row("ACL", ACL, "CIFAR-100", 1000, NOTHING, NOTHING, (56.77, 28.33, None)),
    Row("DynACL-AIR++", ROBUSTSSL, "CIFAR-10", None, (81.80, None, 46.99), (79.56, None, 48.23),
        (82.36, None, 50.79)),
    Row("DynACL++", ROBUSTSSL, "CIFAR-10", None, (79.82, None, 46.54), (78.81, None, 47.98),
        (81.93, None, 50.34)),
    Row("DynACL-AIR", ROBUSTSSL, "CIFAR-10", None, (78.08, None, 45.17), (77.42, None, 46.14),
        (82.74, None, 50.58)),
    Row("DynACL", ROBUSTSSL, "CIFAR-10", None, (75.41, None, 45.09), (72.97, None, 45.67),
        (81.86, None, 50.52)),
    Row("DynACL-RCS", ROBUSTSSL, "CIFAR-10", None, (77.14, None, 44.29), (74.95, None, 45.75),
        (80.70, None, 49.63)),
    Row("DeACL", ROBUSTSSL, "CIFAR-10", None, (79.94, None, 43.27), (77.71, None, 41.99),
        (78.29, None, 44.96)),
    Row("AdvCL", ROBUSTSSL, "CIFAR-10", 1000, (82.36, None, 43.18), (80.04, None, 44.05),
        (83.00, None, 49.61)),
    Row("A-InfoNCE (ImageNet labels)", ROBUSTSSL, "CIFAR-10", None, (83.70, None, 42.72),
        (80.30, None, 43.28), (82.99, None, 49.73)),
    Row("ACL", ROBUSTSSL, "CIFAR-10", 1000, (78.22, None, 39.17), (75.53, None, 40.60), (81.25, None, 49.60)),
    Row("RoCL", ROBUSTSSL, "CIFAR-10", 1000, (77.90, None, 26.12), (75.62, None, 29.69),
        (78.51, None, 45.02)),
    Row("DynACL-AIR++", ROBUSTSSL, "CIFAR-100", None, (53.93, None, 20.61), (52.09, None, 22.96),
        (57.57, None, 25.58)),
    Row("DynACL-AIR++", ROBUSTSSL, "STL-10, 96 px", None, (71.44, None, 47.90), (71.45, None, 48.59),
        (72.42, None, 44.09)),
    Row("DynACL-AIR", ROBUSTSSL, "CIFAR-100", None, (46.19, None, 20.13), (45.46, None, 21.53),
        (57.75, None, 25.97)),
    Row("DynACL-AIR", ROBUSTSSL, "STL-10, 96 px", None, (72.25, None, 47.71), (71.60, None, 48.89),
        (73.10, None, 48.10)),
    Row("DynACL-AIR", ROBUSTSSL, "CIFAR-10 to STL-10", None, (55.84, None, 29.64), (57.14, None, 31.24),
        (63.74, None, 35.66)),
    Row("DynACL-AIR", ROBUSTSSL, "CIFAR-100 to STL-10", None, (48.20, None, 23.24), (48.55, None, 26.60),
        (58.59, None, 31.42)),
    Row("DynACL", ROBUSTSSL, "CIFAR-100", None, (45.83, None, 19.30), (43.58, None, 20.69),
        (57.43, None, 24.88)),
    Row("DynACL", ROBUSTSSL, "STL-10, 96 px", None, (69.56, None, 46.61), (67.65, None, 47.69),
        (72.14, None, 45.65)),
    Row("DynACL", ROBUSTSSL, "CIFAR-10 to STL-10", None, (52.41, None, 29.17), (49.55, None, 29.59),
        (63.53, None, 35.25)),
    Row("DynACL", ROBUSTSSL, "CIFAR-100 to STL-10", None, (47.54, None, 23.17), (45.70, None, 26.24),
        (58.35, None, 31.17)),
    Row("AdvCL", ROBUSTSSL, "CIFAR-100", 1000, (44.60, None, 19.10), (39.85, None, 18.19),
        (58.29, None, 25.26)),
    Row("AdvCL", ROBUSTSSL, "CIFAR-10 to STL-10", 1000, (62.78, None, 28.38), (58.73, None, 27.88),
        (68.14, None, 33.84)),
    Row("AdvCL", ROBUSTSSL, "CIFAR-100 to STL-10", 1000, (49.80, None, 18.06), (44.54, None, 19.60),
        (61.24, None, 30.50)),
    Row("ACL", ROBUSTSSL, "CIFAR-100", 1000, (45.82, None, 17.30), (43.49, None, 19.07),
        (57.74, None, 24.78)),
    Row("ACL", ROBUSTSSL, "STL-10, 96 px", 1000, (67.90, None, 35.80), (69.96, None, 38.10),
        (72.55, None, 43.21)),
    Row("ACL", ROBUSTSSL, "CIFAR-10 to STL-10", 1000, (56.50, None, 27.52), (60.86, None, 28.16),
        (61.41, None, 32.66)),
    Row("ACL", ROBUSTSSL, "CIFAR-100 to STL-10", 1000, (47.59, None, 21.91), (45.24, None, 24.40),
        (56.23, None, 28.76)),
    Row("RoCL", ROBUSTSSL, "CIFAR-100", 1000, (42.93, None, 8.72)),
    Row("RoCL", ROBUSTSSL, "STL-10, 96 px", 1000, (78.19, None, 26.51)),
    Row("DeACL", DEACL, "CIFAR-10", None, (80.82, 53.45, 46.14), (79.39, 55.30, 45.55),
        (83.64, 54.23, 50.75)),
    Row("TARO", TARO, "CIFAR-10", None, (78.45, None, 35.81)),
    Row("CLAE", CLAE, "CIFAR-10", 100, (76.70, None, None)),
    Row("CLAE", CLAE, "CIFAR-100", 100, (55.52, None, None)),
    Row("SimCLR with IFM", SURVEY, "CIFAR-10", None, (91.90, None, None)),
    Row("SimCLR with IFM", SURVEY, "CIFAR-100", None, (68.80, None, None)),
    Row("adversarial training", SURVEY, "CIFAR-10", None, NOTHING, NOTHING, (78.99, 47.41, None)),
    Row("TRADES", SURVEY, "CIFAR-10", None, NOTHING, NOTHING, (81.00, 53.27, None)),
    Row("SimCLR", SURVEY, "CIFAR-10", None, (91.25, 0.63, None)),
    Row("adversarial training", SURVEY, "CIFAR-100", None, NOTHING, NOTHING, (49.49, 23.00, None)),
    Row("TRADES", SURVEY, "CIFAR-100", None, NOTHING, NOTHING, (54.59, 28.43, None)),
]

TITLE = """\
# Published figures

`python -m evaluation.published` prints this page. Nothing here is ours, and none of it has been reproduced.
Figures are accuracy in %.

## Linear probes and fine-tuning

ResNet-18; clean images / PGD-20 / AutoAttack, linf 8/255. SLF: a linear classifier trained on clean images;
ALF: on attacked ones; AFF: everything fine-tuned under attack.
"""

NOTES = """\
- Fan et al.: the epochs are those of their code; the text names none. Their recipe for ALF is in a
  supplement that was not at hand. Pseudo-labels of AdvCL are from ImageNet's SimCLR unless said; so are the
  benchmark's for AdvCL and A-InfoNCE.
- Xu & Yang: CCC, ACC and so on are AMOC's variants. Adversarial training and TRADES start from scratch, and
  stand under AFF. ACA* is taken to be ACA_PLUS.
- Kim et al.: AFF is their joint fine-tuning, AT+SS. The survey repeats these figures, and ACL's AFF.
- RobustSSL benchmark: leaderboard of December 2023. DynACL++ and DynACL-AIR++ are post-processed. "STL-10,
  96 px" is another network, with a 7x7 stem of stride 2 and max-pooling.
- CLAE: the mean of its runs, ± 0.36 and ± 0.3. The survey has it among robust figures; it is of clean images.
- ACL's AFF on CIFAR-100 is 28.33 under PGD-20 in its paper and 29.38 in Fan et al.
- On frozen encoders PGD-20 reads 2 to 11 points above AutoAttack."""


class Table(NamedTuple):
    """Figures that are no such triples, as the source has them."""

    title: str
    note: str
    head: tuple
    rows: tuple


TABLES = [
    Table(
        "Xu & Yang 2020: more attacks",
        "Full fine-tuning of encoders pretrained for 1000 epochs; AT and TRADES from scratch. CIFAR-10, "
        "ResNet-18; l1 is 12 and l2 0.5, 50 steps each.",
        ("", "clean", "PGD-20", "DeepFool", "AutoAttack", "l1", "l2"), (
              ("ACC", 83.39, 53.35, 53.45, 48.06, 59.50, 62.16),
              ("ACA", 83.13, 53.05, 53.20, 47.85, 59.79, 62.19),
              ("AT", 84.91, 45.12, 50.37, 41.33, 52.45, 54.82),
              ("TRADES", 80.68, 51.64, 52.13, 47.30, 58.12, 60.04),
              ("ACC, linear (older README)", 84.22, 50.89, 50.77, 40.89, 67.36, 64.89),
              ("ACA, linear (older README)", 83.98, 51.35, 51.56, 41.53, 67.61, 64.93),
              ("ACA*, linear (older README)", 84.34, 50.69, 50.82, 40.90, 67.36, 64.55),
              ("ACA*, full (older README)", 83.20, 52.89, 53.10, 47.71, 59.63, 62.52))),
    Table(
        "Fan et al. 2021, Tables 4 and 5: AdvCL's parts",
        "SLF, CIFAR-10, ResNet-18.",
        ("", "clean", "PGD-20"), (
              ("views x1+d, x2", 77.07, 42.12), ("x1+d, x2+d", 73.12, 42.48),
              ("x1+d, x2+d, x1, x2", 74.22, 43.51), ("x+d, x1, x2", 80.17, 50.19),
              ("x+d, x1, x2, xl", 79.83, 49.51), ("x+d, x1, x2, xl, xh", 80.14, 50.03),
              ("x+d, x1, x2, xh", 80.85, 50.45), ("no pseudo-labels", 77.73, 48.89),
              ("CIFAR-10 SimCLR, K 10", 80.34, 50.10), ("CIFAR-10 SimCLR, K 100", 79.52, 49.21),
              ("ImageNet SimCLR, K 2", 79.72, 50.09), ("ImageNet SimCLR, K 10", 79.93, 50.12),
              ("ImageNet SimCLR, K 50", 79.55, 49.27), ("ImageNet SimCLR, K 100", 79.07, 49.16),
              ("ImageNet SimCLR, K 500", 78.96, 49.03), ("ImageNet SimCLR, all five K", 80.85, 50.45))),
    Table(
        "Chen et al. 2020 (AP-DPE), Table 3",
        "Clean / PGD-20 / the epoch that was picked; CIFAR-10, ResNet-50 v2. P1 not pretrained, P2 "
        "pretrained, P3 pretrained under attack; F1, F2 train the last stage and the classifier, F3, F4 "
        "everything; F1, F3 on clean images, F2, F4 on PGD-10. Table 5 has 83.74 / 48.83 for Jigsaw, P3 F4.",
        ("", "Selfie", "Rotation", "Jigsaw"), (
              ("P1 F3", "94.24 / 0 / 92", "the same", "the same"),
              ("P1 F4", "84.72 / 47.22 / 99", "the same", "the same"),
              ("P2 F4", "85.56 / 50.42 / 60", "86.66 / 50.95 / 45", "85.18 / 50.94 / 46"),
              ("P3 F1", "78.93 / 6.30 / 82", "86.83 / 18.22 / 99", "80.47 / 2.68 / 87"),
              ("P3 F2", "74.30 / 37.65 / 64", "82.32 / 45.10 / 47", "72.76 / 32.59 / 51"),
              ("P3 F3", "94.69 / 0 / 86", "94.79 / 0 / 92", "93.06 / 0 / 93"),
              ("P3 F4", "86.02 / 51.05 / 50", "85.66 / 50.40 / 46", "84.50 / 49.61 / 48"))),
    Table(
        "Chen et al. 2020: tasks together",
        "After F4. An ensemble is the mean softmax of fine-tuned models.",
        ("", "clean", "PGD-20"), (
              ("jointly, lambda 0 (AP+SE)", 84.44, 49.53), ("jointly (AP+DPE)", 83.00, 52.22),
              ("ensemble of Jigsaw, Rotation", 85.36, 53.08), ("ensemble of Jigsaw, Selfie", 85.64, 53.32),
              ("ensemble of Rotation, Selfie", 86.51, 53.83),
              ("ensemble of all (AutoAttack 51.56, RobustBench)", 86.04, 54.64))),
    Table(
        "Rebuffi et al. 2023: RotNet, transfer from ImageNet",
        "ViT-B/16, 224 pixels. Accuracy on clean images after pretraining without attack / linf 4/255 / l2 "
        "4.",
        ("", "SGD", "AdamW"), (
              ("CIFAR-10", "94.79 / 96.90 / 96.79", "96.14 / 97.29 / 97.43"),
              ("CIFAR-100", "78.65 / 83.00 / 83.48", "82.55 / 85.22 / 86.45"),
              ("SUN-397", "59.79 / 61.52 / 63.95", "68.01 / 69.09 / 70.27"),
              ("RESISC-45", "94.56 / 94.29 / 95.14", "95.15 / 95.30 / 95.93"),
              ("DMLAB", "63.73 / 69.01 / 68.89", "66.80 / 68.60 / 68.31"),
              ("mean of the five", "78.30 / 80.94 / 81.65", "81.73 / 83.10 / 83.68"))),
    Table(
        "Rebuffi et al. 2023: MAE, transfer from ImageNet",
        "The same without attack / linf 1/255 / l2 0.5.",
        ("", "SGD", "AdamW"), (
              ("CIFAR-10", "96.77 / 97.78 / 98.00", "98.03 / 98.30 / 98.46"),
              ("CIFAR-100", "83.28 / 86.39 / 86.68", "88.15 / 89.24 / 89.74"),
              ("mean of the five", "–", "87.10 / 87.49 / 87.96"))),
    Table(
        "Qi & Shah 2022, Table 3: ADIOS",
        "SimCLR + ADIOS (SimCLR alone), ResNet-18, pretrained on ImageNet100 at 96 pixels: accuracy on "
        "clean images.",
        ("", "linear", "fine-tuned"), (
              ("CIFAR-10", "34.6 (30.1)", "93.4 (91.3)"), ("CIFAR-100", "11.0 (10.2)", "71.8 (70.0)"))),
    Table(
        "Qi & Shah 2022, Table 4, and Wang et al. 2023: AdPE",
        "ImageNet, ViT-B, 1600 epochs unless said, fine-tuned: accuracy on clean images.",
        ("", "MAE+", "embedding", "coordinate"), (
              ("absolute positions", "83.9", "84.1", "84.2"), ("relative positions", "84.2", "84.3", "84.4"),
              ("400 epochs; with FGSM on pixels", "83.51; 83.09", "–", "–"))),
    Table(
        "AdCo and CaCo",
        "ImageNet, ResNet-50, linear: accuracy on clean images.",
        ("", "200 epochs", "800 epochs"), (
              ("AdCo", "68.6 (the survey: 68.2)", "72.8"), ("AdCo, symmetric", "70.6", "–"),
              ("AdCo, multi-crop", "73.2", "75.7"), ("CaCo, batch 1024", "71.3", "–"),
              ("CaCo, batch 4096", "72.0", "75.3 (the survey: 75.4)"),
              ("CaCo, multi-crop, batch 2048", "–", "75.7"))),
    Table(
        "IFM and MoCHi",
        "ResNet-50, linear: accuracy on clean images. IFM on ImageNet-100, MoCHi on ImageNet (the survey).",
        ("", "accuracy"), (
              ("MoCo v2 on ImageNet-100", "80.5"), ("IFM, eps 0.05", "81.1"), ("IFM, eps 0.1", "81.4"),
              ("IFM, eps 0.2", "80.9"), ("MoCHi, 200 epochs", "68.0"), ("MoCHi, 800 epochs", "68.7"))),
]


def three(figures):
    """Clean / PGD-20 / AutoAttack; nothing where there is none of them."""
    if figures == NOTHING:
        return ""
    return " / ".join("–" if value is None else f"{value:.2f}" for value in figures)


def find(method, source, data, epochs=1000):
    """The row of these. Raises StopIteration where there is none."""
    return next(row for row in ROWS if row[:4] == (method, source, data, epochs))


def beside(row, whose, note=""):
    """The text beside our figures: source, setting, and what is known of a frozen encoder's."""
    known = [("SLF", row.slf), ("ALF", row.alf)]
    figures = ", ".join(f"{name} {three(values)}" for name, values in known if values != NOTHING)
    epochs = f", {row.epochs} epochs" if row.epochs else ""
    return f"{whose}, {row.data}, ResNet-18{epochs}{note}: {figures}"


def cifar10(name):
    return "cifar10" in str(name) and not cifar100(name)


def cifar100(name):
    return "cifar100" in str(name)


PUBLISHED = [  # (script, flags, text); the first that fits is shown
    ("rocl", {"data": cifar10, "norm": linf, "asymmetry": None},
     beside(find("RoCL", ROBUSTSSL, "CIFAR-10"), ROBUSTSSL)),
    ("rocl", {"data": cifar100, "norm": linf, "asymmetry": None},
     beside(find("RoCL", ROBUSTSSL, "CIFAR-100"), ROBUSTSSL)),
    ("acl", {"data": cifar10, "variant": "ds", "norm": linf},
     beside(find("ACL", ROBUSTSSL, "CIFAR-10"), ROBUSTSSL)),
    ("acl", {"data": cifar100, "variant": "ds", "norm": linf},
     beside(find("ACL", ROBUSTSSL, "CIFAR-100"), ROBUSTSSL)),
    ("advcl", {"data": cifar10, "teacher": None, "labels": None, "norm": linf},
     beside(find("AdvCL, no pseudo-labels", FAN, "CIFAR-10"), "its paper")),
    ("advcl", {"data": cifar10, "norm": linf},
     beside(find("AdvCL", ROBUSTSSL, "CIFAR-10"), ROBUSTSSL, ", ImageNet's labels")),
    ("amoc", {"data": cifar10, "variant": "CCC"},
     beside(find("CCC (MoCo)", AMOC, "CIFAR-10", 200), "AMOC's paper")),
    ("amoc", {"data": cifar10, "variant": "CAC", "norm": linf},
     beside(find("CAC", AMOC, "CIFAR-10", 200), "its paper")),
    ("amoc", {"data": cifar10, "variant": "CAA", "norm": linf},
     beside(find("CAA", AMOC, "CIFAR-10", 200), "its paper")),
    ("amoc", {"data": cifar10, "variant": "ACC", "norm": linf},
     beside(find("ACC", AMOC, "CIFAR-10", 200), "its paper")),
    ("amoc", {"data": cifar10, "variant": "ACA", "norm": linf},
     beside(find("ACA", AMOC, "CIFAR-10", 200), "its paper")),
    ("rotnet", {"data": cifar10, "target": "labels", "loss": "ce", "norm": linf, "eps": not_zero},
     beside(find("supervised AT", FAN, "CIFAR-10", None), FAN)),
    ("pretext",
     {"data": cifar10, "tasks": ["selfie", "rotation", "jigsaw"], "eps": not_zero, "lam": not_zero},
     beside(find("AP-DPE", FAN, "CIFAR-10", None), FAN)),
]


# (script, flags, row): with what evaluation/ranks.py compares our linear probes; the first that fits. As
# far as it goes from one source: Fan et al. have most of these, by one protocol.
COMPARED = [(script, {"data": cifar10, **flags}, row) for script, flags, row in [
    ("rotnet", {"target": "labels", "loss": "ce", "norm": linf, "eps": not_zero},
     find("supervised AT", FAN, "CIFAR-10", None)),
    ("pretext", {"tasks": ["selfie", "rotation", "jigsaw"], "eps": not_zero, "lam": not_zero},
     find("AP-DPE", FAN, "CIFAR-10", None)),
    ("rocl", {"asymmetry": None, "norm": linf}, find("RoCL", FAN, "CIFAR-10")),
    ("acl", {"variant": "ds", "norm": linf}, find("ACL", FAN, "CIFAR-10")),
    ("acl", {"variant": "s2s"}, find("SimCLR", SURVEY, "CIFAR-10", None)),
    ("advcl", {"teacher": None, "labels": None, "norm": linf},
     find("AdvCL, no pseudo-labels", FAN, "CIFAR-10")),
    ("advcl", {"norm": linf}, find("AdvCL", FAN, "CIFAR-10")),
    ("clae", {"random": False, "alpha": not_zero, "eps": not_zero}, find("CLAE", CLAE, "CIFAR-10", 100)),
    ("amoc", {"variant": "CCC"}, find("CCC (MoCo)", AMOC, "CIFAR-10", 200)),
    ("amoc", {"variant": "CAC", "norm": linf}, find("CAC", AMOC, "CIFAR-10", 200)),
    ("amoc", {"variant": "CAA", "norm": linf}, find("CAA", AMOC, "CIFAR-10", 200)),
    ("amoc", {"variant": "ACC", "norm": linf}, find("ACC", AMOC, "CIFAR-10", 200)),
    ("amoc", {"variant": "ACA", "norm": linf}, find("ACA", AMOC, "CIFAR-10", 200)),
]]


def markdown():
    """All of it, in the words of docs/published.md."""
    out = [TITLE]
    head = ("", "source", "data", "epochs", "SLF", "ALF", "AFF")
    rows = []
    for row in ROWS:
        figures = [three(values) for values in (row.slf, row.alf, row.aff)]
        rows.append([row.method, row.source, row.data, row.epochs or "–", *figures])
    out += [*lines(head, rows), "", NOTES]
    for table in TABLES:
        out += ["", f"## {table.title}", "", table.note, "", *lines(table.head, table.rows)]
    return "\n".join(out)


def lines(head, rows):
    """A Markdown table; floats have two digits."""
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


if __name__ == "__main__":
    print(markdown())

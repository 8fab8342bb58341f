"""What stands beside our figures in the table: how methods are grouped, and what was published of
them."""


GROUPS = {  # what is adversarial: scripts, with the flags that make them so
    "not pretrained": [(None, {"epochs": 0})],
    "with labels": [("rotnet", {"target": "labels"})],
    "nothing adversarial": [
        ("amoc", {"variant": "CCC"}), ("amoc", {"variant": "CCA"}), ("acl", {"variant": "s2s"}),
        ("byorl", {"eps": 0.0}), ("adv_mae", {"eps": 0.0}), ("adpe", {"radius": 0.0}),
        ("adios", {"masker": "none"}), ("adios", {"masker": "random"}), ("rotnet", {"eps": 0.0})],
    "pixels": [(script, {}) for script in ("rocl", "acl", "advcl", "amoc", "byorl", "adv_mae", "rotnet")],
    "bank": [(script, {}) for script in ("adco", "caco")],
    "masks and positions": [(script, {}) for script in ("adpe", "adios")],
}


def cifar10(name):
    return "cifar10" in str(name)


PUBLISHED = [  # (script, flags, accuracy / PGD-20 / AutoAttack at linf 8/255)
    ("rocl", {"data": cifar10},
     "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs: SLF 77.90 / – / 26.12, ALF 75.62 / – / 29.69"),
    ("acl", {"data": cifar10, "variant": "ds"},
     "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs: SLF 78.22 / – / 39.17, ALF 75.53 / – / 40.60"),
    ("advcl", {"data": cifar10, "teacher": None},
     "its paper, CIFAR-10, ResNet-18, 1000 epochs: SLF 77.73 / 48.89 / –"),
    ("advcl", {"data": cifar10}, "RobustSSL benchmark, CIFAR-10, ResNet-18, 1000 epochs, ImageNet's labels: "
                                 "SLF 82.36 / – / 43.18, ALF 80.04 / – / 44.05"),
    ("amoc", {"data": cifar10, "variant": "CCC"},
     "AMOC's paper, CIFAR-10, ResNet-18, 200 epochs: SLF 82.01 / 0.14 / –, ALF 15.44 / 8.04 / –"),
    ("amoc", {"data": cifar10, "variant": "ACC"},
     "its paper, CIFAR-10, ResNet-18, 200 epochs: SLF 78.74 / 36.87 / –, ALF 74.84 / 44.16 / –"),
    ("amoc", {"data": cifar10, "variant": "ACA"},
     "its paper, CIFAR-10, ResNet-18, 200 epochs: SLF 77.52 / 37.01 / –, ALF 73.33 / 44.50 / –"),
]

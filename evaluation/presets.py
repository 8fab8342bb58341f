"""How classifiers are trained on frozen or whole encoders: the recipes of the papers and of the
RobustSSL benchmark (github.com/RobustSSL)."""
import json
from typing import NamedTuple


class Preset(NamedTuple):
    """How a classifier is trained: rate x0.1 at `milestones`; or linear over `warmup`, then a
    cosine."""

    trains: str  # "linear" (encoder frozen), "last" (the last stage of a ResNet is not), or "all"
    loss: str  # "clean", "pgd", "trades" or "at+ss" (see eval.classifier_loss)
    epochs: int  # 0: see `steps`
    milestones: tuple  # empty: cosine to `lr_end`
    lr: float
    weight_decay: float
    batch_size: int
    zero: bool  # the classifier starts at zero, else at PyTorch's default
    augment: str  # "reflect" or "constant" (pad 4, crop, flip), "rrc" (resized crop, flip), "flip",
    # "rocl" (jitter, grey, resized crop, flip), or "none"
    step_size: float = 2 / 255  # of the training attack: linf 8/255, 10 steps
    nesterov: bool = False
    uniform: bool = True  # start of the training attack: uniform in the ball, else TRADES' Gaussian of 0.001
    optimizer: str = "sgd"  # momentum 0.9; "lars", which leaves biases alone; "adamw", betas 0.9 and 0.999
    warmup: int = 0  # epochs
    layer_decay: float = 1.0  # adamw: rate of a block over that of the next
    drop_path: float = 0.0  # of the last block (encoders.drop_path)
    smoothing: float = 0.0  # of the labels; this and the next two with loss "clean"
    mixup: float = 0.0  # parameter of its Beta distribution; 0: off. With both, each batch takes one
    cutmix: float = 0.0
    head_std: float = 0.0  # after `zero`, of the weights
    renew_norm: bool = False  # encoders.renew_norm
    batch_norm: bool = False  # a BatchNorm without affine before the classifier
    pick: str = ""  # the epoch that is best on held-out images: "clean", or under "pgd20"; "": the last one
    dual: bool = False  # clean images through BN branch "clean", attacked through "adv", where there are both
    fresh_last: bool = False  # encoders.renew_last_stage
    ramp: int = 0  # steps in which the rate rises linearly, from `ramp_from` of what it would be
    ramp_from: float = 0.0
    steps: int = 0  # instead of epochs; the cosine begins after the ramp
    clip: float = 0.0  # largest norm of the gradient of all weights together; 0: any
    lr_end: float = 1e-6  # of the cosine


HELD_OUT = 0.1  # share of the training images by which an epoch is picked
# A recipe does not name these where they are as by default.
LATER = ("fresh_last", "ramp", "ramp_from", "steps", "clip", "lr_end")


def recipe_of(p):
    """Preset `p` as eval.jsonl keeps it, in plain types. Results are known again by it, so that it must not
    change where only a field was added: what came later is named where it differs from the default. The
    choice of an epoch was once a share of images, on which PGD-20 decided."""
    recipe = {}
    for name, value in p._asdict().items():
        if name == "pick":
            recipe["validation"] = HELD_OUT if value else 0.0
            if value == "clean":
                recipe["pick"] = value
        elif name not in LATER or value != Preset._field_defaults[name]:
            recipe[name] = value
    return json.loads(json.dumps(recipe))


def name_of(preset, recipe, vote=None):
    """What a result of the preset named `preset` by `recipe`, both as eval.jsonl has them, is called: the
    preset, and what was changed of it: "mae-tune layer-decay=0.75". That of a vote, with what the flags say
    of it (`flags.vote_of`), goes on with that: "amoc-slf vote=10 vote-sigma=0.25"."""
    changed = changes(preset, recipe)
    parts = [f"{field.replace('_', '-')}={text(value)}" for field, value in changed.items()]
    if vote:
        parts += [f"vote={vote['copies']}", f"vote-sigma={text(vote['sigma'])}"]
        if vote["draws"] != VOTE_DRAWS:
            parts.append(f"vote-draws={vote['draws']}")
    return " ".join([preset, *parts])


def changes(preset, recipe):
    """{field: value} of `recipe` where it is not that of the preset named `preset`, in the order of the
    preset's fields. A field that the recipe lacks is younger than the result, and as by default."""
    if preset not in PRESETS or not isinstance(recipe, dict):
        return {}
    usual = filled(recipe_of(PRESETS[preset]))
    found = {**usual, **filled(recipe)}
    return {field: found[field] for field in Preset._fields if found[field] != usual[field]}


def filled(recipe):
    """`recipe` of eval.jsonl with the fields that it does not name."""
    pick = "pgd20" if recipe.get("validation") else ""
    return {**Preset._field_defaults, "pick": pick, **recipe}


def text(value):
    """The value of a field as the flags take it, without spaces."""
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value) or "none"


def in_order(names):
    """The `names` of results (see `name_of`) of one preset: that without changes first, then by value."""
    def key(name):
        pairs = [part.partition("=") for part in name.split()[1:]]
        return [(field, number(value), value) for field, _, value in pairs]

    return sorted(names, key=key)


def number(value):
    try:
        return float(value)
    except ValueError:
        return 0.0


CHEN = Preset("last", "clean", 100, (30, 50), 0.1, 3e-4, 256, False, "constant", pick="clean",
              fresh_last=True, ramp=200, ramp_from=0.1)
MAE_TUNE = Preset("all", "clean", 100, (), 2e-3, 0.05, 1024, True, "rrc", optimizer="adamw", warmup=5,
                  layer_decay=0.65, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0, head_std=2e-5,
                  renew_norm=True)

PRESETS = {
    # Xu & Yang 2020 (2012.13154) and its code
    "amoc-slf": Preset("linear", "clean", 25, (15, 20), 0.1, 2e-4, 128, True, "reflect"),
    "amoc-alf": Preset("linear", "pgd", 25, (15, 20), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-alf-trades": Preset("linear", "trades", 25, (15, 20), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-full": Preset("all", "clean", 40, (30, 35), 0.1, 2e-4, 128, True, "reflect"),
    "amoc-aff": Preset("all", "pgd", 40, (30, 35), 0.1, 5e-4, 128, True, "reflect"),
    "amoc-aff-trades": Preset("all", "trades", 100, (40, 60), 0.1, 5e-4, 128, True, "reflect"),
    # Kim et al. 2020 (2006.07589); that the adversarial probe is un-augmented too is inferred
    "rocl-slf": Preset("linear", "clean", 150, (30, 50, 100), 0.1, 5e-4, 1024, False, "none"),
    "rocl-alf": Preset("linear", "pgd", 150, (30, 50, 100), 0.1, 5e-4, 1024, False, "none", step_size=0.007),
    # AT+SS. No command for it was published: schedule and decay are those of the probes; the code's projector
    # is the pretrained one, which an exported encoder lacks: here a new one of its shape
    "rocl-aff": Preset("all", "at+ss", 150, (30, 50, 100), 0.1, 5e-4, 1024, False, "rocl", step_size=0.007),
    # Jiang et al. 2020 (2010.13337); the probe reads BN clean: --bn clean. That the best epoch is best
    # under attack is inferred
    "acl-probe": Preset("linear", "clean", 100, (), 0.1, 0.0, 512, False, "none", nesterov=True),
    "acl-aff-25": Preset("all", "trades", 25, (15, 20), 0.1, 2e-4, 128, True, "constant", uniform=False,
                         pick="pgd20"),
    "acl-aff-100": Preset("all", "trades", 100, (40, 60), 0.1, 2e-4, 128, True, "constant", uniform=False),
    # Chen et al. 2020 (2003.12862), P x F; not stated: that a frozen trunk is in eval mode. Decay and ramp
    # are the code's, which has F4 alone and lowers the rate at 60 and 80
    "chen-f1": CHEN,
    "chen-f2": CHEN._replace(loss="pgd"),
    "chen-f3": CHEN._replace(trains="all"),
    "chen-f4": CHEN._replace(trains="all", loss="pgd"),
    # Fan et al. 2021 (2111.01124)
    "advcl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, False, "constant"),
    # The RobustSSL benchmark, CIFAR-10. To be given by hand: for ACL and DynACL its milestones are (10,
    # 20), for ACL's AFF 100 epochs (40, 60), for AdvCL's one branch (--bn adv), for other data sets
    # other rates
    "robustssl-slf": Preset("linear", "clean", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
    "robustssl-alf": Preset("linear", "pgd", 25, (15, 20), 0.01, 2e-4, 512, True, "constant"),
    "robustssl-aff": Preset("all", "trades", 25, (15, 20), 0.1, 2e-4, 128, True, "constant", uniform=False,
                            dual=True),
    # From scratch, for encoders exported with --epochs 0. Adversarial training as in AMOC's tables; TRADES as
    # in its paper (Zhang et al. 2019, 1901.08573), whose further milestones 90 and 100 are never reached
    "at": Preset("all", "pgd", 200, (102, 154), 0.1, 2e-4, 128, False, "reflect"),
    "trades": Preset("all", "trades", 76, (75,), 0.1, 2e-4, 128, False, "constant", uniform=False),
    # Hu et al. 2021 (2011.08435) and Wang et al. 2022 (2203.14370), ImageNet; of CaCo's, start and crop are
    # taken from AdCo's, and the biases are left alone
    "adco-slf": Preset("linear", "clean", 100, (), 10.0, 0.0, 256, True, "rrc", head_std=0.01, lr_end=0.01),
    "caco-slf": Preset("linear", "clean", 100, (), 0.4, 0.0, 4096, True, "rrc", optimizer="lars",
                       head_std=0.01, lr_end=0.0),
    # Shi et al. 2022 (2201.13100), its code, which puts LARS around SGD by default; the crop is inferred
    "adios-slf": Preset("linear", "clean", 100, (60, 80), 0.1, 0.0, 128, False, "rrc"),
    # Rebuffi et al. 2023, App. E. What is not said of the first is MAE's; layer decays .65 to .95 were swept
    "rebuffi-tune": MAE_TUNE._replace(lr=5e-4, batch_size=512),
    "rebuffi-sgd": Preset("all", "clean", 0, (), 0.01, 0.0, 512, False, "flip", renew_norm=True, ramp=500,
                          steps=2500, clip=1.0, lr_end=0.0),
    # He et al. 2021 (2111.06377) and its code, ViT-B; the probe reads our features, not the cls token. The
    # code's recipe has a rate of 5e-4 per 256 images and layer decay .65; the paper's Table 9, 1e-3 and .75
    "mae-tune": MAE_TUNE,
    "mae-slf": Preset("linear", "clean", 90, (), 6.4, 0.0, 16384, True, "rrc", optimizer="lars", warmup=10,
                      head_std=0.01, batch_norm=True),
    # Ours, for CIFAR-10; not tuned
    "mae-tune-cifar": Preset("all", "clean", 100, (), 1e-3, 0.05, 256, True, "constant", optimizer="adamw",
                             warmup=5, layer_decay=0.75, drop_path=0.1, smoothing=0.1,
                             head_std=2e-5, renew_norm=True),
    "mae-slf-cifar": Preset("linear", "clean", 25, (15, 20), 0.1, 0.0, 128, True, "constant",
                            batch_norm=True),
}

VOTE_DRAWS = 10  # over which PGD averages the gradient of a vote, unless --vote-draws says otherwise

PROTOCOLS = ("slf", "alf", "aff")  # of the RobustSSL benchmark: presets robustssl-slf, ...

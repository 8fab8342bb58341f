"""What training a classifier needs besides its loss: the network, batches, optimizers, rates."""
import torch
from torch import nn
from torchvision.transforms import v2

from common import data, encoders, optim
from common.augment import (
    random_color_jitter, random_flip, random_grayscale, random_pad_crop, random_resized_crop, to_float)
from evaluation.presets import HELD_OUT


class Classifier(nn.Module):
    """Images in [0, 1] (B, 3, H, W) -> logits (B, classes).

    picked_epoch    the epoch, from 1, whose weights these are; None: the last one, or not known
    history         the accuracies on held-out images after each epoch: [{"epoch", "clean", "pgd20"}]
    """

    def __init__(self, encoder, classes, batch_norm=False):
        super().__init__()
        self.projector = None  # of loss "at+ss", while it is trained
        self.picked_epoch = None
        self.history = []
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, classes)
        self.norm = nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False) if batch_norm else nn.Identity()

    def forward(self, x):
        return self.head(self.norm(self.encoder(x)))


def start(net, p):
    """Put the classifier `net` where preset `p` starts it."""
    net.head.reset_parameters()
    if p.zero:
        nn.init.zeros_(net.head.weight)
        nn.init.zeros_(net.head.bias)
    if p.head_std:
        nn.init.normal_(net.head.weight, std=p.head_std)
    if p.renew_norm:
        encoders.renew_norm(net.encoder)
    if p.fresh_last:
        encoders.renew_last_stage(net.encoder, "this preset")
    if p.loss == "at+ss":
        net.projector = encoders.mlp(net.encoder.dim, 2048, 128).to(net.head.weight.device)
    encoders.drop_path(net.encoder, p.drop_path)


def trained_parts(encoder, p):
    """The modules of the encoder that preset `p` trains."""
    if p.trains == "all":
        return [encoder]
    if p.trains == "last":
        return encoders.last_stage(encoder, "this preset")
    return []


def lr_at(p, epoch, progress, step):
    """The learning rate of preset `p` in `epoch`, `progress` epochs and `step` steps into the run."""
    if p.milestones:
        lr = p.lr * 0.1 ** sum(epoch >= m for m in p.milestones)
    elif p.steps:
        lr = optim.cosine((step - p.ramp) / (p.steps - p.ramp), p.lr, p.lr_end)
    else:
        lr = optim.warmup_cosine(progress, p.epochs, p.warmup, p.lr, p.lr_end)
    if step < p.ramp:
        lr *= p.ramp_from + (1 - p.ramp_from) * step / p.ramp
    return lr


def optimizer(net, p):
    """That of preset `p` for the classifier; every group has a `scale` for its rate."""
    named = [(name, w) for name, w in net.named_parameters() if w.requires_grad]
    if p.optimizer == "adamw":
        stages = [[f"encoder.{part}" for part in parts] for parts in encoders.stages(net.encoder)]
        exempt = "encoder.cls_token", "encoder.pos_embed"
        return torch.optim.AdamW(optim.groups(named, p.weight_decay, exempt, stages, p.layer_decay), p.lr)
    if p.optimizer == "lars":
        groups = [{"params": [w], "scale": 1.0, "trust": None if w.dim() < 2 else 0.001} for _, w in named]
        return optim.LARS(groups, p.lr, momentum=0.9, weight_decay=p.weight_decay)
    group = {"params": [w for _, w in named], "scale": 1.0}
    return torch.optim.SGD([group], p.lr, momentum=0.9, weight_decay=p.weight_decay, nesterov=p.nesterov)


def augment(x, y, rng, p, mix):
    """A training batch of preset `p` from uint8 images: x (B, 3, H, W) in [0, 1], y as `mix` leaves
    it."""
    if p.augment == "rrc":
        x = random_resized_crop(x, rng, x.shape[2], scale=(0.08, 1.0), flip=0.5, filter="bicubic")
    elif p.augment == "rocl":  # as in its pretraining
        x = random_grayscale(random_color_jitter(to_float(x), rng, 0.4, 0.4, 0.4, 0.1, p=0.8), rng, p=0.2)
        x = random_resized_crop(x, rng, x.shape[2], scale=(0.08, 1.0), flip=0.5)
    elif p.augment == "flip":
        x = random_flip(to_float(x), rng)
    elif p.augment != "none":
        x = random_flip(random_pad_crop(to_float(x), rng, 4, p.augment), rng)
    x, y = mix(to_float(x), y)
    return x.contiguous(memory_format=torch.channels_last), y


def mixer(p, classes):
    """Mixup or cutmix, at random, as a function of (x, y); of nothing where the preset has neither.
    Random numbers are the global generator's."""
    mixes = []
    if p.mixup:
        mixes.append(v2.MixUp(alpha=p.mixup, num_classes=classes))
    if p.cutmix:
        mixes.append(v2.CutMix(alpha=p.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else unmixed


def unmixed(x, y):
    return x, y


def hold_out(images, p):
    """The training images that preset `p` keeps for the choice of the epoch (None: none), and those to
    train on."""
    return data.hold_out(images, HELD_OUT if p.pick else 0.0)

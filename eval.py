"""Evaluation of exported encoders: k-NN, linear probes, fine-tuning, accuracy under attack; one
table.

This program knows nothing of how an encoder was pretrained. The field has three names for what it
trains:

    SLF  standard linear fine-tuning      the encoder is frozen; cross-entropy on clean images
    ALF  adversarial linear fine-tuning   the encoder is frozen; cross-entropy on PGD-10 images
    AFF  adversarial full fine-tuning     everything is trained, on PGD-10 images, or with TRADES

A preset is the recipe of a paper or of the RobustSSL benchmark (evaluation/presets.py): what is
trained, on which loss, with which optimizer, rates, batch size, epochs and augmentation. --protocol
slf is short for --preset robustssl-slf, and so on. A flag given by hand wins over the preset. The
training attack is linf 8/255, 10 steps. Training images are cropped and mirrored, as the preset
says. The epoch that counts is the last one, or, with acl-aff-25 and chen-f1 to chen-f4, the best on
training images that are held out; none is ever chosen on the test set. Test images are never
augmented. chen-f1 and chen-f2 train a ResNet's last stage, started anew, and freeze what precedes it.

Modes: a frozen encoder is in eval mode throughout. In full fine-tuning the attack sees eval mode,
the update train mode. Preset robustssl-aff lets clean images through BatchNorm branch "clean" and
attacked ones through "adv", where there are both. Judging is in eval mode. Everything is float32,
without TF32.

Attacks (evaluation/attacks.py) have names: pgd20 is 20 steps at linf 8/255, pgd20-4 at 4/255,
pgd50-l2-amoc is 50 steps in l2 as in AMOC's paper, aa is AutoAttack, curve is pgd20 at eight radii,
c, c19, c-like and c17-like are corruptions, no attack. Any other PGD or AutoAttack has a name by a
grammar (evaluation/names.py): pgd50-8/0.8, pgd20-1-l2, aa-2. PGD alone flatters: on the papers' frozen
encoders it reads 2 to 11 points above AutoAttack. With each AutoAttack comes a check that its figure means
something (`sanity`).

Masked-image models are usually judged by fine-tuning on clean images (mae-tune; it works for ResNets too):
AdamW, a lower rate for earlier blocks, and for a ViT a new LayerNorm after the mean of its tokens.
MAE's recipe also has RandAugment and random erasing, which are not here.

    python eval.py runs/amoc/encoder.pt --preset knn amoc-slf amoc-alf
    python eval.py runs/*/encoder.pt --protocol slf alf aff --attacks clean pgd20 aa --aa-limit 1000
    python eval.py runs/amoc/encoder.pt --preset amoc-aff --attacks clean pgd20 pgd50-l2-amoc
    python eval.py runs/adv_mae/encoder.pt --preset mae-tune-cifar mae-slf-cifar
    python eval.py runs/amoc/encoder.pt --data stl10 --image-size 32     another data set than its own
    python eval.py runs/amoc/encoder.pt --attacks curve c-like --pictures
    python eval.py runs/amoc/encoder.pt --test-data cifar10.1_v6_data.npy   other test images too
    python eval.py runs/amoc/encoder.pt --attacks pgd20 --source runs/rocl/classifier-amoc-slf.pt    transfer
    python eval.py runs/amoc/encoder.pt --vote 10 --vote-sigma 0.25 --attacks clean pgd20 aa --aa-limit 100
    python eval.py results/cifar10-jpeg/* --kept --preset amoc-slf       the table of what was measured
    python eval.py weights.pth --encoder torchvision:resnet18 --prefix module.backbone.    another program's

    python eval.py --ensemble runs/*/classifier-amoc-slf*.pt --attacks clean pgd20 aa    their mean softmax
    python eval.py --matrix runs/*/classifier-amoc-slf*.pt --attacks pgd20    attack on each, accuracy of all

With --vote n, what is judged is the mean softmax over n copies of an image with Gaussian noise, a vote
(evaluation/vote.py), and its columns are named so. Every query draws new noise, and each attack averages
its gradient over several draws: otherwise the noise would hide the gradient, and the figure would mean
nothing. AutoAttack is then its version rand.

With --encoder (see evaluation/foreign.py and docs/evaluation.md) the weights may come from any
program.

The table has a row per method, mean ± standard deviation over seeds, and beside it what was
published, with its setting. Compare figures within a column: columns differ in preset, attack or test
set.
Published figures are of other networks and epochs than small runs, and are there for orientation.

The file of an encoder holds the image size of its pretraining, and images are brought to that size,
unless --image-size names another.

As soon as a result is there it becomes a line of eval.jsonl beside the encoder. It is not measured
a second time while the encoder, the data, the recipe, the seed, and the attack with its settings
(images, restarts, batch size, source, vote, test set) are the same. The last classifier of each preset
is kept there too, as classifier-<preset>[-<BN>].pt; BN is the BatchNorm branch, "dual" where both were
trained, and is left out for networks without branches. What flags change of a preset is part of its
name, in the table and in files: "mae-tune layer-decay=0.75" and
classifier-mae-tune-layer-decay=0.75.pt. The classifier of an encoder in weights.pt is
classifier-weights-<preset>.pt. One process at a time works in a folder.

A training that is stopped, by Ctrl-C or by a crash, goes on by the same command. Once a minute at most, at the end
of an epoch, its state is saved as training-<preset>[-<BN>]-<digest>.pt. Each seed and data set has such a file; it
is removed when that training ends.

--kept measures nothing: it prints the results that are kept and agree with the flags given, each
variant of a preset in columns of its own. A flag that is left out excludes nothing, except --preset
and --attacks, whose defaults count: amoc-slf, and clean and pgd20.
"""
import contextlib
import json
import math
import os
import time

import torch
import torch.nn.functional as F

from common import data, encoders, files, optim, own, run
from common.log import header
from common.pgd import eval_mode, pgd
from common.resnet import branch
from evaluation import attacks, finetune, flags, foreign, knn, names, results, screen, sets, table, together
from evaluation.checkpoint import Checkpoint
from evaluation.presets import name_of
from evaluation.published import GROUPS, PUBLISHED
from evaluation.results import load_classifier


# ----------------------------------------------------------------------------------------------------------
# Training a classifier
# ----------------------------------------------------------------------------------------------------------
def kl(logits, logits_adv):
    """KL(p(x) || p(x_adv)) of logits (B, classes), mean over the batch."""
    return F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")


def trades(logits, logits_adv, y, beta=6.0):
    """CE(p(x), y) + beta KL(p(x) || p(x_adv)), gradient through both (TRADES, arXiv 1901.08573)."""
    return F.cross_entropy(logits, y) + beta * kl(logits, logits_adv)


def nt_xent(z1, z2, temperature=0.5):
    """Mean over the 2 B rows of z1 and z2 (B, D) of -log(e^(u_i.u_j/T) / sum_k!=i e^(u_i.u_k/T)), u of length
    1, j the other view of i (RoCL, arXiv 2006.07589, with its temperature)."""
    u = F.normalize(torch.cat([z1, z2]))
    scores = u @ u.T / temperature  # (2 B, 2 B)
    scores.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(u), device=u.device).roll(len(z1))
    return F.cross_entropy(scores, partner)


def classifier_loss(net, x, y, preset, noise, x2=None, eps=8 / 255, steps=10):
    """The loss of `preset` on a batch x (B, 3, H, W) in [0, 1], y (B,) or, mixed, (B, classes).

    "at+ss" is cross-entropy on [x, x2, x_adv], in one pass, plus `nt_xent` of the projections of x and
    x2, a second view of the same images.

    `noise` (B, 3, H, W) is uniform in [0, 1) and starts the attack: at a point of the ball, or in
    TRADES' way at Gaussian noise of 0.001 around the image.
    """
    dual = preset.dual and own.has_branches(net)

    def logits(x, bn):
        with branch(net, bn) if dual else contextlib.nullcontext():
            return net(x)

    if preset.loss == "clean":
        return F.cross_entropy(logits(x, "clean"), y, label_smoothing=preset.smoothing)

    noise = 2 * noise - 1
    if preset.uniform:
        start = x + eps * noise
    else:
        start = x + 0.001 * 2**0.5 * torch.erfinv(0.9999 * noise)
    with eval_mode(net):
        if preset.loss == "trades":
            with torch.no_grad():
                clean = logits(x, "clean")  # in eval mode it does not depend on the perturbation

        def loss_of_images(x_adv):
            if preset.loss == "trades":
                return kl(clean, logits(x_adv, "adv"))
            return F.cross_entropy(logits(x_adv, "adv"), y)

        x_adv = pgd(loss_of_images, x, eps, preset.step_size, steps, start=start.clamp(0, 1))
    if preset.loss == "trades":
        return trades(logits(x, "clean"), logits(x_adv, "adv"), y)
    if preset.loss == "at+ss":
        h = net.norm(net.encoder(torch.cat([x, x2, x_adv])))  # (3 B, dim)
        z1, z2 = net.projector(h[: 2 * len(x)]).chunk(2)
        return F.cross_entropy(net.head(h), y.repeat(3)) + nt_xent(z1, z2)
    return F.cross_entropy(logits(x_adv, "adv"), y)


def held_out_accuracies(net, held, preset, seed):
    """Accuracies in per cent of `net` on the images `held` out: "clean", and "pgd20", on all of them where
    it picks the epoch of `preset`, else on the first 500."""
    limit = None if preset.pick == "pgd20" else 500
    clean = attacks.judge(net, held)
    robust = attacks.judge(net, held, attacks.ATTACKS["pgd20"], seed, limit)
    return {"clean": clean["accuracy"], "pgd20": robust["accuracy"]}


def train(net, images, preset, seed, checkpoint=None):
    """Train the classifier `net` on `images` by `preset`, in place; all random numbers come from
    `seed`. Where the preset picks an epoch, `net.picked_epoch` and `net.history` say which, and by what.
    With a `checkpoint` (see evaluation/checkpoint.py) a training that was stopped goes on."""
    torch.manual_seed(seed)
    finetune.start(net, preset)
    net.encoder.requires_grad_(False)
    net.train()
    net.encoder.eval()  # what is frozen keeps its running statistics
    for part in finetune.trained_parts(net.encoder, preset):
        part.requires_grad_(True)
        part.train()
    opt = finetune.optimizer(net, preset)
    mix = finetune.mixer(preset, net.head.out_features)
    held, images = finetune.hold_out(images, preset)
    net.history = []
    first, best = checkpoint.resume(net, opt) if checkpoint else (0, None)
    steps_per_epoch = data.steps_per_epoch(len(images), preset.batch_size)
    epochs = preset.epochs or math.ceil(preset.steps / steps_per_epoch)
    for epoch in range(first, epochs):
        total = 0.0
        for i, (pixels, y, rng) in enumerate(data.batches(images, preset.batch_size, seed, epoch)):
            step = epoch * steps_per_epoch + i
            lr = finetune.lr_at(preset, epoch, epoch + i / steps_per_epoch, step)
            optim.set_lr(opt, lr)
            x2 = None
            if preset.loss == "at+ss":
                x2, _ = finetune.augment(pixels, y, rng, preset, mix)
            x, y = finetune.augment(pixels, y, rng, preset, mix)
            noise = None if preset.loss == "clean" else rng.uniform(*x.shape[1:], device=x.device)
            loss = classifier_loss(net, x, y, preset, noise, x2)
            opt.zero_grad()
            loss.backward()
            if preset.clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), preset.clip)
            opt.step()
            total = total + loss.detach()
            if step + 1 == preset.steps:
                break
        mean = float(total) / (i + 1)
        if not mean < float("inf"):
            raise ValueError(f"the classifier's loss is not finite in epoch {epoch}; try a lower --lr")
        screen.show_epoch(epoch, epochs, f"lr {lr:.2g}  loss {mean:.4f}")
        if held:
            now = held_out_accuracies(net, held, preset, seed)
            net.history.append({"epoch": epoch + 1, **now})
            if not best or now[preset.pick] > best[0]:
                best = now[preset.pick], {name: value.clone() for name, value in net.state_dict().items()}
                net.picked_epoch = epoch + 1
        if checkpoint:
            checkpoint.save(net, opt, epoch + 1, best)
    if best:
        net.load_state_dict(best[1])
    net.projector = None
    bad = files.not_finite(net.state_dict())
    if bad:  # after the last step, whose loss was finite
        raise ValueError(f"the classifier's {bad} is not finite after training; try a lower --lr")
    return net.eval()


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------
def parser():
    return flags.parser(__doc__)


def kept_or_trained(encoder, file, key, preset, images):
    """The classifier of the evaluation `key` by `preset`: the one kept in `file`, or one trained
    now."""
    device = next(encoder.parameters()).device
    made = json.dumps(key)
    if file.exists():
        try:
            net = load_classifier(file).to(device, memory_format=torch.channels_last)
            if net.made == made:
                return net
        except ValueError as e:
            print(f"{e}; it is trained again")
    net = finetune.Classifier(encoder, images.classes, preset.batch_norm).to(device)
    net.path = file
    training = f"training-{file.stem.removeprefix('classifier-')}-{results.digest(made.encode())}.pt"
    checkpoint = Checkpoint(file.with_name(training), made)
    train(net, images, preset, key["seed"], checkpoint)
    results.save_classifier(net, file, made, sets.side_of(images))
    checkpoint.remove()
    return net


def evaluate(path, name, args, env, shown, source=None, others=()):
    """Every attack that is asked for on the encoder at `path` by preset `name`: {column: result}, see
    table.column, under the preset's name with what the flags change of it.

    `shown` are the images (sets.Sets), `others` the same with other test images, on which the same
    classifier is judged too. What eval.jsonl holds is not measured again; what is measured goes there at
    once.
    """
    preset = None if name == "knn" else flags.preset_of(args, name)
    encoder = foreign.load(path, args, dual=preset is not None and preset.dual)
    encoder = encoder.to(env.device, memory_format=torch.channels_last)
    encoder.path = path
    key = results.key_of(path, encoder, name, preset, args, shown)
    stem = results.classifier_stem(path, encoder, name, preset)
    shown_name = name_of(name, key["recipe"], flags.vote_of(args))
    net = None
    measured = {}
    todo = [(judged, attack) for judged in (shown, *others)
            for attack in flags.attacks_on(args, name, judged.test_data)]
    for judged, attack in todo:
        began = time.time()
        conditions = sets.conditions(attack, args, judged, source)
        result = table.find(path.parent / "eval.jsonl", key, attack, conditions, path.name)
        row = names.attack_named(attack)
        drawn = isinstance(row, (attacks.Attack, attacks.DeepFool)) and not judged.test_data
        picture = preset and args.pictures and drawn
        if preset and not net and (picture or not result):
            file = path.parent / f"classifier-{stem}.pt"
            net = kept_or_trained(encoder, file, key, preset, shown.train)
        if not result:
            if preset:
                result = sets.measure(net, judged, attack, args, conditions, source)
            else:
                among = {"present": judged.present} if judged.present else {}
                accuracy = knn.knn(encoder, shown.train, judged.test, **key["recipe"], **among)
                result = attacks.score(accuracy, len(judged.test))
            warnings = result.get("warnings", [])
            if encoder.fresh and (not preset or preset.trains == "linear"):
                warnings = warnings + [f"{encoder.fresh} of this encoder was never trained"]
            if preset and preset.trains == "all" and not encoders.has_blocks(encoder):
                if preset.layer_decay != 1 or preset.drop_path:
                    warnings = warnings + ["which the blocks of this network are is not known: layer decay and "
                                           "drop path have no effect"]
            if conditions["source"]:
                warnings = warnings + sets.doubts_of(source, args, shown)
            if warnings:
                result["warnings"] = warnings
                print("  warnings:", "; ".join(warnings))
            if net and net.picked_epoch:
                result["picked_epoch"] = net.picked_epoch
            result |= {condition: value for condition, value in conditions.items() if value is not None}
            line = key | {"results": {attack: result}, "train_images": len(shown.train), "path": str(path),
                          "epoch": "best on held-out images" if preset and preset.pick else "last",
                          "seconds": round(time.time() - began, 1), **header(args, env)}
            if net and net.history:
                line["history"] = net.history
            files.append_json_line(path.parent / "eval.jsonl", line)
        measured[table.column(shown_name, attack, judged.test_data)] = result
        where = f" on {judged.test_data}" if judged.test_data else ""
        print(f"{path} {shown_name} {attack}{where}: {table.cell([result])}", flush=True)
        if picture:
            picture_path = path.parent / f"attacked-{stem}-{attack.replace('/', '_')}.png"
            attacks.pictures(picture_path, net, shown.test, row, args.seed, source and source.net)
    return measured


def measured_table(args, named):
    """Measure what is missing; the table of it all."""
    env = run.Env(run.device(args), 0, 1)
    # What would fail late fails now.
    paths = results.encoder_paths(args)
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: a folder; give the encoder.pt in it, or --kept")
    table.rows([results.row_path(path) for path in paths], run.FREE)
    sizes = {path: args.image_size or foreign.load(path, args).image_size for path in paths}
    for path in paths:
        if not os.access(path.parent, os.W_OK):
            raise OSError(f"{path.parent} cannot be written")
        files.lock(path.parent)
    results.name_foreign_lines(path.parent for path in paths)
    if args.encoder:
        print(foreign.describe(args, paths))
    source = sets.load_source(args, env.device)
    of_size = {}
    others = {}
    for path, size in sizes.items():
        if size not in of_size:
            of_size[size] = sets.load_sets(args, env.device, size)
            sets.check_sets(args, of_size[size])
            sets.doubts_of(source, args, of_size[size])
            print(sets.describe(args, of_size[size]))
            others[size] = sets.load_others(args, env.device, of_size[size])
        sets.try_encoder(path, args, env, of_size[size])
    presets, asked = flags.asked(args)
    if "knn" in presets and "attacks" in named and asked != ["clean"]:
        print("k-NN is not attacked: it is judged on clean images")
    runs = []
    for path, size in sizes.items():
        measured = {}
        for name in presets:
            measured |= evaluate(path, name, args, env, of_size[size], source, others[size])
        runs.append((results.row_path(path), measured))
    runs = [(path, table.with_epochs(found)) for path, found in runs]
    published = PUBLISHED if args.published else ()
    return "\n" + table.markdown(runs, flags.titles(args), GROUPS, published, run.FREE)


def main(argv=None):
    args = parser().parse_args(argv)
    named = flags.named_flags(parser, argv)
    torch.backends.cudnn.allow_tf32 = False  # it moves points that lie close to a boundary
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.ensemble or args.matrix:
        together.check(args, named)
        with screen.stoppable("ensemble.jsonl" if args.ensemble else "matrix.jsonl"):
            print(together.measured(args))
        return
    flags.check(args)
    if args.kinds:
        print(results.kinds_tables(args, named))
    elif args.kept:
        print(results.kept_table(args, named))
    else:
        with screen.stoppable():
            print(measured_table(args, named))


if __name__ == "__main__":
    run.cli(main)

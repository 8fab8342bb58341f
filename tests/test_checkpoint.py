"""The training of a classifier that is stopped and goes on is the training itself."""
import json

import pytest
import torch

import eval as command
from common import encoders, files
from evaluation import checkpoint, finetune, presets, screen
from tests.scripts import tiny_npz
from tests.test_eval import coloured

PRESETS = {
    # SGD with momentum, attacked images, the best epoch on held-out ones
    "best epoch": ("slim", presets.PRESETS["acl-aff-25"]._replace(epochs=4, milestones=(2,), batch_size=16)),
    # AdamW with its groups; mixup and drop path draw from PyTorch's own generator
    "mixup": ("vit_slim", presets.PRESETS["mae-tune"]._replace(epochs=4, warmup=1, batch_size=16)),
    # LARS, and a BatchNorm before the head
    "lars": ("vit_slim", presets.PRESETS["mae-slf"]._replace(epochs=4, warmup=1, batch_size=16)),
    # a last stage that starts anew
    "last stage": ("slim", presets.PRESETS["chen-f2"]._replace(epochs=4, batch_size=16)),
    # the projector of its contrastive part
    "projector": ("slim", presets.PRESETS["rocl-aff"]._replace(epochs=4, milestones=(2,), batch_size=16)),
}


def trained(arch, preset, kept=None):
    torch.manual_seed(0)
    net = finetune.Classifier(encoders.make(arch), 3, preset.batch_norm)
    return command.train(net, coloured(48), preset, 0, kept)


@pytest.mark.parametrize("name", PRESETS)
def test_a_training_that_was_stopped_ends_in_the_same_bits(tmp_path, monkeypatch, name):
    whole = trained(*PRESETS[name])
    show_epoch = screen.show_epoch

    def stopping(epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        show_epoch(epoch, *rest)

    with monkeypatch.context() as m:
        m.setattr(screen, "show_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(*PRESETS[name], checkpoint.Checkpoint(tmp_path / "training.pt", "this one", interval=0))
    assert files.load(tmp_path / "training.pt")["epochs"] == 2

    begun = []
    with monkeypatch.context() as m:
        m.setattr(screen, "show_epoch", lambda epoch, *rest: begun.append(epoch))
        again = trained(*PRESETS[name], checkpoint.Checkpoint(tmp_path / "training.pt", "this one", interval=0))
    assert begun == [2, 3]
    assert whole.state_dict().keys() == again.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert again.history == whole.history and again.picked_epoch == whole.picked_epoch


def test_a_checkpoint_is_taken_up_by_its_own_training_alone(tmp_path, capsys):
    file = tmp_path / "training.pt"
    arch, preset = PRESETS["lars"]
    trained(arch, preset, checkpoint.Checkpoint(file, "one", interval=0))
    net = finetune.Classifier(encoders.make(arch), 3, preset.batch_norm)
    net.encoder.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    opt = finetune.optimizer(net, preset)
    assert checkpoint.Checkpoint(file, "another").resume(net, opt) == (0, None)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert checkpoint.Checkpoint(file, "one").resume(net, opt) == (4, None)
    assert not torch.equal(net.head.weight, before["head.weight"])

    capsys.readouterr()
    kept = tmp_path / "kept.pt"
    kept.write_bytes(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-100])
    assert checkpoint.Checkpoint(file, "one").resume(net, opt) == (0, None)
    assert capsys.readouterr().out.strip().endswith("perhaps truncated); the training begins anew")
    files.save({"format": "something else"}, file)
    assert checkpoint.Checkpoint(file, "one").resume(net, opt) == (0, None)
    assert "not a classifier in training" in capsys.readouterr().out

    # A part is missing, or does not fit: nothing of it is taken.
    again = finetune.Classifier(encoders.make(arch), 3, preset.batch_norm)
    again.encoder.requires_grad_(False)
    before = {key: value.clone() for key, value in again.state_dict().items()}
    opt = finetune.optimizer(again, preset)
    whole = files.load(kept)
    for broken in ({**whole, "net": {**whole["net"], "head.bias": torch.zeros(4)}},
                   {**whole, "opt": {"state": {}, "param_groups": []}}, {key: whole[key] for key in ("format", "made")}):
        files.save(broken, file)
        assert checkpoint.Checkpoint(file, "one").resume(again, opt) == (0, None)
        assert "the training begins anew" in capsys.readouterr().out
        assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items()) and not opt.state


def test_it_is_written_once_in_an_interval(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    net = finetune.Classifier(encoders.make("slim"), 3)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    kept = checkpoint.Checkpoint(tmp_path / "training.pt", "one", interval=60)
    written = []
    for epochs, now[0] in enumerate((130, 159, 160, 219, 221, 290), 1):
        kept.save(net, opt, epochs, None)
        if (tmp_path / "training.pt").exists():
            written.append(files.load(tmp_path / "training.pt")["epochs"])
    assert written == [3, 3, 5, 6]


def test_the_command_goes_on_and_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    encoders.export(encoders.make("slim"), tmp_path / "encoder.pt", None)
    flags = [str(tmp_path / "encoder.pt"), "--data", tiny_npz(tmp_path / "tiny.npz"), "--device", "cpu", "--preset",
             "amoc-slf", "--epochs", "3", "--milestones", "--batch-size", "16", "--attacks", "clean"]
    monkeypatch.setattr(command, "Checkpoint", lambda path, made: checkpoint.Checkpoint(path, made, interval=0))
    stem = "amoc-slf-epochs=3-milestones=none-batch-size=16"

    def stopping(epoch, *_):
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(screen, "show_epoch", stopping)
        with pytest.raises(SystemExit):
            command.main(flags)
    (training,) = tmp_path.glob(f"training-{stem}-*.pt")
    kept = files.load(training)
    assert kept["epochs"] == 1 and json.loads(kept["made"])["preset"] == "amoc-slf"
    assert not (tmp_path / f"classifier-{stem}.pt").exists()

    # Another seed's training leaves it alone.
    command.main([*flags, "--seed", "1"])
    assert training.exists() and "continues" not in capsys.readouterr().out

    # It is no encoder: `*.pt` leaves it out.
    command.main([str(tmp_path / "encoder.pt"), str(training), *flags[1:]])
    assert "continues after epoch 1" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"classifier-{stem}.pt", "encoder.pt"]

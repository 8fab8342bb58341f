"""The pictures of runs, read back pixel by pixel."""
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from common.pictures import attack_key, difference, save_rows


def test_rows_are_enlarged_images_beside_each_other(tmp_path):
    x = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    save_rows(tmp_path / "a.png", [("first", x), ("second, longer", x.flip(0)[:2])])
    picture = pil_to_tensor(Image.open(tmp_path / "a.png"))
    tall = 4 * 5 + 2
    assert picture.shape[1] == 2 * tall
    left = picture.shape[2] - 3 * tall
    for row, images in enumerate((x, x.flip(0)[:2])):
        for column, image in enumerate(images):
            top, begin = row * tall, left + column * tall
            seen = picture[:, top : top + 20, begin : begin + 20]
            for offset in (0, 3):  # every pixel is four by four
                torch.testing.assert_close(seen[:, offset::4, offset::4] / 255, image, rtol=0, atol=0.6 / 255)
    assert (picture[:, :tall, :left] < 128).any()  # the name is written
    assert (picture[:, tall:, left + 2 * tall :] == 255).all()  # a shorter row is white at its end


def test_a_key_is_drawn_below_the_rows(tmp_path):
    x = torch.full((1, 3, 4, 4), 0.5)
    save_rows(tmp_path / "a.png", [("x", x)])
    save_rows(tmp_path / "b.png", [("x", x)], key=("-8/255", "+8/255"))
    plain, keyed = (pil_to_tensor(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert keyed.shape[1] > plain.shape[1]
    bar = keyed[:, plain.shape[1] :]
    assert len(bar.unique()) > 100  # from black to white


def test_a_difference_is_grey_where_nothing_changed_and_white_at_full_scale():
    x = torch.full((1, 3, 2, 2), 0.25)
    x_adv = x.clone()
    x_adv[0, :, 0, 0] += 8 / 255
    x_adv[0, :, 0, 1] -= 8 / 255
    seen = difference(x_adv, x, 8 / 255)[0, 0]
    assert seen.flatten().tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5], abs=1e-5)
    assert difference(x, x, 0.0).eq(0.5).all()
    x_adv[0, :, 0, 1] -= 8 / 255  # without a scale: that of the largest change, 16/255
    assert difference(x_adv, x)[0, 0].flatten().tolist() == pytest.approx([0.75, 0.0, 0.5, 0.5], abs=1e-5)
    assert difference(x, x).eq(0.5).all()


def test_the_key_of_an_attack_is_its_radius_where_that_bounds_a_pixel():
    assert attack_key("linf", 8.0) == ("-8/255", "+8/255") and attack_key("linf", 0.5) == ("-0.5/255", "+0.5/255")
    assert attack_key("l2", 128.0) == ("largest decrease", "largest increase")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    x = torch.rand(1, 3, 4, 4)
    save_rows(tmp_path / "a.png", [("x", x)])
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_rows(tmp_path / "a.png", [("x", 1 - x)])
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

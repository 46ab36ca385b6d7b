"""Classification in depth: labelled images from files, accuracy and calibration beside the gap."""

import gzip
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from toy import Quadratic

from amortized import ProblemError
from amortized.contexts.images import FILES, LABELS, find
from amortized.networks import MLP
from amortized.problems import Accuracy, Classification, LabelledDigits, LabelledImages
from amortized.problems.classification import Labelled
from amortized.problems.classification.images import GARMENTS, moved

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "classify_fashion.ckpt"


def write_idx(path, rows):
    header = bytes([0, 0, 8, rows.ndim]) + b"".join(n.to_bytes(4, "big") for n in rows.shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + rows.numpy().tobytes())


@pytest.fixture
def folder(tmp_path):
    """Files of 10,020 training and 30 test images; the first pixel of each is its label."""
    for file, labels, count in zip(FILES["mnist"], LABELS["mnist"], (10_020, 30), strict=True):
        label = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, 0, 0] = label
        write_idx(tmp_path / f"{file}.gz", images)
        write_idx(tmp_path / f"{labels}.gz", label)
    return tmp_path


@pytest.mark.parametrize(("split", "rows"), [("train", 20), ("val", 10_000), ("test", 30)])
def test_labels_are_those_of_their_images(folder, split, rows):
    data = LabelledImages(root=str(folder), smoothing=0.1)
    a = data.contexts(split)
    pixel = a.image[:, 0].float() * (1 if split == "train" else 255)
    assert len(a.image) == rows
    assert torch.equal(a.target.argmax(1), pixel.round().long())
    torch.testing.assert_close(a.target.max(1).values, torch.full((rows,), 0.91))
    torch.testing.assert_close(a.target.sum(1), torch.ones(rows))


def test_fewer_may_be_evaluated_and_training_images_are_distorted_anew(folder):
    data = LabelledImages(root=str(folder), num_test=7, batch_size=4)
    assert len(data.contexts("test").image) == len(data.contexts("test").target) == 7
    a, b = data.batch("train", 0), data.batch("train", 5)  # the same images, in another pass
    assert a.image.dtype == torch.float32
    assert a.image.max() <= 1
    assert not torch.equal(a.image, b.image)


def test_what_is_wrong_with_files_and_settings_is_told(folder):
    (folder / f"{LABELS['mnist'][1]}.gz").unlink()
    with pytest.raises(
        ProblemError, match=r"no t10k-labels-idx1-ubyte \(or .*gz\) of mnist in .*: put it there, or name"
    ):
        LabelledImages(root=str(folder)).contexts("test")
    write_idx(folder / f"{LABELS['mnist'][1]}.gz", torch.zeros(30, 28, 28, dtype=torch.uint8))
    with pytest.raises(ProblemError, match=r"holds an array of shape \(30, 28, 28\); mnist has labels \(N,\)"):
        LabelledImages(root=str(folder)).contexts("test")
    with pytest.raises(ValueError, match="dataset must be one of mnist, fashion-mnist; got 'digits'"):
        LabelledImages(dataset="digits")
    with pytest.raises(ValueError, match="distortion must not be negative"):
        LabelledImages(distortion=-1)
    with pytest.raises(ValueError, match="bins must be at least 2; got 1"):
        Accuracy(bins=1)
    with pytest.raises(TypeError, match="Accuracy measures a Classification; Quadratic is none"):
        Accuracy().setup(None, Quadratic(), "test")


def test_half_of_the_garments_are_mirrored():
    image = torch.zeros(400, 6, 6)
    image[:, 2:4, 0] = 1
    found = moved(image.flatten(1), torch.Generator().manual_seed(0), distortion=0, shift=0, flip=True).view(-1, 6, 6)
    left, right = (found[:, 2:4, k].mean(1) for k in (0, 5))
    torch.testing.assert_close(left + right, torch.ones(400))
    assert 0.4 < float((right > 0.99).float().mean()) < 0.6
    assert LabelledImages(dataset="fashion-mnist").classes == GARMENTS


class Known(Classification):
    """Whose predictions are in the image."""

    def iterates(self, a):
        return [a.image + 0 * self.network[0].bias.sum()]


class Given(LabelledDigits):
    def contexts(self, split):
        """200 predictions of which 80 % are sure by 0.8 and 75 % of those right, the others sure by 0.6 and all right."""
        label = torch.arange(200) % 10
        sure = torch.arange(200) < 160
        guess = torch.where(torch.arange(200) < 40, (label + 1) % 10, label)
        p = torch.where(sure, 0.8, 0.6)[:, None]
        probabilities = torch.where(torch.arange(10) == guess[:, None], p, (1 - p) / 9)
        target = torch.nn.functional.one_hot(label, 10).float()
        return Labelled(probabilities.log(), target)


def test_accuracy_and_calibration_are_what_they_are_called():
    monitor = Accuracy(bins=7)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", callbacks=[monitor], **quiet)
    trainer.test(Known(MLP(10, 10)), Given(eval_batch_size=64), verbose=False)
    found = monitor.results
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["calibration_error"] == pytest.approx(0.8 * 0.05 + 0.2 * 0.4, abs=1e-4)
    assert found["confidence"] == pytest.approx(0.76)
    assert found["images"] == 200
    assert found["worst_class_accuracy"] == pytest.approx(0.8)
    assert torch.allclose(monitor.confusions.diagonal(), torch.tensor(0.8))
    assert ("accuracy", "80.00% of 200 images") in monitor.lines()
    pictures = monitor.pictures()
    assert pictures.keys() == monitor.captions.keys() == {"confusions", "reliability"}
    points = torch.from_numpy(pictures["reliability"]().axes[0].lines[-1].get_xydata()).float()
    torch.testing.assert_close(points, torch.tensor([[0.6, 1.0], [0.8, 0.75]]))
    pictures["confusions"]()


@pytest.mark.slow
def test_the_reference_classifies_fashion_mnist():
    if find("fashion-mnist", LABELS["fashion-mnist"][1]) is None:
        pytest.skip(
            "the files of fashion-mnist are not here: set AMORTIZED_DATA to the folder that holds fashion-mnist/"
        )
    model = Classification.load_from_checkpoint(CHECKPOINT).eval()
    a = LabelledImages(dataset="fashion-mnist").contexts("test")
    with torch.no_grad():
        right = torch.cat([model.network(image).argmax(1) for image in a.image.split(1000)]) == a.target.argmax(1)
    assert float(right.float().mean()) >= 0.91

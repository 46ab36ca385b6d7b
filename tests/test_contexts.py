import re

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toy import FiniteGaussians, Gaussians, Items, LazyGaussians, Pair, Pairs, Quadratic

from amortized import ContextDataModule, ProblemError
from amortized.cli.app import main
from amortized.contract import num_rows


@pytest.mark.parametrize("cls", [Gaussians, FiniteGaussians, LazyGaussians])
def test_batches_are_a_function_of_seed_split_and_number(cls):
    one, other = cls(batch_size=32), cls(batch_size=32)
    later = one.batch("train", 7)
    for split in ("train", "val", "test"):
        assert torch.equal(one.batch(split, 1), other.batch(split, 1))
    assert torch.equal(later, other.batch("train", 7))  # whatever was drawn before


def test_splits_seeds_and_numbers_differ():
    batches = [
        Gaussians(batch_size=256, seed=seed).batch(split, k)
        for seed in (0, 1)
        for split, k in [("train", 0), ("train", 1), ("val", 0), ("val", 1), ("test", 0)]
    ]
    rows = torch.cat(batches)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("batch_size", [7, 32, 100, 250])
def test_every_pass_has_each_row_once(batch_size):
    data = LazyGaussians(num_train=100, batch_size=batch_size)
    data.augment = lambda a, generator: a
    passes = 7
    rows = torch.cat([data.batch("train", k) for k in range(-(-passes * 100 // batch_size))])[: passes * 100]
    everything = data.contexts("train").rows
    orders = []
    for one in rows.split(100):
        match = (one[:, None] == everything).all(2)
        assert (match.sum(0) == 1).all()
        orders.append(match.int().argmax(1))
    assert len({tuple(order.tolist()) for order in orders}) == passes


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_dealt_out_once_without_padding(world):
    class Rank:
        def __init__(self, rank):
            self.global_rank, self.world_size = rank, world

    seen = []
    for rank in range(world):
        data = FiniteGaussians(eval_batch_size=100)
        data.trainer = Rank(rank)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(loader) == len(batches)
        seen += [data.batch("val", batch.number) for batch in batches]
    rows = torch.cat(seen)
    assert len(rows) == 833
    assert len(rows.unique(dim=0)) == 833


def test_named_tuples_and_validation_independent_of_training_batch_size():
    small, large = Pairs(batch_size=8), Pairs(batch_size=512)
    assert num_rows(small.batch("train", 0)) == 8
    assert all(torch.equal(x, y) for x, y in zip(small.batch("val", 2), large.batch("val", 2), strict=True))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="data.batch_size must be at least 1; got 0"):
        Gaussians(batch_size=0)


# ---- what is not a context


class Given(ContextDataModule):
    """Contexts as a test gives them, by split."""

    def __init__(self, **given):
        super().__init__(batch_size=4, num_val=6, num_test=6, eval_batch_size=4)
        self.given = given

    def contexts(self, split):
        return self.given[split]


class Drawn(ContextDataModule):
    """``sample`` as a test gives it."""

    def __init__(self, sample, complete=None, **kwargs):
        super().__init__(batch_size=4, num_val=6, num_test=6, **kwargs)
        self.sample = sample
        if complete:
            self.complete = complete


X, Y = torch.ones(6, 3), torch.zeros(6, 2)
NOT_CONTEXTS = {
    "list": (
        [X, Y],
        r"got a list of 2: write `class Fields\(NamedTuple\): x: Tensor; y: Tensor` and give Fields\(...\)",
    ),
    "tuple": ((X, Y), r"got a tuple of 2: write `class Fields\(NamedTuple\)"),
    "dict": (
        {"image": X, "mask": Y},
        r"got a dict with the keys image, mask: write `class Fields\(NamedTuple\): image: Tensor; mask: Tensor` and give "
        r"Fields\(\*\*...\)",
    ),
    "array": (X.numpy(), r"got a ndarray: write torch.as_tensor\(...\)"),
    "number": (3.0, "got a float"),
    "inside": (Pair(X, [Y]), "got a list of 1"),
    "scalar": (torch.tensor(1.0), "must share their leading dimension; got value none"),
    "disagree": (Pair(X[:3], X), "must share their leading dimension; got x 3, y 6"),
    "nested": (Pair(Pair(X, X), X[:3]), r"must share their leading dimension; got x\.x 6, x\.y 6, y 3"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("given", "message"), NOT_CONTEXTS.values(), ids=NOT_CONTEXTS)
def test_what_is_not_a_context_is_refused_in_one_line(given, message, split):
    for where, data in (
        (rf"Given\.contexts\('{split}'\)", Given(**{"train": X, "val": X, split: given})),
        (r"Drawn\.sample\(\d, generator\)", Drawn(lambda n, generator: given)),
    ):
        with pytest.raises(ProblemError, match=f"^{where}.*{message}") as refused:
            data.batch(split, 0)
        assert "\n" not in str(refused.value)


DATASETS = {
    "tuples": (TensorDataset(X, Y), r"the rows of Given.contexts\('val'\), a TensorDataset: .* got a list of 2"),
    "dicts": (Items([{"x": x} for x in X]), r"a Items: .* got a dict with the keys x"),
    "ragged": (Items([X[0], X[0, :2]]), r"a Items, fails: RuntimeError: stack expects each tensor to be equal size"),
    "broken": (Items({"a": X, "b": X}), r"a Items, fails: KeyError: 0 \(.*toy.py, line \d+, in __getitem__\)"),
    "no length": (Items(None), r"a Items whose length is not known \(TypeError: object of type 'NoneType' has no len"),
    "endless": (
        type("Stream", (IterableDataset,), {"__iter__": None})(),
        r"gives a Stream whose length is not known .*: write a map-style data set",
    ),
}


@pytest.mark.parametrize(("given", "message"), DATASETS.values(), ids=DATASETS)
def test_data_sets_whose_rows_are_no_contexts_are_refused(given, message):
    data = Given(val=given)
    with pytest.raises(ProblemError, match=message):
        [data.batch("val", number) for number in range(2)]


def test_data_sets_of_rows_are_legal():
    for rows in (list(X), list(X.numpy()), [Pair(x, y) for x, y in zip(X, Y, strict=True)]):
        assert num_rows(Given(train=Items(rows)).batch("train", 0)) == 4


@pytest.mark.parametrize("fn", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("batch", [[X, X], (X, X), {"x": X}, Pair(X, X[:3])], ids=["list", "tuple", "dict", "disagree"])
def test_a_loader_of_the_users_own_is_held_to_it_too(fn, batch):
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Quadratic()
    with pytest.raises(
        ProblemError, match="^the batch of a loader: .*(got a list of 2|got a dict with the keys x|x 6, y 3)"
    ):
        getattr(trainer, fn)(module, DataLoader([batch], batch_size=None))
    assert not module._checked


SAMPLES = {
    "global": (
        lambda n, generator: torch.randn(n, 3),
        "gives other contexts for the same generator: draw with the generator",
    ),
    "constant": (
        lambda n, generator: torch.randn(n, 3, generator=torch.Generator().manual_seed(0)),
        r"ignores its generator, so that every batch is the same: .* or write contexts\(split\) for a finite set",
    ),
    "rows": (
        lambda n, generator: torch.randn(7, 3, generator=generator),
        r"Drawn\.sample\(4, generator\) must give 4 contexts; got 7",
    ),
    "fault": (
        lambda n, generator: torch.randn(n, 3, generatr=generator),
        r"fails: TypeError: .*\(.*test_contexts.py, line \d+, in .*\)",
    ),
    "arguments": (
        lambda n: torch.randn(n, 3),
        r"Drawn.sample\(4, ...\) fails: TypeError: .* takes 1 positional argument",
    ),
}


@pytest.mark.parametrize(("sample", "message"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_is_checked_before_the_first_step(sample, message):
    with pytest.raises(ProblemError, match=message):
        Drawn(sample).setup("fit")


def test_samples_of_few_values_and_those_to_be_completed_pass():
    Drawn(lambda n, generator: torch.randint(2, (n, 1), generator=generator) * torch.nan).setup("fit")
    halves = Drawn(
        lambda n, generator: {"x": torch.rand(n // 2, 3, generator=generator)}, lambda drawn: drawn["x"].repeat(2, 1)
    )
    assert halves.batch("train", 0).shape == (4, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"train": X},
            r"Given\.contexts\('val'\) fails: KeyError: 'val' \(.*test_contexts.py, line \d+, in contexts\)",
        ),
        (
            {"train": X, "val": None},
            r"contexts\('val'\) gives None, but .* `return super\(\).contexts\('val'\)` samples one",
        ),
        ({"train": X, "val": X[:0]}, "the val split has no contexts"),
        ({"train": X, "val": X}, r"contexts\('test'\) fails: KeyError: 'test'"),
    ],
    ids=["missing", "none", "empty", "test"],
)
def test_a_split_that_is_missing_is_found_before_the_first_step(given, message):
    data = Given(**given)
    data.fit_needs = ("train", "val", "test")
    with pytest.raises(ProblemError, match=message):
        data.setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_in_contexts_are_one_line_and_status_2(workers, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model=toy.Quadratic", "--data=toy.FailingLate", f"--data.num_workers={workers}",
              "--trainer.max_steps=9", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])  # fmt: skip
    assert end.value.code == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    assert re.fullmatch(
        r"error: FailingLate\.augment\(\.\.\., \.\.\.\) fails: ValueError: batch 5 .*\(.*toy\.py, line \d+, in augment\).*",
        line,
    )

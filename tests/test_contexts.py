import pytest
import torch
from toy import FiniteGaussians, Gaussians, LazyGaussians, Pairs

from amortized.problem import num_rows


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

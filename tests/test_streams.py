"""Every use of a generator has a seed that no other use has, and none that people pick."""

import itertools

import pytest
import torch
from toy import Gaussians, Quadratic

from amortized.contract import CommonDraws, stream_seed
from amortized.contract.streams import _BITS
from amortized.evaluation.gap import measure_gap
from amortized.solvers import LBFGS, GradientDescent


def test_seeds_are_distinct_and_of_32_bits_and_not_those_that_people_pick():
    few = 20_000
    seeds = {stream_seed(5, stream, k) for stream, bits in _BITS.items() for k in [*range(few), 2**bits - 1]}
    assert len(seeds) == len(_BITS) * (few + 1)
    assert min(seeds) >= 2**31
    assert max(seeds) < 2**32


def test_numbers_outside_a_stream_are_refused():
    with pytest.raises(ValueError, match=r"batch number 536870912 is outside the range of the stream 'train'"):
        stream_seed(0, "train", 2**29)


@pytest.mark.parametrize("stream", ["train", "val", "order"])
def test_no_two_seeds_of_the_data_share_their_batches(stream):
    seeds = [0, *(2**k for k in range(32)), 3, 12345, 2**32 - 1]
    used = [{stream_seed(seed, stream, k) for k in range(50)} for seed in seeds]
    assert all(len(one & other) <= 1 for one, other in itertools.combinations(used, 2))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**58])
def test_seeds_of_the_data_outside_their_range_are_refused(seed):
    with pytest.raises(ValueError, match=rf"data.seed: a seed must be from 0 to 4294967295; got {seed}"):
        Gaussians(seed=seed)


class Recorded(Quadratic):
    """Remembers the noise that its objective draws."""

    def objective(self, b, a):
        noise = torch.randn_like(b)
        self.drawn.append(noise[0, 0].item())
        return (b - 2 * a).square().sum(1) + (noise * b).sum(1)


def test_the_draws_of_the_gap_meet_no_other():
    """Neither those of the next batch's gap nor those of contexts that were made with a seed of the user's."""
    picked = {torch.randn(6, 3, generator=torch.Generator().manual_seed(k))[0, 0].item() for k in range(100)}
    problem, drawn = Recorded(), []
    for number in range(4):
        problem.drawn = []
        a = torch.randn(6, 3, generator=torch.Generator().manual_seed(number))
        measure_gap(problem, a, 2 * a, LBFGS(steps=3), torch.arange(6), seed=number)
        drawn.append(set(problem.drawn))
    assert all(len(one) >= 4 for one in drawn)  # to search, to choose, to compare, and once more
    assert not picked & set.union(*drawn)
    always = set.intersection(*drawn)  # what is drawn to find out whether the objective is random at all
    assert len(always) <= 1
    for one, other in itertools.combinations(drawn, 2):
        assert not one & other - always


@pytest.mark.parametrize("solver", [LBFGS(steps=2), GradientDescent(steps=2, lr=0.1)])
def test_a_solver_draws_the_seed_of_its_search_from_torchs_generator(solver):
    problem, a = Recorded(), torch.ones(6, 3)
    used = []
    for seed in (0, 0, 1):
        problem.drawn = []
        torch.manual_seed(seed)
        solver.solve(problem, a, a)
        used.append(problem.drawn[-1])
    assert used[0] == used[1] != used[2]
    assert CommonDraws(problem).seed >= 2**31

"""Few-shot learning: templates, methods that are one network and one refinement each, tasks, and what is measured."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import affine_grid, grid_sample

from amortized.cli.app import main
from amortized.contract import ProblemError, evaluate, map_leaves, take, value_and_grad
from amortized.networks import MLP, ConvBlocks, DeepSet, LearnedInitialization, SetTransformer
from amortized.problems import (
    FewShotClassification,
    FewShotRegression,
    GaussianProcesses,
    GaussianProcessRegression,
    Glyphs,
    NeuralProcess,
    Omniglot,
    Prototypes,
    SinusoidContexts,
    Template,
)
from amortized.problems.meta import generalization
from amortized.problems.meta.characters import framed
from amortized.solvers import LBFGS, GradientDescent, Implicit
from amortized.testing import equal


def images(ways=3):
    return ConvBlocks(8, ways, [4, 4], groups=2)


def curves():
    return MLP(1, 1, [8, 8], "tanh")


@pytest.mark.parametrize("adapt", ["all", "last", "film", "low_rank"])
@pytest.mark.parametrize(("model", "shape"), [(lambda: MLP(2, 3, [5, 5], "tanh"), (2,)), (images, (8, 8))])
def test_a_template_is_the_model_of_each_task_at_its_own_parameters(adapt, model, shape):
    torch.manual_seed(0)
    template = Template(model(), adapt, rank=2)
    b, x = 0.3 * torch.randn(4, template.size), torch.randn(4, 6, *shape)
    out = template(b, x)
    assert out.shape == (4, 6, 3)
    for i in range(4):  # one task at a time, without vmap
        weights = {name: w[i] for name, w in template.weights(b).items()}
        alone = functional_call(template.model, weights, (template.base(x[i]),))
        torch.testing.assert_close(alone, out[i], rtol=1e-4, atol=1e-5)
    assert template(b[:0], x[:0]).shape == (0, 6, 3)


def test_a_template_may_have_layers_of_one_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    template = Template(model)
    b, x = torch.randn(2, template.size), torch.randn(2, 4, 3)
    weight, bias = template.weights(b).values()
    once = torch.einsum("bij,bkj->bki", weight, x) + bias.unsqueeze(1)
    expected = torch.einsum("bij,bkj->bki", weight, once.tanh()) + bias.unsqueeze(1)
    torch.testing.assert_close(template(b, x), expected)


@pytest.mark.parametrize("adapt", ["film", "low_rank", "all"])
def test_a_template_starts_as_the_model_that_it_was_given(adapt):
    model, x = images(), torch.randn(2, 5, 8, 8)
    was = model(x[0])
    template = Template(model, adapt)
    torch.testing.assert_close(template(torch.zeros(2, template.size), x)[0], was)


def test_film_scales_and_moves_channels_and_low_rank_adds_a_matrix_of_that_rank():
    layer, x = nn.Linear(3, 2), torch.randn(1, 4, 3)
    b = torch.tensor([[1.0, -0.5, 0.2, 0.3]])
    torch.testing.assert_close(
        Template(layer, "film")(b, x), torch.tensor([2.0, 0.5]) * layer(x) + torch.tensor([0.2, 0.3])
    )
    template = Template(nn.Linear(6, 5), "low_rank", rank=2)
    changed, at_zero = (
        template(b, torch.eye(6)[None]) for b in (torch.randn(1, template.size), torch.zeros(1, template.size))
    )
    assert torch.linalg.matrix_rank((changed - at_zero)[0].detach(), atol=1e-5) == 2
    assert template.size == 2 * (5 + 6)


def test_what_a_template_shares_is_trained_and_what_a_task_has_is_not():
    for adapt, trained in (("all", False), ("last", True), ("film", True), ("low_rank", True)):
        template = Template(images(), adapt)
        assert any(p.requires_grad for p in template.parameters()) == trained
        assert not any(template.model.get_parameter(name).requires_grad for name in template.shapes)


def test_templates_refuse_what_cannot_be_of_one_task():
    with pytest.raises(ValueError, match="BatchNorm1d .1. mixes the tasks of a batch: write GroupNorm"):
        Template(nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="ends in a linear layer; .* is 0, a Conv2d"):
        Template(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten()), "last")
    with pytest.raises(ValueError, match="adapt must be all, last, film or low_rank; got 'none'"):
        Template(nn.Linear(1, 1), "none")
    with pytest.raises(ValueError, match="has no layer"):
        Template(nn.LayerNorm(3), "film")
    with pytest.raises(ProblemError, match="17 parameters of its own; solutions have 3: .* out_features: 17"):
        Template(nn.Linear(16, 1)).weights(torch.zeros(2, 3))


class Points(NamedTuple):
    """Sets of different sizes."""

    x: Tensor
    mask: Tensor


@pytest.mark.parametrize("network", [DeepSet, SetTransformer])
def test_sets_of_varying_size_are_as_if_the_others_were_not_there(network):
    torch.manual_seed(0)
    f, x = network(["x"], 2, 3, mask="mask"), torch.randn(4, 6, 2)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    for training in (True, False):  # attention has another path in each
        f.train(training)
        out = f(Points(x, mask))
        torch.testing.assert_close(out, f(Points(torch.where(mask.unsqueeze(2), x, 7.0), mask)))
        torch.testing.assert_close(out[1:2], f(Points(x[1:2, :3], mask[1:2, :3])), rtol=1e-4, atol=1e-5)
        assert out.isfinite().all()


class Uneven(NamedTuple):
    """Tasks with masks."""

    support_x: Tensor
    support_y: Tensor
    support_mask: Tensor
    query_x: Tensor
    query_y: Tensor
    query_mask: Tensor


def test_points_that_are_not_there_count_for_nothing():
    a = SinusoidContexts(num_val=5).contexts("val")
    there = torch.arange(10) < 4
    masks = there.expand(5, -1)
    uneven = Uneven(a.support_x, a.support_y, masks, a.query_x, a.query_y, masks)
    few = type(a)(*(leaf[:, :4] for leaf in a))
    module = FewShotRegression(
        DeepSet(["support_x", "support_y"], 2, 97, mask="support_mask"), Template(curves()), refine=GradientDescent(2)
    )
    torch.testing.assert_close(module(uneven), module(few))
    torch.testing.assert_close(module.objective(module(few), uneven), module.objective(module(few), few))


def test_the_query_set_is_hidden():
    a = SinusoidContexts(num_val=4).contexts("val")
    module = FewShotRegression(LearnedInitialization(97), Template(curves()), refine=GradientDescent(3))
    blank = a._replace(query_x=torch.zeros_like(a.query_x), query_y=torch.zeros_like(a.query_y))
    assert torch.equal(module(a), module(blank))
    assert not torch.equal(module(a), module(take(a, torch.tensor([1, 0, 2, 3]))))


def test_maml_is_the_gradient_through_the_gradient():
    """By hand, for one step of a linear model: d/db0 L_query(b0 - lr dL_support(b0)) = (1 - lr H) dL_query."""
    torch.manual_seed(0)
    a = SinusoidContexts(num_val=1, shots=4).contexts("val")
    for unroll in (None, 0):
        module = FewShotRegression(
            LearnedInitialization(2), Template(nn.Linear(1, 1)), refine=GradientDescent(1, lr=0.01, unroll=unroll)
        )
        module.amortized_step(a).mean().backward()
        one = torch.stack([a.support_x[0], torch.ones(4)], 1)
        hessian = 2 * one.mT @ one / 4
        _, outer = value_and_grad(module, module(a), a)
        expected = outer[0] if unroll == 0 else (torch.eye(2) - 0.01 * hessian) @ outer[0]
        torch.testing.assert_close(module.network.b.grad, expected)


def test_imaml_is_the_gradient_of_the_end_whatever_the_way_there():
    """By hand, for a linear model: the end x* of L_support(x) + |x - b0|^2 / 2 moves with b0 by (H + 1)^-1."""
    a = map_leaves(Tensor.double, SinusoidContexts(num_val=1, shots=4).contexts("val"))
    refine = Implicit(LBFGS(200, tol=1e-10), anchor=1.0)
    module = FewShotRegression(LearnedInitialization(2), Template(nn.Linear(1, 1)), refine=refine).double()
    module.amortized_step(a).mean().backward()
    one = torch.stack([a.support_x[0], torch.ones(4).double()], 1)
    hessian = 2 * one.mT @ one / 4
    _, outer = value_and_grad(module, module(a).detach(), a)
    expected = torch.linalg.solve(hessian + torch.eye(2).double(), outer[0])
    torch.testing.assert_close(module.network.b.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["MAML", "Meta-SGD", "hybrid"])
def test_two_processes_average_to_the_gradient_of_one(name):
    from benchmarks.meta import METHODS, two_processes_apart

    torch.manual_seed(0)
    assert two_processes_apart(METHODS[name][0](), SinusoidContexts(batch_size=8).batch("train", 0)) < 1e-6


def test_a_step_of_maml_on_all_tasks_at_once_is_that_of_a_clone_for_each():
    from benchmarks.maml_step import compare

    assert max(apart for _, apart in compare(turns=1).values()) < 1e-5


def test_metasgd_has_a_step_size_for_each_parameter():
    a = SinusoidContexts(num_val=8).contexts("val")
    module = FewShotRegression(
        LearnedInitialization(97), Template(curves()), refine=GradientDescent(1, 0.01, learn_lr=True, features=97)
    )
    with torch.no_grad():
        module.refine.log_lr[0, :50] = math.log(0.1)
    _, grad = value_and_grad(module, torch.zeros(8, 97), module.observe(a))
    rates = torch.where(torch.arange(97) < 50, 0.1, 0.01)
    torch.testing.assert_close(module(a), -rates * grad)
    with pytest.raises(ValueError, match="set learn_lr"):
        GradientDescent(1, features=97)


def test_prototypes_are_the_nearest_mean():
    torch.manual_seed(0)
    a = Glyphs(shots=3, queries=5, num_val=4).batch("val", 0)
    module = FewShotClassification(Prototypes(5), Template(ConvBlocks(28, 5, [8, 8]), "last"))
    x, z = module.template.features(a.support_x), module.template.features(a.query_x)
    means = x.view(4, 5, 3, -1).mean(2)
    logits = -10 / z.shape[2] * torch.cdist(z, means).square()
    b = module(a)
    expected = nn.functional.cross_entropy(logits.mT, a.query_y, reduction="none").mean(1)
    torch.testing.assert_close(module.objective(b, a), expected, rtol=1e-3, atol=1e-4)
    nearest = logits.argmax(2) == a.query_y
    torch.testing.assert_close(module.accuracy(b, a), nearest.float().mean(1))


def test_shared_layers_run_once_for_a_solver():
    a = Glyphs(num_val=3).batch("val", 0)
    module = FewShotClassification(LearnedInitialization(5 * 393), Template(ConvBlocks(28, 5, [8, 8]), "last"))
    runs = []
    module.template.base.register_forward_hook(lambda *_: runs.append(1))
    prepared = module.prepare(a)
    found = LBFGS(10).solve(module, prepared, module.initial(prepared))
    assert len(runs) == 2  # support and query
    torch.testing.assert_close(found.value, evaluate(module, found.b, a))
    assert (found.value < math.log(5)).all()


def test_a_solver_of_the_support_set_overfits_it():
    torch.manual_seed(0)
    a = SinusoidContexts(num_val=16, shots=5).contexts("val")
    module = FewShotRegression(LearnedInitialization(97), Template(curves()), refine=GradientDescent(2, 0.01))
    found = generalization(module, a, module(a).detach(), LBFGS(200))
    assert (found["support_solver"] < 0.1 * found["query_solver"]).float().mean() > 0.8
    assert (found["support_solver"] < found["support_network"]).all()
    torch.testing.assert_close(found["query_network"], evaluate(module, module(a), a))
    assert found["wins"].mean() == (found["query_network"] < found["query_solver"]).float().mean()


def test_the_report_of_a_test_tells_both_sets_apart(capsys):
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.num_val=8", "--data.num_test=24"]
    small += ["--data.eval_batch_size=16", "--gap.solver.steps=5", "--budget.enabled=false"]
    main(["fit", "-c", "metasgd_sinusoid", "--run_folder=run", "--trainer.enable_progress_bar=false", *small])
    found = json.loads(Path("run/results.json").read_text())
    both = found["generalization"]
    assert both["tasks"] == 24
    assert both["query_network"] == pytest.approx(found["objective"]["network"], rel=1e-4)
    assert both["support_solver"] < both["support_network"]
    assert Path("run/pictures/generalization.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert re.search(rf"query set .*{both['query_network']:.4g} ± .*; {both['query_solver']:.4g} ±", table)
    assert re.search(rf"tasks on which the network is better +{both['wins']:.1%}", table)


def test_the_exact_posterior_is_that_of_regression_in_closed_form():
    a = GaussianProcesses(shots=(2, 5), num_val=6, queries=3).contexts("val")
    data = GaussianProcesses()
    for i in range(6):
        x, y = (t[i, a.support_mask[i]].double() for t in (a.support_x, a.support_y))
        z = a.query_x[i].double()
        k = data.covariance(x[None], x[None])[0] + 0.01 * torch.eye(len(x))
        across = data.covariance(x[None], z[None])[0]
        torch.testing.assert_close(a.mean[i].double(), across.mT @ torch.linalg.solve(k, y), rtol=1e-3, atol=1e-4)
        left = 1.01 - (across * torch.linalg.solve(k, across)).sum(0)
        torch.testing.assert_close(a.variance[i].double(), left, rtol=1e-3, atol=1e-5)
    assert (a.support_y[~a.support_mask] == 0).all()


def test_the_gap_of_a_gaussian_process_is_a_divergence():
    a = GaussianProcesses(num_val=6, kernel="matern").contexts("val")
    module = GaussianProcessRegression(NeuralProcess(features=8, layers=1))
    b = module(a)
    exact = torch.distributions.Normal(a.mean, a.variance.sqrt())
    divergence = torch.distributions.kl_divergence(exact, module.decode(b, a)).mean(1)
    torch.testing.assert_close(module.objective(b, a) - module.optimum(a), divergence, rtol=1e-4, atol=1e-5)
    hidden = a._replace(mean=a.mean + 1, variance=2 * a.variance)
    assert torch.equal(module(hidden), b)


def test_a_neural_process_moves_with_its_points_and_sees_no_order():
    torch.manual_seed(0)
    a = GaussianProcesses(num_val=5).contexts("val")
    module = GaussianProcessRegression(NeuralProcess(features=8, layers=2))
    b = module(a)
    moved = a._replace(support_x=a.support_x + 3, query_x=a.query_x + 3)
    torch.testing.assert_close(module(moved), b, rtol=1e-3, atol=1e-4)
    order = torch.randperm(a.support_x.shape[1])
    shuffled = a._replace(**{name: getattr(a, name)[:, order] for name in ("support_x", "support_y", "support_mask")})
    torch.testing.assert_close(module(shuffled), b, rtol=1e-3, atol=1e-4)
    unseen = a._replace(support_x=torch.where(a.support_mask, a.support_x, 9.0))
    torch.testing.assert_close(module(unseen), b, rtol=1e-3, atol=1e-4)


def test_glyphs_are_split_by_script():
    parts = [Glyphs().images(split) for split in ("train", "val", "test")]
    assert [part.shape[1:] for part in parts] == 3 * [(12, 28, 28)]
    assert [len(part) for part in parts] == [len(torch.unique(part.flatten(1), dim=0)) for part in parts]
    assert min(len(part) for part in parts) > 50
    with pytest.raises(ProblemError, match=r"12 hands; tasks of 5 with 5 \+ 10 .* lower data.ways"):
        Glyphs(shots=5, queries=10).batch("train", 0)


def test_evaluation_tasks_are_the_same_in_any_batch():
    one, all_ = Glyphs(num_val=4, eval_batch_size=1), Glyphs(num_val=4)
    assert torch.equal(one.batch("val", 2).query_x, all_.batch("val", 0).query_x[2:3])


def test_training_tasks_may_have_more_classes():
    data = Glyphs(ways=5, train_ways=12, queries=2, batch_size=3, num_val=3)
    train_, val = data.batch("train", 0), data.batch("val", 0)
    assert train_.support_y.tolist() == 3 * [list(range(12))]
    assert val.support_y.tolist() == 3 * [list(range(5))]
    assert equal(val, Glyphs(ways=5, queries=2, num_val=3).batch("val", 0))
    with pytest.raises(ValueError, match=r"train_ways must be at least data.ways, 5; got 3"):
        Glyphs(train_ways=3)


def test_prototypes_leave_out_classes_without_an_example():
    torch.manual_seed(0)
    a = Glyphs(num_val=4).batch("val", 0)
    narrow = FewShotClassification(Prototypes(5), Template(ConvBlocks(28, 5, [8, 8]), "last"))
    wide = FewShotClassification(Prototypes(9), Template(ConvBlocks(28, 9, [8, 8]), "last"))
    wide.template.base.load_state_dict(narrow.template.base.state_dict())
    torch.testing.assert_close(wide.objective(wide(a), a), narrow.objective(narrow(a), a))
    assert torch.equal(wide.classes(wide(a), a), narrow.classes(narrow(a), a))


def test_views_of_an_image_are_averaged_in_evaluation_alone():
    torch.manual_seed(0)
    with_, without = ConvBlocks(28, 3, [8, 8], views=True), ConvBlocks(28, 3, [8, 8])
    without.load_state_dict(dict(zip(without.state_dict(), with_.state_dict().values(), strict=True)))
    x = Glyphs(num_val=2).batch("val", 0).support_x[0]
    assert torch.equal(with_(x), without(x))
    with_.eval()
    views = with_[2](x.unsqueeze(1))
    assert views.shape == (9 * len(x), 1, 28, 28)
    torch.testing.assert_close(views[::9], x.unsqueeze(1))
    torch.testing.assert_close(with_(x), without(views).view(len(x), 9, 3).mean(1))
    assert with_(x[:0]).shape == (0, 3)
    turned = grid_sample(
        x[None], affine_grid(with_[2].maps[1:2], [1, len(x), 28, 28], align_corners=False), align_corners=False
    )
    assert (with_(turned[0]) - with_(x)).norm() < (without(turned[0]) - without(x)).norm()


def test_drawings_are_framed():
    strokes = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    strokes[0, 0, 3:14, 2] = strokes[0, 0, 13, 2:13] = 255
    strokes[1, 0, 4:22, 8] = strokes[1, 0, 21, 8:26] = 255
    again = framed(framed(strokes))
    place = (2 * torch.arange(28) + 1) / 28 - 1
    for image in (framed(strokes)[:2, 0] / 255, again[:2, 0] / 255):
        ink = image.sum((1, 2))
        middle = torch.stack([(image.sum(axis) * place).sum(1) / ink for axis in (1, 2)])
        assert middle.abs().max() < 0.02
        apart = (image * (place**2 + place.unsqueeze(1) ** 2)).sum((1, 2)) / ink
        assert ((apart.sqrt() - 0.45).abs() < 0.03).all()
    assert not again[2].any()


def test_omniglot_says_where_its_file_should_be(tmp_path):
    with pytest.raises(
        ProblemError, match=r"no omniglot_small_28.npz in .*AMORTIZED_DATA; the recipe glyphs needs no file"
    ):
        Omniglot(root=str(tmp_path)).batch("train", 0)


def test_omniglot_holds_out_alphabets():
    data = Omniglot(ways=20, shots=5)
    try:
        counts = {split: len(data.images(split)) for split in ("train", "val", "test")}
    except ProblemError:
        pytest.skip("needs omniglot_small_28.npz: set AMORTIZED_DATA to the folder that holds omniglot/")
    assert counts == {"train": 179, "val": 17, "test": 46}
    a = data.batch("test", 0)
    assert a.support_x.shape == (256, 100, 28, 28)
    assert a.query_x.shape == (256, 100, 28, 28)

"""Batches as mappings and with losses of one's own, against loops over the samples."""

import warnings
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from fisher_models import randomised
from torch import nn
from torch.nn import functional

from ars.regularizers import ActivationCovariance, DiagonalFisher, KroneckerFisher

TOLERANCE = 1e-11  # plain autograd's own rounding in float64
METHODS = ["auto", "hooks", "vmap", "loop"]


class Net(nn.Module):
    """Two layers and a norm on every position, called by names."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x, *, scale=None, flag=False):
        x = self.norm(self.first(x).tanh())
        return self.head(x if scale is None else x * scale) * (2.0 if flag else 1.0)


def net():
    return randomised(Net())


def data(n=5, length=6):
    x = torch.randn(n, length, 4, dtype=torch.float64)
    y = torch.randint(3, (n, length))
    y[0, 2:] = -100
    y[2] = -100
    return x, y, torch.rand(n, 1, 1, dtype=torch.float64)


def by_hand(model, losses):
    """Mean of the squared gradients of one loss a sample, in a loop."""
    model.eval()
    names, leaves = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in leaves]
    for loss in losses:
        for sums, g in zip(total, torch.autograd.grad(loss, leaves), strict=True):
            sums += g.square()
    return {name: sums / len(losses) for name, sums in zip(names, total, strict=True)}


def cross_entropy(logits, y):
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")


# Mappings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_called_by_its_names(method, kind, relative_error):
    model, (x, y, scale) = net(), data()
    expected = by_hand(
        model,
        [cross_entropy(model(x[i], scale=scale[i], flag=True), y[i]) for i in range(len(x))],
    )
    batch = kind(x=x, scale=scale, flag=True, labels=y)
    found = DiagonalFisher(model, "empirical", method=method).fit([batch]).importance
    assert relative_error(found, expected) < TOLERANCE


def test_samples_of_a_mapping_are_counted_and_cut(relative_error):
    model, (x, y, _) = net(), data(7)
    batches = [
        {"x": part, "labels": target} for part, target in zip(x.split(3), y.split(3), strict=True)
    ]
    for estimator in ("exact", "sketch"):
        seed = torch.Generator().manual_seed(0)
        found = DiagonalFisher(model, estimator, generator=seed).fit(batches, 5)
        seed = torch.Generator().manual_seed(0)
        pairs = DiagonalFisher(model, estimator, generator=seed).fit([(x[:5], y[:5])])
        assert found.n_samples == 5
        assert relative_error(found.importance, pairs.importance) < TOLERANCE


def test_factors_and_covariances_take_mappings_alike():
    model, (x, y, _) = net(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in (KroneckerFisher(model, "exact"), ActivationCovariance(model)):
            what = "factors" if isinstance(kind, KroneckerFisher) else "augmented"
            pairs = getattr(kind.fit([(x, y)]), what)
            found = getattr(kind.fit([{"x": x, "labels": y}]), what)
            torch.testing.assert_close(found, pairs, rtol=1e-13, atol=0.0)
        whole = ActivationCovariance(model).fit([x]).augmented
        bare = ActivationCovariance(model).fit([{"x": x}]).augmented
        torch.testing.assert_close(bare, whole, rtol=1e-13, atol=0.0)


def test_an_attention_mask_masks_a_covariance_that_has_no_labels():
    x = data()[0][:2]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    model = nn.Module()
    model.inner = nn.Linear(4, 3).double()
    model.forward = lambda x, attention_mask: model.inner(x)
    found = ActivationCovariance(model).fit([{"x": x, "attention_mask": mask}])
    rows = torch.cat([x[0], x[1, :3]])
    torch.testing.assert_close(found.covariance["inner.weight"], rows.T @ rows / 9)


class WithLoss(nn.Module):
    """Returns its own loss, as Hugging Face's models do."""

    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = net(), loss

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else self.loss(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def aligned(logits, labels):
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def shifted(logits, labels):
    return aligned(logits[:, :-1], labels[:, 1:])


def shifted_sum(logits, labels):
    return 3.0 * cross_entropy(logits[:, :-1].float(), labels[:, 1:])


@pytest.mark.parametrize("loss", [aligned, shifted, shifted_sum])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_labels_are_where_the_models_own_loss_has_them(loss, dtype, relative_error):
    model, (x, y, _) = WithLoss(loss).to(dtype), data()
    expected = by_hand(
        model,
        [cross_entropy(model.net(a[None]), b[None]) if loss is aligned
         else cross_entropy(model.net(a[None])[:, :-1], b[None, 1:])
         for a, b in zip(x.to(dtype), y, strict=True)],
    )  # fmt: skip
    first = torch.full_like(y, -100)  # tells nothing, and adds nothing
    batches = [{"x": x.to(dtype), "labels": labels} for labels in (first, y)]
    found = DiagonalFisher(model, "empirical").fit(batches).importance
    doubled = {name: 2 * importance for name, importance in found.items()}
    assert relative_error(doubled, expected) < (TOLERANCE if dtype is torch.float64 else 0.1)


def smoothed(logits, labels):
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def weighted(logits, labels):
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=logits.dtype)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=weights)


def squared(logits, labels):
    return (logits[..., 0] - labels).square().mean()


@pytest.mark.parametrize("loss", [smoothed, weighted, squared])
@pytest.mark.parametrize("kind", [DiagonalFisher, KroneckerFisher])
def test_another_loss_is_refused(loss, kind):
    model, (x, y, _) = WithLoss(loss), data()
    with pytest.raises(ValueError, match=r"loss of WithLoss is not the cross-entropy.*loss_fn"):
        kind(model, "exact").fit([{"x": x, "labels": y}])


def test_a_single_label_may_be_none_that_is_predicted(relative_error):
    """At the first position alone, which a causal model has no prediction for."""
    model, (x, y, _) = WithLoss(shifted_sum), data()
    y[:, 1:] = -100
    with pytest.warns(UserWarning, match="0 throughout"):
        found = DiagonalFisher(model, "empirical").fit([{"x": x, "labels": y}]).importance
    assert not any(importance.any() for importance in found.values())


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        ({"x": torch.ones(2, 4)}, TypeError, "without a tensor 'labels'.*has \\['x'\\]"),
        ({"x": torch.ones(2, 4), "labels": torch.ones(2)}, TypeError, "int64.*loss_fn"),
        ({"labels": torch.ones(2).long()}, TypeError, "no tensor beside its labels"),
        ({"x": torch.ones(2, 4), "scale": torch.ones(1, 5), "labels": torch.ones(2).long()},
         ValueError, "'scale' of batch 0 has shape \\(1, 5\\), but there are 2 samples"),
        ({"x": torch.ones(0, 4), "labels": torch.ones(0).long()}, ValueError, "empty"),
    ],
)  # fmt: skip
def test_what_a_mapping_lacks_is_named(batch, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(Net(), "empirical").fit([batch])


def test_a_mapping_is_one_batch_and_has_no_segments():
    batch = {"x": torch.ones(2, 4), "labels": torch.ones(2).long()}
    with pytest.raises(TypeError, match="pass a DataLoader, or a single batch in a list"):
        DiagonalFisher(Net()).fit(batch)
    with pytest.raises(TypeError, match="no segments"):
        DiagonalFisher(Net(), unit="segment").fit([batch])


# Losses


def squared_error(model, batch):
    return (model(batch["x"])[..., 0] - batch["y"]).square().sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_regression_is_that_of_a_loop(method, chunk_size, relative_error):
    model, (x, _, y) = net(), data()
    expected = by_hand(
        model, [(model(a)[..., 0] - b[0]).square().sum() for a, b in zip(x, y, strict=True)]
    )
    batches = [{"x": x[:3], "y": y[:3, :, 0]}, {"x": x[3:], "y": y[3:, :, 0]}]
    fisher = DiagonalFisher(model, "empirical", method=method, chunk_size=chunk_size)
    found = fisher.fit(batches, loss_fn=squared_error)
    assert relative_error(found.importance, expected) < TOLERANCE
    assert found.n_samples == 5
    three = DiagonalFisher(model, "empirical").fit(batches, 3, loss_fn=squared_error)
    again = DiagonalFisher(model, "empirical").fit(batches[:1], loss_fn=squared_error)
    assert relative_error(three.importance, again.importance) < TOLERANCE


def test_the_cross_entropy_as_a_loss_is_the_empirical_fisher(relative_error):
    model, (x, y, _) = net(), data()

    def loss_fn(model, batch):
        x, y = batch
        return functional.cross_entropy(model(x).mT, y, reduction="none").sum(1)

    for kind, what in ((DiagonalFisher, "importance"), (KroneckerFisher, "factors")):
        found = kind(model, "empirical")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = getattr(found.fit([[x, y]], loss_fn=loss_fn), what)
            expected = getattr(found.fit([(x, y)]), what)
        if kind is KroneckerFisher:  # masked positions count in A
            own, expected = ({n: f.outputs for n, f in each.items()} for each in (own, expected))
        assert relative_error(own, expected) < TOLERANCE


def mean(model, batch):
    return squared_error(model, batch).mean()


def mean_for_each(model, batch):
    return squared_error(model, batch).mean().expand(len(batch["x"]))


def contrasted(model, batch):
    out = model(batch["x"]).flatten(1)
    return functional.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


def normalised(model, batch):
    out = functional.batch_norm(model(batch["x"]).flatten(1), None, None, training=True, eps=1e-3)
    return out.square().sum(1)


def noisy(model, batch):
    return (model(batch["x"] + torch.randn_like(batch["x"])) ** 2).flatten(1).sum(1)


def one_too_many(model, batch):
    return squared_error(model, {k: torch.cat([v, v[:1]]) for k, v in batch.items()})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (mean, r"returned shape \(\), not \(B,\)"),
        (mean_for_each, "another loss by itself"),
        (contrasted, "another loss by itself"),
        (normalised, "another loss by itself|more than 1 value per channel"),
        (noisy, "draws random numbers"),
        (one_too_many, "6 losses for 5 samples|returned 2 losses for 1"),
    ],
)
def test_losses_that_couple_samples_are_refused(method, loss_fn, match):
    model, (x, _, y) = net(), data()
    fisher = DiagonalFisher(model, "empirical", method=method)
    with pytest.raises(ValueError, match=match):
        fisher.fit([{"x": x, "y": y[..., 0]}], loss_fn=loss_fn)


def test_batch_norm_that_a_loss_trains_is_refused():
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
    x = torch.randn(6, 4, dtype=torch.float64)
    plain = DiagonalFisher(model, "empirical").fit([x], loss_fn=lambda model, x: model(x)[:, 0])
    assert plain.importance["1.weight"].all()

    def trained(model, x):
        model[1].train()
        return model(x)[:, 0]

    with pytest.raises(ValueError, match=r"more than 1 value|another loss by itself"):
        DiagonalFisher(model, "empirical").fit([x], loss_fn=trained)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("estimator", "options", "loss_fn", "error", "match"),
    [
        ("sketch", {}, squared_error, ValueError, "'sketch' draws from.*estimator='empirical'"),
        ("exact", {}, squared_error, ValueError, "'exact' draws from, or sums over"),
        ("empirical", {"unit": "token"}, squared_error, ValueError, "'token' divides positions"),
        ("empirical", {}, "mse", TypeError, "loss_fn must be a function"),
    ],
)
def test_what_has_no_meaning_is_refused(estimator, options, loss_fn, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(Net(), estimator, **options).fit([], loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (3.0, TypeError, "no tensor with the samples"),
        ({"x": torch.ones(0, 2, 4), "y": torch.ones(0, 2)}, ValueError, "empty"),
        ({"x": torch.ones(3, 2, 4), "y": torch.ones(2, 2)}, ValueError, "'y' of batch 0 has shape"),
    ],
)
def test_batches_of_losses_hold_samples_in_front(batch, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(Net(), "empirical").fit([batch], loss_fn=squared_error)


def test_a_loss_without_a_graph_is_refused():
    batch = {"x": torch.ones(3, 2, 4), "y": torch.ones(3, 2)}
    with pytest.raises(ValueError, match="depend on any trainable parameter"):
        DiagonalFisher(Net(), "empirical").fit(
            [batch], loss_fn=lambda model, batch: squared_error(model, batch).detach()
        )

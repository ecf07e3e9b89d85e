"""Units, draws, and the estimators that are not the Fisher: batched, adam, logit_reversal."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher


def gradient_squares(model, losses):
    """Sum of the squared gradients of the given losses."""
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for squares, gradient in zip(total.values(), gradients, strict=True):
            squares += gradient**2
    return total


def scaled(importance, factor):
    return {n: t * factor for n, t in importance.items()}


def position_losses(model, x, y, sign=1):
    """Loss of every valid position, in one list a sample."""
    for logits, labels in zip(sign * model(x), y, strict=True):
        losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        yield [loss for loss, label in zip(losses, labels, strict=True) if label != -100]


def test_token_squares_every_position_that_is_not_masked(tied_gpt, tokens, relative_error, way):
    x, y = tokens(7)
    model = tied_gpt(torch.float64)
    fisher = DiagonalFisher(model, "empirical", unit="token", **way).fit([(x, y)])
    losses = [loss for sample in position_losses(model.eval(), x, y) for loss in sample]
    assert 0 < len(losses) < y.numel()
    expected = scaled(gradient_squares(model, losses), 1 / len(losses))
    assert relative_error(fisher.importance, expected) < 1e-10
    assert fisher.n_samples == 7


def test_segment_squares_every_document(tied_gpt, tokens, relative_error, way):
    x, y = tokens(7)
    segments = torch.tensor([5, 5, 9, 9, 9, -2]).expand(7, 6).clone()
    segments[3] = 4
    model = tied_gpt(torch.float64)
    fisher = DiagonalFisher(model, "empirical", unit="segment", **way)
    fisher.fit([(x, y, segments)])
    losses = []
    for sample, labels, ids in zip(position_losses(model.eval(), x, y), y, segments, strict=True):
        kept = ids[labels != -100]
        for number in kept.unique():
            losses.append(sum(loss for loss, i in zip(sample, kept, strict=True) if i == number))
    expected = scaled(gradient_squares(model, losses), 1 / len(losses))
    assert relative_error(fisher.importance, expected) < 1e-10


def test_packing_does_not_matter_where_documents_do_not_mix(relative_error):
    """Two documents in a row are two rows, for a model that does not mix positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 8, 3, dtype=torch.float64), torch.randint(4, (6, 8))
    generator = torch.Generator()
    apart = DiagonalFisher(model, "sketch", generator=generator.manual_seed(1)).fit([(x, y)])
    packed = x.view(3, 16, 3), y.view(3, 16), torch.arange(16).expand(3, 16) // 8
    fisher = DiagonalFisher(model, "sketch", unit="segment", generator=generator.manual_seed(1))
    assert relative_error(fisher.fit([packed]).importance, apart.importance) < 1e-12
    padded = functional.pad(x, (0, 0, 0, 2)), functional.pad(y, (0, 2), value=-100)
    for unit in ("sequence", "token"):
        fishers = [DiagonalFisher(model, "empirical", unit=unit) for _ in range(2)]
        long, short = fishers[0].fit([padded]), fishers[1].fit([(x, y)])
        assert relative_error(long.importance, short.importance) < 1e-12


def test_exact_is_a_token_sum_for_every_unit(tied_gpt, tokens, relative_error):
    x, y = tokens(4, masked=False)
    x, y = x[:, :3], y[:, :3]
    model = tied_gpt(torch.float64)
    by_sequence = DiagonalFisher(model, "exact").fit([(x, y)]).importance
    by_token = DiagonalFisher(model, "exact", unit="token").fit([(x, y)]).importance
    assert relative_error(scaled(by_token, 3.0), by_sequence) < 1e-12


@pytest.mark.parametrize("unit", ["token", "segment", "sequence"])
def test_units_do_not_depend_on_batch_size(tied_gpt, tokens, relative_error, unit):
    x, y = tokens(22)
    segments = torch.arange(6).expand(22, 6) // torch.randint(1, 4, (22, 1))
    batch = (x, y, segments) if unit == "segment" else (x, y)
    model = tied_gpt()
    results = []
    for b in (1, 7, 22):
        fisher = DiagonalFisher(
            model, "sketch", unit=unit, generator=torch.Generator().manual_seed(3)
        )
        fisher.fit(zip(*(part.split(b) for part in batch), strict=True))
        results.append(fisher.importance)
    assert relative_error(results[1], results[0]) < 1e-6
    assert relative_error(results[2], results[0]) < 1e-6


@pytest.mark.parametrize("estimator", ["sketch", "mc"])
def test_draws_are_averaged(tied_gpt, tokens, relative_error, estimator, way):
    """One pass with three draws is the mean of three passes with the same random numbers."""
    x, y = tokens(1, masked=False)
    model = tied_gpt(torch.float64)
    generator = torch.Generator().manual_seed(4)
    passes = [
        DiagonalFisher(model, estimator, generator=generator).fit([(x, y)]).importance
        for _ in range(3)
    ]
    mean = {n: sum(p[n] for p in passes) / 3 for n in passes[0]}
    assert relative_error(passes[0], passes[1]) > 0.01
    generator.manual_seed(4)
    fisher = DiagonalFisher(model, estimator, draws=3, generator=generator, **way).fit([(x, y)])
    assert relative_error(fisher.importance, mean) < 1e-12


def test_logit_reversal_is_the_empirical_of_minus_the_logits(tied_gpt, tokens, relative_error):
    x, y = tokens(8)
    model = tied_gpt(torch.float64)
    fisher = DiagonalFisher(model, "logit_reversal").fit([(x, y)])
    losses = [sum(sample) for sample in position_losses(model.eval(), x, y, sign=-1) if sample]
    expected = scaled(gradient_squares(model, losses), 1 / 8)
    assert relative_error(fisher.importance, expected) < 1e-10


def test_logit_reversal_does_not_vanish_where_the_model_is_right():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[200.0, 0.0], [0.0, 200.0]]))
    batch = torch.eye(2), torch.arange(2)
    assert (DiagonalFisher(model, "empirical").fit([batch]).importance["weight"] == 0).all()
    reversal = DiagonalFisher(model, "logit_reversal").fit([batch]).importance["weight"]
    torch.testing.assert_close(reversal, torch.full((2, 2), 0.5))


def test_batched_is_the_square_of_each_batch_mean_gradient(tied_gpt, tokens, relative_error):
    x, y = tokens(10, masked=False)
    model = tied_gpt(torch.float64)
    fisher = DiagonalFisher(model, "batched").fit(zip(x.split(4), y.split(4), strict=True))
    losses = []
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        loss = functional.cross_entropy(model.eval()(xs).flatten(0, 1), ys.flatten()) * 6
        losses.append(loss * math.sqrt(len(xs) / 10))
    assert relative_error(fisher.importance, gradient_squares(model, losses)) < 1e-10
    one = DiagonalFisher(model, "batched").fit(zip(x.split(1), y.split(1), strict=True))
    empirical = DiagonalFisher(model, "empirical").fit([(x, y)])
    assert relative_error(one.importance, empirical.importance) < 1e-12
    assert relative_error(fisher.importance, empirical.importance) > 0.1


def test_recurrent_layers_are_differentiated_without_dropout_and_left_as_they_were():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            assert self.rnn.training  # as cuDNN wants it
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    model = Recurrent()
    model.rnn.eval()
    batch = torch.randn(3, 5, 3), torch.randint(2, (3, 5))
    first, second = (
        DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert model.rnn.dropout == 0.5
    assert not model.rnn.training
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"unit": "word"}, "unknown unit 'word'"),
        ({"draws": 0}, "draws must be a positive integer"),
        ({"estimator": "empirical", "draws": 2}, "draws nothing"),
        ({"estimator": "batched", "unit": "token"}, "has no units"),
        ({"estimator": "batched", "method": "loop"}, "'batched' takes no single samples; leave"),
        ({"estimator": "batched", "chunk_size": 4}, "'batched' takes no single samples; leave"),
        ({"estimator": "adam", "method": "vmap"}, "'adam' takes no single samples; leave"),
    ],
)
def test_refuses_combinations_without_a_meaning(arguments, match):
    with pytest.raises(ValueError, match=match):
        DiagonalFisher(nn.Linear(3, 2), **arguments)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        ((torch.randn(2, 4, 3), torch.zeros(2, 4).long()), TypeError, r"triple \(inputs, targets"),
        ((torch.randn(2, 3), torch.zeros(2).long(), torch.zeros(2)), TypeError, "segments .*int64"),
        (
            (torch.randn(2, 4, 3), torch.zeros(2, 4).long(), torch.zeros(2).long()),
            ValueError,
            r"segments of batch 0 have shape \(2,\)",
        ),
        (
            (torch.randn(1, 5000, 3), torch.zeros(1, 5000).long(), torch.arange(5000)[None]),
            ValueError,
            r"1 \* 5000 = 5000 backward",
        ),
        (
            (torch.randn(2, 3), torch.full((2,), -100), torch.zeros(2).long()),
            ValueError,
            "no segment to average over",
        ),
    ],
)
def test_refuses_wrong_segments(batch, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(nn.Linear(3, 2), unit="segment").fit([batch])

"""Which method is chosen, what is checked before, and models that hooks cannot do."""

import warnings

import pytest
import torch
from fisher_models import Elsewhere, Reused, randomised, sequences
from torch import nn
from torch.utils.checkpoint import checkpoint

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import estimators
from ars.regularizers.fisher.estimators import Chunk, Samples
from ars.regularizers.fisher.hooks import Taps
from ars.regularizers.fisher.per_sample import zero_sums

TOLERANCE = 1e-11


def test_torch_transformer_without_its_attention(relative_error):
    """nn.MultiheadAttention reads a projection's weight without calling it: no rule, vmap."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = randomised(nn.Sequential(layer, nn.Linear(4, 3)))
    batch = sequences()
    loop = DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance
    with pytest.warns(UserWarning, match=r"MultiheadAttention '0\.self_attn' has no rule"):
        auto = DiagonalFisher(model, "empirical").fit([batch]).importance
    assert relative_error(auto, loop) < TOLERANCE
    with pytest.raises(RuntimeError, match=r"MultiheadAttention.*method='auto', 'vmap' or 'loop'"):
        DiagonalFisher(model, "empirical", method="hooks").fit([batch])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks(kind, relative_error):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model, batch = randomised(Recurrent()), sequences()
    loop = DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance
    with pytest.warns(UserWarning, match=f"{kind.__name__} 'rnn' has no rule") as caught:
        auto = DiagonalFisher(model, "empirical").fit([batch, batch]).importance
    assert len(caught) == 1
    assert relative_error(auto, loop) < TOLERANCE


@pytest.mark.parametrize("method", ["auto", "hooks"])
def test_checkpointed_layers_are_counted_once(method, relative_error):
    class Recomputed(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.recompute = recompute
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()) for _ in range(3)
            )
            self.blocks.append(self.blocks[0])
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            return self.head(x)

    batch = sequences()
    results = []
    for recompute in (True, False):
        model = randomised(Recomputed(recompute))
        results.append(DiagonalFisher(model, "exact", method=method).fit([batch]).importance)
    assert relative_error(results[0], results[1]) < 1e-15
    model = randomised(Recomputed(recompute=True))
    loop = DiagonalFisher(model, "exact", method="loop").fit([batch]).importance
    assert relative_error(results[0], loop) < TOLERANCE


def test_checkpoints_keep_nothing_that_they_recompute():
    """What a tap saves goes through the checkpoint's hooks, not around them."""
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, _ = sequences()
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    parameters = dict(model.named_parameters())
    taps, total = Taps(model, parameters, Samples.of_inputs(x)), zero_sums(parameters)
    chunk = Chunk(Samples.of_inputs(x), torch.zeros(5, 6).long(), torch.empty(5, 1, 0), None, 1)
    counts = []
    for run in (lambda: model(x), lambda: taps.add_squares(total, "empirical", chunk)):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        counts.append(packed.count(x.shape))
    assert counts[1] == counts[0] + 2  # the inputs of two layers


class Elementary(nn.Module):
    """The outputs of a recurrent layer, without its last state."""

    def forward(self, pair):
        return pair[0]


class Mixing(nn.Module):
    """Centred by the batch's mean."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x - x.mean(0, keepdim=True) / 2))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (Elsewhere, "it uses 'layer.weight' outside of the layer that has it"),
        (Mixing, "gives 'layer.weight' another gradient than plain autograd"),
    ],
)
def test_what_hooks_get_wrong_is_noticed(build, match, relative_error):
    model, batch = randomised(build()), sequences()
    loop = DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance
    with pytest.warns(UserWarning, match=f"{match}.*torch.func.vmap, 8 at a time"):
        auto = DiagonalFisher(model, "empirical").fit([batch]).importance
    assert relative_error(auto, loop) < TOLERANCE
    with pytest.raises(RuntimeError, match=match):
        DiagonalFisher(model, "empirical", method="hooks").fit([batch])


@pytest.mark.parametrize("n", [1, 2])
def test_single_samples_are_taken_as_the_others_or_refused(n):
    recurrent = nn.RNN(4, 3, batch_first=True)
    model = randomised(nn.Sequential(recurrent, Elementary()))
    x, y = sequences(n)
    pairs = list(zip(x.split(1), y.split(1), strict=True))
    with pytest.raises(RuntimeError, match="RNN '0' has no rule"):
        DiagonalFisher(model, "empirical", method="hooks").fit(pairs)


def test_the_first_two_samples_are_compared_where_single_ones_came_before():
    """Of one sample, taken twice, the mean is the sample: that they mix cannot be seen."""
    model, (x, y) = randomised(Mixing()), sequences(n=4)
    fisher = DiagonalFisher(model, "empirical", method="hooks")
    fisher.fit(zip(x.split(1), y.split(1), strict=True))
    with pytest.raises(RuntimeError, match=r"gives 'layer\.weight' another gradient"):
        fisher.fit(zip(x.split((1, 3)), y.split((1, 3)), strict=True))


def test_falls_to_the_loop_where_vmap_cannot_go(relative_error):
    class Item(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0] * float(x[0, 0, 0] > 0))

    model, batch = randomised(Item()), sequences(n=4)
    batch[0][:, 0, 0] = 1.0
    loop = DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance
    with pytest.warns(UserWarning, match=r"RNN 'rnn' has no rule(.|\n)*Samples are taken one"):
        auto = DiagonalFisher(model, "empirical").fit([batch]).importance
    assert relative_error(auto, loop) == 0.0


def test_a_layer_that_is_called_otherwise_later_is_noticed(relative_error):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.layer(x)
            return self.head(self.layer(x) if len(x) > 2 else x)

    model, (x, y) = randomised(Fickle()), sequences(n=4)
    with pytest.warns(UserWarning, match="'layer' was called 1 times at first, now 2"):
        DiagonalFisher(model, "empirical").fit([(x, y)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = zip(x.split(2), y.split(2), strict=True)
        hooks = DiagonalFisher(model, "empirical").fit(pairs).importance
    loop = DiagonalFisher(model, "empirical", method="loop").fit([(x, y)]).importance
    assert relative_error(hooks, loop) < TOLERANCE


def test_layers_are_left_without_hooks():
    model, batch = randomised(Reused()), sequences()
    DiagonalFisher(model, "empirical").fit([batch])
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="not finite"):
        DiagonalFisher(model, "empirical").fit([(batch[0] * float("nan"), batch[1])])
    assert not any(m._forward_hooks for m in model.modules())


def test_large_logits_are_taken_some_samples_at_a_time(tied_gpt, tokens, monkeypatch):
    x, y = tokens(7)
    model = tied_gpt(torch.float64)
    whole = DiagonalFisher(model, "exact", method="hooks").fit([(x, y)]).importance
    monkeypatch.setattr(estimators, "LOGITS", 2 * 6 * 11)  # of two samples
    parts = DiagonalFisher(model, "exact", method="hooks").fit([(x, y)]).importance
    assert all(torch.equal(parts[n], whole[n]) for n in whole)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (2, 2)])
def test_the_comparison_leaves_nothing_in_the_sums(sizes, relative_error):
    """Nor takes anything from them, if single samples came first."""
    model, (x, y) = randomised(Reused()), sequences(n=4)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    loop = DiagonalFisher(model, "empirical", method="loop").fit(batches).importance
    hooks = DiagonalFisher(model, "empirical").fit(batches).importance
    assert relative_error(hooks, loop) < TOLERANCE


def test_chunks_bound_what_is_differentiated_together():
    model, (x, y) = randomised(Reused()), sequences(n=7)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    DiagonalFisher(model, "empirical", chunk_size=3).fit([(x, y)])
    assert max(sizes) == 3
    assert sizes[-4:] == [3, 1, 3, 1]  # after the first, a sample of it by itself


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.BatchNorm1d(6, track_running_stats=False), "BatchNorm1d '0' has no rule"),
        (nn.Embedding(5, 4, max_norm=1.0), "Embedding '0' has no rule"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "Embedding '0' has no rule"),
    ],
)
def test_options_that_no_rule_covers(layer, match):
    model = nn.Sequential(layer, nn.Linear(4, 3))
    inputs = torch.randn(4, 6, 4) if isinstance(layer, nn.BatchNorm1d) else torch.ones(4, 6).long()
    with pytest.raises(RuntimeError, match=match):
        DiagonalFisher(model, "empirical", method="hooks").fit([(inputs, torch.ones(4, 6).long())])

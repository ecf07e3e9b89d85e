"""Models whose rows or uses of a weight are not what they seem: right, or taken another way."""

import ctypes

import numpy
import pytest
import torch
from fisher_models import Reused, randomised, sequences
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import hooks, rules

# Plain autograd's own rounding in float64, sums of squares of some dozen terms.
TOLERANCE = 1e-11


def fitted(model, batches, estimator="empirical", **options):
    return DiagonalFisher(model, estimator, **options).fit(batches).importance


def taken_otherwise(model, batches, match, relative_error, estimator="empirical"):
    """``auto`` says why it takes another way, and is right; ``hooks`` refuses."""
    loop = fitted(model, batches, estimator, method="loop")
    with pytest.warns(UserWarning, match=match):
        auto = fitted(model, batches, estimator)
    assert relative_error(auto, loop) < TOLERANCE
    with pytest.raises(RuntimeError, match=match):
        fitted(model, batches, estimator, method="hooks")


def taken_at_once(model, batches, relative_error, estimator="empirical"):
    """No warning, as warnings are errors, and right."""
    loop = fitted(model, batches, estimator, method="loop")
    assert relative_error(fitted(model, batches, estimator), loop) < TOLERANCE


def rows(n=6, width=4):
    return torch.randn(n, width, dtype=torch.float64), torch.arange(n) % 3


class Unpadded(nn.Module):
    """Runs its layer on what is not 0 only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def forward(self, x):
        y, valid = x.new_zeros(*x.shape, 2), x != 0
        y[valid] = self.fc(x[valid][:, None])
        return y.sum(1)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_rows_that_are_left_out(estimator):
    model = Unpadded()
    with torch.no_grad():
        model.fc.weight.zero_(), model.fc.bias.zero_()
    x = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    batch = x, torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match="Linear 'fc' holds rows of other samples"):
        importance = fitted(model, [batch], estimator)
    # p (1 - p) mean(counts^2) = 1/4 (4 + 4 + 9 + 1) / 4, whatever the labels.
    torch.testing.assert_close(importance["fc.weight"], torch.full((2, 1), 1.125))
    x[2, 3] = 1.0  # nine rows for four samples
    with pytest.warns(UserWarning, match="Linear 'fc' reads \\(9, 1\\) for 4 samples"):
        importance = fitted(model, [batch], estimator)
    torch.testing.assert_close(importance["fc.bias"], torch.full((2,), 25 / 16))


def test_as_many_rows_for_each_are_taken_at_once(relative_error):
    """Of this batch that is proven, which says nothing of the next with equal shapes."""
    model, (x, y) = randomised(Unpadded()), rows()
    x[:, 0] = 0.0
    taken_at_once(model, [(x, y % 2)], relative_error)
    other = x.clone()
    other[0, 1:3], other[1, 0] = 0.0, 1.0
    other[2, 0] = 1.0  # one, four and four rows, three for the others
    assert (other != 0).sum() == (x != 0).sum()
    batches = [(x, y % 2), (other, y % 2)]
    match = "Linear 'fc' holds rows of other samples"
    taken_otherwise(model, batches, match, relative_error)


class Sorted(nn.Module):
    """Its layers see the samples in the order of a value, or of a list made in Python."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        key = x[:, 0].detach()
        if self.how == "argsort":
            order = key.argsort()
            return self.head(self.layer(x[order]).tanh()[order.argsort()])
        if self.how == "sort":
            order = x[:, :1].sort(0).indices.expand(-1, 4)
            h = self.layer(x.gather(0, order)).tanh()
            return self.head(torch.zeros_like(h).scatter(0, order, h))
        if self.how == "mask":  # the order is turned round, or not
            turned = (key.diff() < 0).any()
            h = self.layer(torch.where(turned, x.flip(0), x)).tanh()
            return self.head(torch.where(turned, h.flip(0), h))
        if self.how == "product":  # as experts' rows are dispatched by matrices of 0 and 1
            rank = (key[:, None] > key).sum(1)
            places = (rank == torch.arange(len(x))[:, None]).to(x.dtype)
            return self.head(places.T @ self.layer(places @ x).tanh())
        values = key.tolist() if self.how == "tolist" else key.numpy().copy()
        order = sorted(range(len(x)), key=values.__getitem__)
        parts = x.split(1)
        h = self.layer(torch.cat([parts[i] for i in order])).tanh().split(1)
        return self.head(torch.cat([h[order.index(i)] for i in range(len(x))]))


@pytest.mark.parametrize("how", ["argsort", "sort", "mask", "product", "tolist", "numpy"])
def test_rows_that_are_shuffled_in_a_later_batch(how, relative_error):
    """The first two batches are in order; shapes and counts are those of the third."""
    model = randomised(Sorted(how))
    batches = [rows() for _ in range(3)]
    for x, _ in batches[:2]:
        x[:, 0] = torch.arange(6)
    taken_at_once(model, batches[:2], relative_error)
    batches[2][0][:, 0] = torch.tensor([0, 2, 1, 3, 4, 5])
    match = "Linear 'layer' holds rows of other samples"
    taken_otherwise(model, batches, match, relative_error)


class Crossed(nn.Module):
    """Two experts take half of the rows each: equal counts, and which half is a matter of data."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)

    def forward(self, x):
        first = x[:, :, 0] > 0  # of each sample's positions
        y = torch.zeros_like(x)
        for expert, mine in zip(self.experts, (first, ~first), strict=True):
            y = y.masked_scatter(mine[..., None], expert(x[mine]).tanh())
        return self.head(y)


def test_experts_with_equal_counts(relative_error):
    model, (x, y) = randomised(Crossed()), sequences(n=4)
    x[:, :, 0] = torch.tensor([1.0, -1, -1, 1, 1, -1])
    taken_at_once(model, [(x, y)], relative_error)
    other = x.clone()
    other[0, 0, 0], other[1, 1, 0] = -1.0, 1.0
    match = "Linear 'experts.0' holds rows of other samples"
    taken_otherwise(model, [(x, y), (other, y)], match, relative_error)


class Hidden(nn.Module):
    """Uses a weight outside of its layer, where a condition lets it be seen."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        again = functional.linear(x, self.layer.weight)
        if self.how == "gated":  # no gradient but in some samples
            again = again * (x[..., :1] > 1)
        if self.how == "small":
            return self.head(x + 1e-6 * (self.layer(x).tanh() + again))
        logits = self.head(self.layer(x).tanh() + again)
        if self.how == "certain":
            logits = logits + 60 * functional.one_hot(torch.zeros(len(x), dtype=int), 3) * (
                x[:, :1] > 9
            )
        return logits


@pytest.mark.parametrize("how", ["blank", "gated", "certain", "small"])
def test_uses_that_the_first_samples_do_not_show(how, relative_error):
    model, (x, y) = randomised(Hidden(how), torch.float32), rows()
    x, y = x.float(), torch.zeros_like(y)
    if how == "blank":
        x[:2] = 0.0
    x[:, 0] = torch.tensor([0.0, 0, 2, 2, 2, 2])
    if how == "certain":
        x[:2, 0] = 10.0
    loop = fitted(model, [(x, y)], method="loop")
    match = "it uses 'layer.weight' outside of the layer that has it"
    with pytest.warns(UserWarning, match=match):
        auto = fitted(model, [(x, y)])
    assert relative_error(auto, loop) < 1e-5  # float32
    with pytest.raises(RuntimeError, match=match):
        fitted(model, [(x, y)], method="hooks")


def test_a_parameter_that_is_kept_elsewhere(relative_error):
    """In a list that neither hooks nor vmap's replacement reaches, and behind a gate."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.kept = [self.layer.weight]

        def forward(self, x):
            again = functional.linear(x, self.kept[0]) * (x[:, :1] > 1)
            return self.head(self.layer(x).tanh() + again)

    model, (x, y) = randomised(Kept(), torch.float64), rows()
    x[:, 0] = torch.tensor([0.0, 0, 2, 2, 2, 2])
    match = r"uses 'layer.weight' outside(.|\n)*not found at its place in the module(.|\n)*one by"
    loop = fitted(model, [(x, y)], method="loop")
    with pytest.warns(UserWarning, match=match):
        auto = fitted(model, [(x, y)])
    assert relative_error(auto, loop) == 0.0
    with pytest.raises(RuntimeError, match="not found at its place in the module"):
        fitted(model, [(x, y)], method="vmap")


class Layouts(nn.Module):
    """Positions first, by themselves or folded with the samples, from some size on."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        batch, length, _ = x.shape
        if length <= 4 if self.how.endswith("long") else batch <= 2:
            return self.head(self.layer(x).tanh())
        x = x.transpose(0, 1)
        if self.how.startswith("folded"):
            x = x.flatten(0, 1)
        return self.head(self.layer(x).tanh()).view(length, batch, 3).transpose(0, 1)


@pytest.mark.parametrize("how", ["folded", "folded, long", "by itself", "by itself, long"])
def test_layouts_that_change_with_the_size(how, relative_error):
    model = randomised(Layouts(how))
    batches = [sequences(n=2, length=3), sequences(n=4, length=6)]
    taken_at_once(model, batches[:1], relative_error)
    match = "Linear 'layer' (holds rows of other samples|reads .* not as many rows for each)"
    taken_otherwise(model, batches, match, relative_error)


class MixedUp(nn.Module):
    """Samples that influence one another, before any layer or behind the last."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        many = len(x) > 2
        if self.how == "before" and many:
            x = x - x.mean(0) / 2
        x = self.layer(x)
        if self.how == "between" and many:
            x = x + 1e-2 * x.flip(0)
        return self.head(x.tanh())


@pytest.mark.parametrize(
    ("how", "match"),
    [("before", "has other logits by itself"), ("between", "holds rows of other|has other logits")],
)
def test_samples_that_mix_in_larger_batches_only(how, match, relative_error):
    taken_otherwise(randomised(MixedUp(how)), [rows()], match, relative_error)


@pytest.mark.parametrize("small", [1.0, 1e-6])
def test_a_wrong_rule_is_noticed_however_small_its_gradients_are(small, monkeypatch):
    """The rule is off by a factor, as if it knew another layer."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + small * self.branch(x).tanh())

    rule = rules._RULES[nn.Linear.forward][0]

    def wrong(module, x, g):
        return rule(module, x, g * 1.1 if module.bias is None else g)

    model, (x, y) = randomised(Scaled(), torch.float32), rows()
    fitted(model, [(x.float(), y)], method="hooks")
    monkeypatch.setitem(rules._RULES, nn.Linear.forward, (wrong, True))
    with pytest.raises(RuntimeError, match=r"gives 'branch\.weight' another gradient"):
        fitted(model, [(x.float(), y)], method="hooks")


def test_gradients_that_are_0_but_for_rounding_are_no_mistake():
    """A key's bias, and all of queries and keys where there is one position."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return self.head(x)

    for length in (1, 6):
        model = randomised(Attention(), torch.float32)
        x, y = sequences(n=5, length=length, width=8, dtype=torch.float32)
        hooks = fitted(model, [(x, y)], method="hooks")
        assert hooks["k.bias"].max() < 1e-9 * hooks["v.bias"].max()


def counting_proofs(monkeypatch):
    made = []
    check = hooks.Taps._check_rows

    def counted(*args, **options):
        made.append(1)
        return check(*args, **options)

    monkeypatch.setattr(hooks.Taps, "_check_rows", counted)
    return made


def test_the_proof_is_made_once_for_equal_passes(monkeypatch):
    made = counting_proofs(monkeypatch)
    model = randomised(Reused())
    batches = [sequences(n=4) for _ in range(6)]
    fitted(model, batches)
    assert len(made) == 1
    fitted(model, [*batches, sequences(n=3), sequences(n=4, length=7)])
    assert len(made) == 1 + 3
    made.clear()
    x, y = rows()
    x[:, 0] = torch.arange(6)
    fitted(randomised(Sorted("argsort")), [(x, y)] * 5)
    assert len(made) == 5  # where values decide, for every batch


@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_with_a_weight_moves_no_rows(autocast, monkeypatch):
    made = counting_proofs(monkeypatch)
    model = randomised(Reused()).float()
    batches = [(x.float(), y) for x, y in (sequences(n=4) for _ in range(3))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fitted(model, batches)
    assert len(made) == 1


def test_the_proof_is_made_until_every_sample_has_reached_every_layer(monkeypatch):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.layer(x).tanh() * x[:, :1].relu())

    made = counting_proofs(monkeypatch)
    model, (x, y) = randomised(Gated()), rows()
    signs = torch.tensor([[-1.0] * 6, [1, 1, 1, -1, -1, -1], [-1, -1, 1, 1, 1, 1], [1] * 6])
    batches = [(torch.cat((s[:, None], x[:, 1:]), 1), y) for s in signs.double()]
    fitted(model, batches)
    assert len(made) == 3


def test_a_function_of_ones_own_may_do_what_no_record_shows(relative_error):
    """Here it reads and writes memory by its address, as a kernel of one's own does."""

    def memory(tensor):
        pointer = ctypes.cast(tensor.untyped_storage().data_ptr(), ctypes.POINTER(ctypes.c_double))
        return numpy.ctypeslib.as_array(pointer, tensor.shape)

    class Order(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, order):
            ctx.order, y = order, torch.empty_like(x)
            memory(y)[:] = memory(x)[order]
            return y

        @staticmethod
        def backward(ctx, g):
            return torch.zeros_like(g).index_copy(0, torch.as_tensor(ctx.order), g), None

    class Owned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            order = memory(x)[:, 0].argsort()
            h = self.layer(Order.apply(self.first(x), order)).tanh()
            return self.head(Order.apply(h, order.argsort()))

    model, (x, y) = randomised(Owned()), rows()
    x[:, 0] = torch.arange(6)
    taken_at_once(model, [(x, y)], relative_error)
    other = x.clone()
    other[:, 0] = torch.tensor([0, 2, 1, 3, 4, 5])
    match = "Linear 'layer' holds rows of other samples"
    taken_otherwise(model, [(x, y), (other, y)], match, relative_error)


def test_a_hook_behind_a_layer_is_no_part_of_it(relative_error):
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    model[0].register_forward_hook(lambda module, args, output: output * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    taken_at_once(model, [rows()], relative_error)


def test_a_forward_of_a_layers_own_is_unknown():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    plain = model[0].forward
    model[0].forward = lambda x: 2 * plain(x)
    with pytest.raises(RuntimeError, match="Linear '0' has no rule"):
        fitted(model, [rows()], method="hooks")


def test_parameters_are_at_their_places_after_an_error():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    before = {m: dict(m._parameters) for m in model}
    linear = functional.linear

    def fails(x, weight, bias):  # after the layer's weight has been detached
        if len(x) == 3:
            raise OSError("broken")
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", fails)
        with pytest.warns(UserWarning, match="OSError: broken"):
            fitted(model, [rows()], chunk_size=3)
    for module, own in before.items():
        assert all(module._parameters[n] is p for n, p in own.items())

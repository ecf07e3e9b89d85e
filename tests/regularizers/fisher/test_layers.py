"""Layers as matrices: rows times weights are outputs; whose rows cannot be told is refused."""

import pytest
import torch
from torch import Tensor, nn

from ars.regularizers import ActivationCovariance, KroneckerFisher
from ars.regularizers.fisher import row_proof
from ars.regularizers.fisher.layers import (
    check_order,
    input_rows,
    matrix_layers,
    output_rows,
    recorded_uses,
)

LAYERS = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear on sequences": (nn.Linear(5, 3), (2, 6, 5)),
    "linear on two position axes": (nn.Linear(5, 3, bias=False), (2, 3, 4, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 3, 7, 8)),
    "conv2d same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 7, 8)),
    "conv2d valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 8)),
    "conv2d circular": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 7, 8)),
    "conv2d reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 8)),
    "conv3d": (nn.Conv3d(2, 4, (2, 1, 3), padding=(1, 0, 1), bias=False), (2, 2, 4, 3, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # it copies
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = output_rows(layer, layer(x).detach())
    actual = input_rows(layer, x) @ layer.weight.detach().flatten(1).T
    if layer.bias is not None:
        actual += layer.bias.detach()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Odd(nn.Module):
    """A tied head, a frozen layer, a frozen bias, a grouped convolution, and no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.partly = nn.Linear(4, 4)
        self.partly.bias.requires_grad_(False)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight


def test_layers_are_found_by_the_first_name_of_their_weight() -> None:
    layers = matrix_layers(Odd())
    assert {name: (list(layer.modules), layer.bias) for name, layer in layers.items()} == {
        "partly.weight": (["partly"], None),
        "first.weight": (["first", "second"], "first.bias"),
        "wte.weight": (["head"], None),
    }


def test_a_shared_weight_without_a_shared_bias_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0' and '1' share the weight '0.weight'"):
        matrix_layers(model)


def test_uses_are_recorded_in_evaluation_mode_and_the_model_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[2].eval()
    x = torch.randn(4, 3)
    with recorded_uses(model, matrix_layers(model)) as uses:
        model(x)
        assert [use.weight for use in uses] == ["0.weight", "2.weight"]
        assert torch.equal(uses[1].inputs, model[0](x).detach())
        assert not uses[1].inputs.requires_grad
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x.T)
    assert model.training
    assert model[1].training
    assert not model[2].training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_place_in_the_graph_is_before_an_operation_in_place() -> None:
    layer = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    nn.init.eye_(layer.weight)
    with recorded_uses(model, matrix_layers(model)) as uses:
        y = model(torch.tensor([[1.0, -1.0]]))
        (gradient,) = torch.autograd.grad(y.sum(), [uses[0].output])
    assert gradient.tolist() == [[1.0, 0.0]]  # the ReLU's, not that of what it left behind


def test_inputs_may_be_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = Named()
    with recorded_uses(model, matrix_layers(model)) as uses:
        model(torch.ones(1, 2))
    assert uses[0].inputs.tolist() == [[1.0, 1.0]]


RUNS_OFF_ORDER = r"layer of '{}\.weight' does not hold the samples one after another"
OTHER_COUNT = r"layer of '{}\.weight' has .* positions for"


class Tagger(nn.Module):
    """A tagger whose layer sees the samples in some order, from a size on."""

    def __init__(self, how, batch=0, length=0):
        super().__init__()
        self.how, self.batch, self.length = how, batch, length
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        batch, length, _ = x.shape
        if batch < self.batch or length < self.length or self.how == "plain":
            return self.head(self.layer(x).tanh())
        if self.how == "shared":  # one row of positions for all samples
            return self.head(self.layer(x[:1]).tanh()).expand(batch, -1, -1) + self.head(x @ x.mT)
        if self.how == "sorted":
            order = x[:, 0, 0].argsort()
            return self.head(self.layer(x[order]).tanh()[order.argsort()])
        if self.how == "unpadded":
            valid = x[..., 0] != 0
            y = x.new_zeros(batch, length, 5)
            y[valid] = self.layer(x[valid]).tanh()
            return self.head(y)
        x = x.transpose(0, 1)  # positions first
        shape = x.shape[:2]
        x = self.layer(x.flatten(0, 1) if self.how == "folded" else x).tanh()
        return self.head(x.view(*shape, 5).transpose(0, 1))


def batch(n=4, length=4, masked=False):
    x, y = torch.randn(n, length, 4, dtype=torch.float64), torch.randint(3, (n, length))
    if masked:
        y[0, 1:], y[1, 2] = -100, -100
    return x, y


def one_by_one(batches):
    return [pair for x, y in batches for pair in zip(x.split(1), y.split(1), strict=True)]


def factors(model, batches, sharing="expand"):
    return KroneckerFisher(model, "exact", sharing=sharing).fit(batches).factors


def refused_or_right(model, batches, match, sharing):
    """Together it is refused, and one by one what a layer in order gives."""
    with pytest.raises(ValueError, match=match):
        factors(model, batches, sharing)
    alone = factors(model, one_by_one(batches), sharing)
    plain = Tagger("plain")
    plain.load_state_dict(model.state_dict())
    if model.how != "unpadded":
        torch.testing.assert_close(alone, factors(plain, batches, sharing))


@pytest.mark.parametrize(("masked", "sharing"), [(True, "expand"), (False, "reduce")])
@pytest.mark.parametrize("how", ["sorted", "unpadded", "positions first", "folded"])
def test_order_is_looked_at_in_all_samples_and_batches(how, masked, sharing):
    """The first sample's place is right in each, and the first batch's everyone's."""
    x, y = batch(masked=masked)
    x[:, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    later = x.clone()
    if how == "sorted":
        later[:, 0, 0] = torch.tensor([0.1, 0.3, 0.2, 0.4])
    if how == "unpadded":
        x[:, 3, 0] = 0.0
        later[:, 3, 0] = 0.0
        later[2, 3, 0], later[3, 2, 0] = 1.0, 0.0  # 3, 3, 4 and 2
    labels, turned = y, how in {"positions first", "folded"}
    model = Tagger(how, length=5 if turned else 0)
    if turned:
        later, labels = batch(length=6, masked=masked)
    factors(model, [(x, y)], sharing)
    batches = [(x, y), (later, labels)]
    refused_or_right(model, batches, RUNS_OFF_ORDER.format("layer"), sharing)
    if masked:
        if how != "sorted":  # which is refused in order too, as it moves its rows
            ActivationCovariance(model).fit([(x, y)])
        with pytest.raises(ValueError, match=RUNS_OFF_ORDER.format("layer")):
            ActivationCovariance(model).fit(batches)


@pytest.mark.parametrize("larger", [{"batch": 3}, {"length": 5}])
def test_rows_that_are_shared_in_later_batches_only(larger):
    """That a batch of two had its own rows says nothing of a larger one."""

    class Table(Tagger):
        def forward(self, x):
            batch, length, _ = x.shape
            shared = batch >= self.batch and length >= self.length
            table = torch.eye(4, dtype=x.dtype)[torch.arange(length) % 4]
            rows = table if shared else table.expand(batch, -1, -1)
            return self.head(self.layer(rows).tanh() * x.sum(-1, keepdim=True))

    model = Table("table", **larger)
    batches = [batch(n=2), batch(n=4, length=6)]
    KroneckerFisher(model).fit(batches[:1])
    ActivationCovariance(model).fit([x for x, _ in batches[:1]])
    with pytest.raises(ValueError, match=OTHER_COUNT.format("layer")):
        KroneckerFisher(model).fit(batches)
    with pytest.raises(ValueError, match=OTHER_COUNT.format("layer")):
        ActivationCovariance(model).fit([x for x, _ in batches])


def test_blank_samples_do_not_hide_the_order():
    """Their rows are equal, whatever their order; what they send backwards is not."""
    model = Tagger("positions first")
    x, y = batch()
    x[:] = x[:1, :1]
    with pytest.raises(ValueError, match=RUNS_OFF_ORDER.format("layer")):
        factors(model, [(x, y)], "reduce")


def test_any_order_will_do_for_a_sum_over_all():
    model, plain = Tagger("sorted"), Tagger("plain")
    plain.load_state_dict(model.state_dict())
    batches = [batch(), batch(n=3, length=5)]
    torch.testing.assert_close(factors(model, batches), factors(plain, batches))
    covariances = [ActivationCovariance(m).fit([x for x, _ in batches]) for m in (model, plain)]
    torch.testing.assert_close(covariances[0].augmented, covariances[1].augmented)


def test_the_order_is_looked_at_once_for_equal_passes(monkeypatch):
    made = []
    proof = row_proof.RowProof.evidence
    monkeypatch.setattr(row_proof.RowProof, "evidence", lambda self: made.append(1) or proof(self))
    factors(Tagger("plain"), [batch(masked=True)] * 4)
    assert len(made) == 1
    x, y = batch(masked=True)
    x[:, 0, 0] = torch.arange(4)
    factors(Tagger("sorted"), [(x, y)] * 4)
    assert len(made) == 1 + 4
    calls = []
    monkeypatch.setattr(
        "ars.regularizers.fisher.covariance.check_order",
        lambda *args: calls.append(1) or check_order(*args),
    )
    blank = torch.zeros_like(x), y
    ActivationCovariance(Tagger("plain")).fit([blank, (x, y), (x, y)])
    assert len(calls) == 2  # of blank samples nothing can be told

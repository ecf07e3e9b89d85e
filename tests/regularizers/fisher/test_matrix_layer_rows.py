"""Kronecker factors and covariances where rows are not the samples' in order, or not each's own."""

import pytest
import torch
from torch import nn

from ars.regularizers import ActivationCovariance, KroneckerFisher
from ars.regularizers.fisher import row_proof
from ars.regularizers.fisher.layers import check_order

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
        x = self.layer(x.transpose(0, 1)).tanh()
        return self.head(x.transpose(0, 1))


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
@pytest.mark.parametrize("how", ["sorted", "unpadded", "positions first"])
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
    model = Tagger(how, length=5 if how == "positions first" else 0)
    if how == "positions first":
        later, _ = batch(length=6)
    labels = y if how != "positions first" else batch(length=6, masked=masked)[1]
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

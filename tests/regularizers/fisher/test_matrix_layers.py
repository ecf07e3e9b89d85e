"""Layers as matrices: rows times the flattened weight give the layer's own output, always."""

import pytest
import torch
from torch import Tensor, nn

from ars.regularizers.fisher.layers import input_rows, matrix_layers, output_rows, recorded_uses

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

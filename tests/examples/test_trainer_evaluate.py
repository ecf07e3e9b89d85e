"""Bits per byte of models whose answer is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.training_loop import bits_per_byte

BYTES = torch.ones(256, dtype=torch.int64)


class _Fixed(nn.Module):
    """Gives byte 7 the probability p at every position and the others the rest."""

    def __init__(self, p: float) -> None:
        super().__init__()
        logits = torch.full((256,), math.log((1 - p) / 255))
        logits[7] = math.log(p)
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.logits.expand(*tokens.shape, 256))


def test_uniform_logits_cost_eight_bits() -> None:
    windows = torch.randint(0, 256, (70, 33))
    assert bits_per_byte(_Fixed(1 / 256), windows, BYTES) == pytest.approx(8.0, abs=1e-6)


def test_the_first_byte_of_a_window_is_context_only() -> None:
    windows = torch.full((40, 5), 7)
    windows[:, 0] = 9
    assert bits_per_byte(_Fixed(0.25), windows, BYTES) == pytest.approx(2.0, abs=1e-5)
    windows[:20, 1] = 9  # 20 of 160 targets
    expected = (140 * 2.0 + 20 * math.log2(255 / 0.75)) / 160
    assert bits_per_byte(_Fixed(0.25), windows, BYTES) == pytest.approx(expected, abs=1e-5)


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    windows = torch.full((3, 5), 7)
    model = _Fixed(0.25).train()
    assert bits_per_byte(model, windows, BYTES) == pytest.approx(2.0, abs=1e-5)
    assert model.training
    assert model.logits.grad is None
    model.eval()
    bits_per_byte(model, windows, BYTES)
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 7, 70, 100])
def test_the_batch_bounds_the_memory_and_changes_nothing(batch_size: int) -> None:
    windows = torch.full((70, 5), 7)
    windows[:20, 1] = 9
    model, sizes = _Fixed(0.25), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    expected = (260 * 2.0 + 20 * math.log2(255 / 0.75)) / 280
    found = bits_per_byte(model, windows, BYTES, batch_size=batch_size)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(sizes) == min(batch_size, 70)
    assert sum(sizes) == 70


def test_it_can_be_stopped_between_batches() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    model = _Fixed(0.25).train()
    with pytest.raises(KeyboardInterrupt):
        bits_per_byte(model, torch.full((3, 5), 7), BYTES, between=stop)
    assert model.training


def test_bits_are_counted_for_the_bytes_that_tokens_stand_for() -> None:
    windows = torch.full((4, 5), 7)
    windows[:, 3] = 9  # one of four targets, of three bytes
    windows[:, 1] = 255  # a separator: neither its nats nor its bytes count
    token_bytes = BYTES.clone()
    token_bytes[9], token_bytes[255] = 3, 0
    expected = (2 * 2.0 + math.log2(255 / 0.75)) / 5
    assert bits_per_byte(_Fixed(0.25), windows, token_bytes) == pytest.approx(expected, abs=1e-5)

"""Which tokens a step sees: shuffled rows, seen once an epoch, whoever asks and whenever."""

import numpy as np
import pytest
import torch
from torch import Tensor

from corpus import Tokens, batch, rows_per_epoch, validation_windows

COUNT, LENGTH = 1003, 16
ROWS = COUNT // LENGTH - 1


@pytest.fixture(params=[COUNT, 100, 7], ids=lambda size: f"shards of {size}")
def tokens(request: pytest.FixtureRequest) -> Tokens:
    """Token i is i, in shards of several sizes: the last are shorter than a row."""
    values = np.arange(COUNT, dtype="<u2")
    return Tokens(np.split(values, range(request.param, COUNT, request.param)))


def inputs_of(tokens: Tokens, step: int, batch_size: int, **options: int) -> Tensor:
    inputs, targets = batch(
        tokens, stream="train 0", step=step, batch_size=batch_size, sequence_len=LENGTH, **options
    )
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (batch_size, LENGTH)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(LENGTH))
    return inputs


def test_every_row_is_seen_once_an_epoch(tokens: Tokens) -> None:
    assert rows_per_epoch(COUNT, LENGTH) == ROWS
    offsets, orders = [], []
    for epoch in range(5):
        first = inputs_of(tokens, epoch, ROWS)[:, 0]
        assert len({start % LENGTH for start in first.tolist()}) == 1
        assert (first.sort().values.diff() == LENGTH).all()
        offsets.append(int(first.min()))
        orders.append(first // LENGTH)
    assert max(offsets) < LENGTH
    assert len(set(offsets)) > 2
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[0].sort().values)


def test_the_order_does_not_depend_on_how_it_is_cut_into_steps(tokens: Tokens) -> None:
    together = inputs_of(tokens, 0, 3 * ROWS)  # over the borders of epochs
    for size in (1, 9, 3 * ROWS // 2):
        steps = 3 * ROWS // size
        parts = [inputs_of(tokens, step, size) for step in range(steps)]
        assert torch.equal(torch.cat(parts), together[: steps * size])


def test_a_step_depends_on_stream_and_step_alone(tokens: Tokens) -> None:
    first = inputs_of(tokens, 11, 8)
    torch.manual_seed(99)
    inputs_of(tokens, 4000, 8)
    with torch.device("meta"):  # as where only the shapes of a model are wanted
        again, _ = batch(tokens, stream="train 0", step=11, batch_size=8, sequence_len=LENGTH)
    assert torch.equal(again, first)
    other, _ = batch(tokens, stream="train 1", step=11, batch_size=8, sequence_len=LENGTH)
    assert not torch.equal(other, first)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_see_together_what_one_would(tokens: Tokens, world_size: int) -> None:
    for step in range(40):
        parts = [
            inputs_of(tokens, step, 5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(parts), inputs_of(tokens, step, 5 * world_size))


@pytest.mark.parametrize("count", [LENGTH + 1, LENGTH + 2, 2 * LENGTH, 2 * LENGTH + 1])
def test_the_shortest_texts_have_one_row_within_bounds(count: int) -> None:
    tokens = Tokens([np.arange(count, dtype=np.uint8)])
    assert rows_per_epoch(count, LENGTH) == 1
    starts = {int(inputs_of(tokens, step, 1)[0, 0]) for step in range(300)}
    assert starts == set(range(min(LENGTH, count - LENGTH)))


def test_too_few_tokens_are_refused() -> None:
    tokens = Tokens([np.arange(LENGTH, dtype=np.uint8)])
    with pytest.raises(ValueError, match="16 tokens hold no row of 16"):
        batch(tokens, stream="s", step=0, batch_size=1, sequence_len=LENGTH)


def test_windows_are_spread_and_share_no_target(tokens: Tokens) -> None:
    every = validation_windows(tokens, 10, 1000)
    assert every.shape == (100, 11)
    assert torch.equal(every[:, 1:].flatten(), torch.arange(1, 1001))
    some = validation_windows(tokens, 10, 4)
    assert some[:, 0].tolist() == [0, 250, 500, 750]
    assert torch.equal(some[:, 1:], some[:, :-1] + 1)
    assert validation_windows(tokens, 2000, 4).shape == (0, 2001)


def test_no_window_reaches_out_of_the_tokens(tokens: Tokens) -> None:
    assert len(tokens) == COUNT
    assert tokens.windows(torch.tensor([COUNT - 3]), 3).tolist() == [[1000, 1001, 1002]]
    for start in (-1, COUNT - 2):
        with pytest.raises(IndexError, match="reaches out of 1003 tokens"):
            tokens.windows(torch.tensor([start]), 3)

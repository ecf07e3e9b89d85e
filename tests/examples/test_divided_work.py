"""What several processes divide: windows of an evaluation, sequences of a Fisher pass."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ars.models import GPT, GPTConfig
from ars.regularizers import DiagonalFisher
from common.errors import RunInterruptedError
from common.program import StopRequest
from corpus.tokens import Tokens
from trainer import training_state
from trainer.parallel import Parallel, is_asked
from trainer.training_loop import bits_per_byte

BYTES = torch.ones(256, dtype=torch.int64)


class Processes(Parallel):
    """One of several processes, whose sums are added up by the test."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
        self.sums: list[torch.Tensor] = []
        self.others_asked = self.divides = False

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.sums.append(value.clone())
        return value

    def any(self, flag: bool) -> bool:
        return flag or self.others_asked


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 16, 17])
def test_each_thing_is_one_processs(count: int, world_size: int) -> None:
    things = list(range(count))
    parts = [things[Processes(rank, world_size).part(count)] for rank in range(world_size)]
    assert [thing for part in parts for thing in part] == things
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_nats_of_the_processes_are_those_of_one(world_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    windows = torch.randint(0, 256, (7, 9))
    token_bytes = BYTES.clone()
    token_bytes[windows[3, 4]] = 0
    alone = bits_per_byte(model, windows, token_bytes, batch_size=4)
    nats, sizes, calls = [], [], []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for rank in range(world_size):
        processes, before = Processes(rank, world_size), len(calls)
        options = {"batch_size": 2, "parallel": processes, "between": lambda: calls.append(1)}
        bits_per_byte(model, windows, token_bytes, **options)
        nats += processes.sums
        assert len(calls) - before == math.ceil(7 / (2 * world_size))  # as often in each
    assert sum(sizes) == 7
    assert max(sizes) == 2
    count = int(token_bytes[windows[:, 1:]].sum())
    assert sum(map(float, nats)) / math.log(2) / count == pytest.approx(alone, rel=1e-12)


def fisher_run(rank: int, world_size: int, stop: StopRequest | None = None) -> Any:
    """What a Fisher pass reads of a run: 19 sequences, 16 in the first batch."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 29, (500,), generator=generator).to(torch.uint8).numpy()
    return SimpleNamespace(
        config=SimpleNamespace(sequence_len=6, fisher_samples=19, seed=0),
        corpus=SimpleNamespace(train=Tokens([tokens])),
        parallel=Processes(rank, world_size),
        stop=stop or StopRequest(),
    )


PLAN: Any = SimpleNamespace(size="2x16", model=GPTConfig(29, 6, n_layer=2, n_head=2, n_embd=16))


def fitted(run: Any) -> DiagonalFisher:
    torch.manual_seed(0)
    model = GPT(GPTConfig(29, 6, n_layer=1, n_head=1, n_embd=8), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3)
    signs = torch.Generator().manual_seed(3)
    return DiagonalFisher(model, generator=signs).fit(
        training_state._fisher_batches(PLAN, run, signs)
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_sequence_has_its_own_signs_however_many_processes_there_are(world_size: int) -> None:
    alone = fitted(fisher_run(0, 1))
    parts = [fitted(fisher_run(rank, world_size)) for rank in range(world_size)]
    assert sum(part.n_samples for part in parts) == alone.n_samples == 19
    for name, expected in alone.importance.items():
        together = sum(part.importance[name] * part.n_samples for part in parts) / 19
        # Sums that cancel round with the largest of their terms.
        rounding = 3e-5 * float(expected.abs().max())
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=rounding)


def test_a_signal_ends_the_batches_and_all_leave_together() -> None:
    run = fisher_run(0, 2)
    batches = training_state._fisher_batches(PLAN, run, torch.Generator())
    assert len(next(batches)[0]) == 8
    run.stop._handle(15, None)
    assert is_asked(run.stop)
    assert list(batches) == []
    with pytest.raises(RunInterruptedError):
        run.parallel.leave_together(run.stop)
    other = fisher_run(1, 2)
    assert len(list(training_state._fisher_batches(PLAN, other, torch.Generator()))) == 2
    other.parallel.leave_together(other.stop)  # nobody has asked yet
    other.parallel.others_asked = True
    with pytest.raises(RunInterruptedError):
        other.parallel.leave_together(other.stop)

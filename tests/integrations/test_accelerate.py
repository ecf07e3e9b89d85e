"""`ARSAdamW` in a loop of Accelerate."""

import accelerate
import pytest
import torch
from plain_loop import LR, batches, build, loss_of, plain

from ars import ARSAdamW
from ars.regularizers import EWC, DiagonalFisher


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepare(micro_batches):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model = build()
    optimizer = ARSAdamW(model.parameters(), lr=LR)
    return accelerator, optimizer, *accelerator.prepare(model, optimizer, batches())


def train(accelerator, optimizer, model, prepared, loader, epochs=1):
    surprises = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                optimizer.watch(loss)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
            if accelerator.sync_gradients:
                surprises.append(float(optimizer.diagnostics["surprise"]))
    return surprises


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_equals_the_plain_loop(micro_batches):
    parts = prepare(micro_batches)
    surprises = train(*parts, epochs=2)
    # Accelerate divides the last, shorter accumulation by the full number of micro-batches.
    weights, watched = plain(micro_batches, epochs=2, last_divides_by=micro_batches)
    assert surprises == watched
    assert all(torch.equal(value, weights[name]) for name, value in parts[2].state_dict().items())


def test_a_saved_state_goes_on_bit_by_bit(tmp_path):
    parts = prepare(2)
    train(*parts)
    parts[0].save_state(str(tmp_path))
    ahead = train(*parts)
    parts[0].load_state(str(tmp_path))
    assert train(*parts) == ahead


def test_a_penalty_is_set_on_one_s_own_optimizer():
    accelerator, optimizer, model, prepared, loader = prepare(1)
    fisher = DiagonalFisher(model).fit(list(loader))
    optimizer.penalty = EWC(model, fisher, strength=100.0)
    train(accelerator, optimizer, model, prepared, loader)
    assert float(optimizer.diagnostics["penalty"]) > 0

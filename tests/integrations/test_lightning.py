"""`ARSAdamW` in Lightning: automatic, manual, and Fabric."""

import lightning
import pytest
import torch
from plain_loop import LR, batches, build, loss_of, plain

from ars import ARSAdamW, ARSOptimizer
from ars.regularizers import EWC, DiagonalFisher

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec")


class Module(lightning.LightningModule):
    def __init__(self, automatic=True):
        super().__init__()
        self.net, self.automatic_optimization = build(), automatic
        self.surprises, self.steps = [], 0

    def configure_optimizers(self):
        self.opt = ARSAdamW(self.parameters(), lr=LR)
        return self.opt

    def training_step(self, batch, _):
        loss = loss_of(self.net, batch)
        self.opt.watch(loss)
        if not self.automatic_optimization:
            prepared = self.optimizers()
            prepared.zero_grad()
            self.manual_backward(loss)
            prepared.step()
        return loss

    def on_train_batch_end(self, *_):
        if self.global_step > self.steps:
            self.steps = self.global_step
            self.surprises.append(float(self.opt.diagnostics["surprise"]))


def trainer(folder, epochs, micro_batches=1, **more):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=micro_batches,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


@pytest.mark.parametrize(("automatic", "micro_batches"), [(True, 1), (True, 2), (False, 1)])
def test_equals_the_plain_loop(tmp_path, automatic, micro_batches):
    module = Module(automatic)
    run = trainer(tmp_path, 2, micro_batches, enable_checkpointing=False)
    run.fit(module, batches())
    # Lightning divides the last, shorter accumulation by the full number of micro-batches.
    weights, watched = plain(micro_batches, epochs=2, last_divides_by=micro_batches)
    assert module.surprises == watched
    assert all(torch.equal(value, weights[name]) for name, value in module.net.state_dict().items())


def test_a_checkpoint_goes_on_bit_by_bit(tmp_path):
    whole = Module()
    trainer(tmp_path, 2, enable_checkpointing=False).fit(whole, batches())
    run = trainer(tmp_path, 1, enable_checkpointing=False)
    run.fit(Module(), batches())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    run = trainer(tmp_path, 2, enable_checkpointing=False)
    run.fit(second, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert second.surprises == whole.surprises[-len(second.surprises) :]
    assert len(second.surprises) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def train_by_fabric(fabric, model, optimizer):
    """Train for an epoch; return the loss and the surprise of each step."""
    losses, surprises = [], []
    for batch in batches():
        loss = loss_of(model, batch)
        optimizer.watch(loss)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        surprises.append(float(optimizer.diagnostics["surprise"]))
    return losses, surprises


def test_what_fabric_hands_out_is_the_optimizer_itself():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = build()
    optimizer = ARSAdamW(model.parameters(), lr=LR)
    wrapped_model, wrapped = fabric.setup(model, optimizer)
    _, surprises = train_by_fabric(fabric, wrapped_model, wrapped)
    weights, watched = plain(1)
    assert surprises == watched
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    saved = wrapped.state_dict()
    wrapped.load_state_dict(saved)  # makes caches anew
    _, further = train_by_fabric(fabric, wrapped_model, wrapped)
    assert surprises + further == plain(1, epochs=2)[1]

    penalty = EWC(model, DiagonalFisher(model).fit(list(batches())), strength=100.0)
    wrapped.penalty = penalty
    assert optimizer.penalty is penalty
    assert wrapped.penalty is penalty
    train_by_fabric(fabric, wrapped_model, wrapped)
    assert float(optimizer.diagnostics["penalty"]) > 0
    wrapped.reset_controller()
    assert int(optimizer.controller.state_dict()["counts"][0]) == 0


def test_fabric_takes_the_wrapper_of_any_optimizer():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = build()
    optimizer = ARSOptimizer(torch.optim.SGD(model.parameters(), lr=LR))
    losses, surprises = train_by_fabric(fabric, *fabric.setup(model, optimizer))
    assert losses == surprises
    assert float(optimizer.diagnostics["surprise"]) == surprises[-1]

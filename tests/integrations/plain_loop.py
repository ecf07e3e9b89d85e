"""What each tool is compared with: data, a model, and the loop that a user would write."""

import torch
from torch import nn
from torch.nn import functional

from ars import ARSAdamW

LR = 0.05


def batches():
    """Five batches of four: with two micro-batches a step the last step has one."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 4, generator=generator)
    targets = torch.randint(0, 3, (20,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), 4)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def plain(micro_batches, epochs=1, optimizer_of=ARSAdamW, last_divides_by=None):
    """Train; return the weights and the surprise of each step.

    ``last_divides_by``: what the losses of an epoch's last, shorter step are divided by; by default
    their number.
    """
    model = build()
    optimizer = optimizer_of(model.parameters(), lr=LR)
    surprises = []
    data = list(batches())
    for _ in range(epochs):
        for first in range(0, len(data), micro_batches):
            part = data[first : first + micro_batches]
            losses = [loss_of(model, batch) for batch in part]
            full = len(part) == micro_batches
            divisor = len(part) if full or last_divides_by is None else last_divides_by
            for loss in losses:
                (loss / divisor).backward()
            watched = (
                losses[0].detach()
                if len(losses) == 1
                else sum(x.double() for x in losses) / len(losses)
            )
            optimizer.step(loss=watched)
            optimizer.zero_grad()
            surprises.append(float(optimizer.diagnostics["surprise"]))
    return dict(model.state_dict()), surprises

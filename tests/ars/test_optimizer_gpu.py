"""The whole optimizer on a GPU: graphs, schedulers, scaling, and that nothing waits."""

import copy

import pytest
import torch

from ars import ARSAdamW, GradientRelease
from ars.regularizers import EWC
from waiting import waiting_refused

pytestmark = pytest.mark.gpu


def model_and_data(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 257), torch.nn.GELU(), torch.nn.Linear(257, 10), torch.nn.LayerNorm(10)
    ).to("cuda", dtype)
    inputs = torch.randn(32, 64, device="cuda", dtype=dtype)
    return model, inputs, torch.randint(10, (32,), device="cuda")


def loss_of(model, inputs, targets):
    return torch.nn.functional.cross_entropy(model(inputs).float(), targets)


def penalty_of(model):
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return EWC(model, importance, strength=0.5)


def train(optimizer, model, inputs, targets, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, ARSAdamW) else optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_ars_it_is_torch(amsgrad):
    ours, inputs, targets = model_and_data()
    theirs = copy.deepcopy(ours)
    settings = {"lr": 1e-2, "amsgrad": amsgrad}
    optimizer = ARSAdamW(ours.parameters(), ars=None, **settings)
    assert optimizer._implementation == "triton"
    train(optimizer, ours, inputs, targets, 50)
    train(
        torch.optim.AdamW(theirs.parameters(), fused=True, **settings), theirs, inputs, targets, 50
    )
    assert_close(ours, theirs)


def test_the_kernels_take_the_loops_steps():
    """Everything at once: penalty, clipping, controller, scheduler that cycles the betas."""
    models = []
    for flags in ({}, {"foreach": False}):
        model, inputs, targets = model_and_data()
        optimizer = ARSAdamW(
            model.parameters(), lr=1e-2, penalty=penalty_of(model), max_grad_norm=0.5, **flags
        )
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=40)
        train(optimizer, model, inputs, targets, 30, cycle)
        models.append((model, float(optimizer.diagnostics["penalty"])))
    assert_close(models[0][0], models[1][0])
    assert models[0][1] == pytest.approx(models[1][1], rel=1e-4)


def test_10000_steps_never_wait():
    """Each with another learning rate, other betas and another loss."""
    model, inputs, targets = model_and_data()
    optimizer = ARSAdamW(model.parameters(), penalty=penalty_of(model), max_grad_norm=1.0)
    train(optimizer, model, inputs, targets, 3)
    loss = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    with waiting_refused():
        for step in range(10_000):
            group = optimizer.param_groups[0]
            group["lr"], group["betas"] = 1e-3 / (1 + step), (0.9 - 1e-5 * step, 0.999)
            optimizer.step(loss=loss)


def test_a_graph_sees_a_schedule():
    """Floats after write_hyperparameters(), device tensors at once."""
    models = []
    for graphed in (False, True):
        model, inputs, targets = model_and_data()
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = ARSAdamW(
            model.parameters(), lr=lr, capturable=True, penalty=penalty_of(model), max_grad_norm=1.0
        )
        train(optimizer, model, inputs, targets, 3)
        if graphed:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = loss_of(model, inputs, targets)
                loss.backward()
                optimizer.step(loss=loss)
        for step in range(20):
            lr.fill_(1e-2 / (1 + step))
            optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)
            optimizer.param_groups[0]["weight_decay"] = 0.01 * step
            if graphed:
                optimizer.write_hyperparameters()
                graph.replay()
            else:
                train(optimizer, model, inputs, targets, 1)
        models.append(model)
    assert_close(*models)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaler(dtype):
    """As with torch's AdamW, which the scaler hands its scale and found_inf as well."""
    models = []
    for make in (
        lambda p: ARSAdamW(p, lr=1e-2, ars=None),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    ):
        model, inputs, targets = model_and_data()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**18, growth_interval=5)
        for step in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = loss_of(model, inputs, targets)
            scaler.scale(loss).backward()
            if step == 7:
                next(model.parameters()).grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
    assert_close(*models, tolerance=3e-5)


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"master_weights": True}])
def test_bfloat16_modes_resume_bitwise(options):
    model, inputs, targets = model_and_data(torch.bfloat16)
    optimizer = ARSAdamW(model.parameters(), lr=1e-2, **options)
    train(optimizer, model, inputs, targets, 10)
    resumed = copy.deepcopy(model)
    other = ARSAdamW(resumed.parameters(), lr=1e-2, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, mine in ((optimizer, model), (other, resumed)):
        train(each, mine, inputs, targets, 10)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_released_gradients_take_the_same_step_in_less_memory():
    peaks, models = [], []
    for released in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(1024, 1024) for _ in range(8)]
        model = torch.nn.Sequential(*layers).cuda()
        optimizer = ARSAdamW(model.parameters(), lr=1e-3)
        inputs = torch.randn(4, 1024, device="cuda")
        release = GradientRelease(optimizer) if released else None
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            loss = model(inputs).square().mean()
            if release is None:
                loss.backward()
                optimizer.step(loss=loss)
                optimizer.zero_grad()
            else:
                release.backward(loss)
        peaks.append(torch.cuda.max_memory_allocated())
        models.append(model.state_dict())
        del model, optimizer, release, loss
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-6, atol=1e-6)
    assert peaks[1] < peaks[0] - 4 * 4 * 1024 * 1024

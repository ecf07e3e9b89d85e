"""Several processes: whatever they watch, all gate by one number, to the bit."""

import copy
import math
import pickle

import pytest
import torch
import torch.multiprocessing
from optimizers import make
from torch import distributed

from ars import ARSAdam, ARSAdamW, ARSConfig, ARSOptimizer, GradientRelease

SETTINGS = {"window": 12, "threshold": 6.0, "first_release": 3, "release": 9}
STEPS = 18
RANKS = 2


def surprise(step, rank):
    """A loss with noise of the rank's own, and one bad batch on the last rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return 3.0 + 0.1 * torch.rand((), generator=generator) + 2.0 * (step == 14 and rank == 1)


def build(name, weight, watched, **settings):
    config = ARSConfig(surprise=watched, **SETTINGS)
    if name == "sgd":
        return ARSOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.9), config, **settings)
    if name == "adam":
        return ARSAdam([weight], lr=0.1, ars=config, **settings)
    return make(name.removesuffix(" released"), [weight], lr=0.1, ars=config, **settings)


def run(name, rank, *, watched="loss", values=surprise, **settings):
    """Train on gradients that are the same on all ranks; return weights and gates of all steps."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8))
    now = [None]
    kind = (
        (lambda: now[0]) if watched == "callable" else "loss" if watched == "closure" else watched
    )
    optimizer = build(name, weight, kind, **settings)
    release = GradientRelease(optimizer) if "released" in name else None
    trace = []
    for step in range(STEPS):
        value = now[0] = values(step, rank)
        gradient = torch.randn(8, generator=torch.Generator().manual_seed(step))
        if release is not None:
            arguments = {"surprise": value} if watched == "entropy" else {}
            loss = (weight * gradient).sum()
            if watched == "loss":
                loss = loss - loss.detach() + value
            release.backward(loss, **arguments)
        else:
            weight.grad = gradient
            if watched == "closure":
                optimizer.step(lambda value=value: value)
            else:
                name_of = {"loss": "loss", "entropy": "surprise"}
                optimizer.step(**{name_of[watched]: value} if watched in name_of else {})
        signals = [float(optimizer.diagnostics[key]) for key in ("surprise", "psi", "phi", "chi")]
        trace.append((weight.detach().clone(), signals))
    return trace


CASES = {
    f"{name}, {watched}": (name, watched)
    for name, several in {
        "fused": ("loss", "entropy", "callable", "closure"),
        "sgd": ("loss", "entropy", "callable", "closure"),
        "fused released": ("loss", "entropy", "callable"),
        "loop": ("loss",),
        "triton": ("loss",),
        "adam": ("loss",),
    }.items()
    for watched in several
}


def broken(bad):
    return lambda step, rank: torch.tensor(bad) if (step, rank) == (14, 1) else surprise(step, 0)


def watch_messages(action):
    """Return the collective operations that an action performs."""
    found, real = [], distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        found.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    try:
        action()
    finally:
        distributed.all_reduce = real
    return found


def without_controller(rank):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ARSAdamW([weight], ars=None)
    weight.grad = torch.ones(2)
    optimizer.step(loss=surprise(0, rank))
    weight.grad = None
    with GradientRelease(optimizer) as release:
        release.backward(weight.sum() * (rank + 1))


def in_parallel(rank, wrapped):
    """Train under DDP on data of the rank's own, of which one batch is bad, as in practice."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    config = ARSConfig(**SETTINGS)
    optimizer = ARSAdamW(model.parameters(), lr=0.01, ars=config)
    if wrapped:
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = ARSOptimizer(base, config)
    phis = []
    for step in range(30):
        generator = torch.Generator().manual_seed(2 * step + rank)
        inputs = torch.randn(16, 4, generator=generator)
        targets = inputs.sum(1, keepdim=True) + 30.0 * (step >= 24 and rank == 1)
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step(**{"loss": loss} if wrapped != "norm" else {})
        phis.append(float(optimizer.diagnostics["phi"]))
    return [p.detach() for p in model.parameters()], phis


def compiled(rank):
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = ARSAdamW([weight], lr=0.1, ars=ARSConfig(**SETTINGS))
    step = torch.compile(lambda loss: optimizer.step(loss=loss), backend="aot_eager")
    for index in range(3):
        weight.grad = torch.ones(8)
        step(surprise(index, rank))
    return float(optimizer.diagnostics["surprise"])


def a_skipped_batch(rank):
    """One rank's closure has no loss once: the others do not wait for it for ever."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ARSAdamW([weight], lr=0.1)
    for step in range(3):
        weight.grad = torch.ones(2)
        optimizer.step(lambda step=step: None if (step, rank) == (1, 1) else float(step + 1 + rank))
    return optimizer.controller.window[:3].tolist()


def refusals():
    """A copy keeps the group, and a pickle says that it cannot."""
    weight = torch.nn.Parameter(torch.ones(2))
    messages = []
    for optimizer in (
        ARSAdamW([weight], process_group=distributed.group.WORLD),
        ARSOptimizer(torch.optim.SGD([weight], lr=0.1), process_group=distributed.group.WORLD),
    ):
        assert copy.deepcopy(optimizer).process_group is distributed.group.WORLD
        again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(optimizer))))
        again.param_groups[0]["params"][0].grad = torch.ones(2)
        again.step()  # on the norm nothing is exchanged
        again = pickle.loads(pickle.dumps(optimizer))
        again.param_groups[0]["params"][0].grad = torch.ones(2)
        try:
            again.step(loss=1.0)
        except RuntimeError as error:
            messages.append(str(error))
        again.process_group = False
        again.step(loss=1.0)
    return messages


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    alone = [distributed.new_group([index]) for index in range(RANKS)][rank]
    results = {key: run(name, rank, watched=watched) for key, (name, watched) in CASES.items()}
    for key, choice in (("off", False), ("alone", alone), ("both", distributed.group.WORLD)):
        results[key] = run("fused", rank, process_group=choice)
    for bad in (math.nan, math.inf):
        results[str(bad)] = run("fused", rank, values=broken(bad))
    results["messages"] = [
        watch_messages(lambda: without_controller(rank)),
        watch_messages(lambda: run("fused", rank, process_group=alone)),
        watch_messages(lambda: run("fused", rank, watched="grad_norm")),
        watch_messages(lambda: run("fused", rank)),
    ]
    results["parallel"] = [in_parallel(rank, wrapped) for wrapped in (False, True, "norm")]
    results["compiled"] = compiled(rank)
    results["skipped"] = a_skipped_batch(rank)
    results["refusals"] = refusals()
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def assert_same(*traces):
    for (weights, signals), (others, theirs) in zip(*traces, strict=True):
        assert torch.equal(weights, others)
        assert signals == theirs


def gates(trace):
    return [signals[2] for _, signals in trace]


@pytest.mark.parametrize("case", CASES)
def test_ranks_gate_by_the_mean_of_what_they_watch(results, case):
    first, second = (result[case] for result in results)
    assert_same(first, second)
    name, watched = CASES[case]
    expected = run(name, 0, watched=watched, values=lambda step, _: (
        surprise(step, 0).double() + surprise(step, 1).double()) / 2)  # fmt: skip
    assert_same(first, expected)
    assert min(gates(first)) < 0.3


def test_a_process_may_gate_by_its_own_number(results):
    for rank, result in enumerate(results):
        local = run("fused", rank)
        for key in ("off", "alone"):
            assert_same(result[key], local)
        assert_same(result["both"], result["fused, loss"])
    assert min(gates(results[0]["off"])) == 1.0
    assert min(gates(results[1]["off"])) < 0.3


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_number_that_is_not_finite_on_one_rank_brakes_all(results, bad):
    first, second = (result[bad] for result in results)
    for (weights, signals), (others, theirs) in zip(first, second, strict=True):
        assert torch.equal(weights, others)
        assert str(signals) == str(theirs)  # NaN is not itself
    assert gates(first)[14] == 0.1
    assert min(gates(first)[:14]) == 1.0


def test_where_there_is_nothing_to_agree_on_there_is_no_message(results):
    for result in results:
        assert result["messages"] == [[], [], [], [1] * STEPS]


def test_under_ddp_a_bad_shard_brakes_all_ranks_alike(results):
    for (weights, phis), (others, theirs) in zip(*(r["parallel"] for r in results), strict=True):
        assert all(map(torch.equal, weights, others))
        assert phis == theirs
        assert min(phis) < 0.5


def test_inside_a_compiled_function(results):
    expected = float(surprise(2, 0).double() + surprise(2, 1).double()) / 2
    assert [result["compiled"] for result in results] == [expected] * RANKS


def test_a_rank_without_a_loss_repeats_the_last_one(results):
    # 1 and 2; 2 and the last mean; 3 and 4
    assert [result["skipped"] for result in results] == [[1.5, 1.75, 3.5]] * RANKS


def test_copies_and_pickles(results):
    for result in results:
        assert len(result["refusals"]) == 2
        assert all("set optimizer.process_group" in message for message in result["refusals"])


@pytest.mark.parametrize("wrong", [True, 0, "gloo", [0, 1], -100])
def test_what_is_no_group_is_refused(wrong):
    weight = torch.nn.Parameter(torch.ones(2))
    for make_one in (
        lambda: ARSAdamW([weight], process_group=wrong),
        lambda: ARSAdam([weight], process_group=wrong),
        lambda: ARSOptimizer(torch.optim.SGD([weight], lr=0.1), process_group=wrong),
        lambda: setattr(ARSAdamW([weight]), "process_group", wrong),
    ):
        with pytest.raises(TypeError, match=r"process_group must be a ProcessGroup .* or False"):
            make_one()

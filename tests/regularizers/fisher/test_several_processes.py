"""Several processes: one estimate of the samples of all, whatever each has of them."""

import copy
import warnings

import pytest
import torch
import torch.multiprocessing
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    ActivationCovariance,
    DiagonalFisher,
    KroneckerFisher,
    KroneckerPenalty,
)
from ars.regularizers.fisher.processes import Processes

# Samples of each rank: of 2 processes, and of 3, of which one has none.
SHARES = {2: (5, 2), 3: (4, 0, 3)}
ESTIMATES = {
    "exact": lambda model, **more: DiagonalFisher(model, "exact", **more),
    "empirical token": lambda model, **more: DiagonalFisher(
        model, "empirical", unit="token", method="loop", **more
    ),
    "vmap": lambda model, **more: DiagonalFisher(model, "empirical", method="vmap", **more),
    "factors": lambda model, **more: KroneckerFisher(model, "exact", **more),
    "reduced factors": lambda model, **more: KroneckerFisher(
        model, "empirical", sharing="reduce", **more
    ),
    "activations": ActivationCovariance,
}


class Tied(nn.Module):
    """An embedding that is the head as well, a buffer, and rows that no shard divides evenly."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.body = nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5))
        self.head = nn.Linear(5, 7)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens):
        return self.head(self.body(self.table(tokens)) * self.scale)


def build():
    torch.manual_seed(0)
    return Tied()


def sharded(**policy):
    model = build()
    fully_shard(model.body[0], **policy)
    fully_shard(model.body, **policy)
    fully_shard(model, **policy)
    return model


def samples(first, count):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (20, 4), generator=generator)
    targets = torch.randint(7, (20, 4), generator=generator)
    targets[torch.rand(20, 4, generator=generator) < 0.2] = -100
    end = first + count
    return [
        (tokens[at : min(at + 2, end)], targets[at : min(at + 2, end)])
        for at in range(first, end, 2)
    ]


def own_samples(rank, world):
    shares = SHARES[world]
    return samples(sum(shares[:rank]), shares[rank])


def found(estimate):
    """What an estimate consists of, as one process has it."""
    if isinstance(estimate, DiagonalFisher):
        parts = estimate.importance
    elif isinstance(estimate, KroneckerFisher):
        parts = {
            f"{n} {k}": t for n, f in estimate.factors.items() for k, t in zip("AG", f, strict=True)
        }
    else:
        parts = estimate.augmented
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in parts.items()}
    return {"samples": torch.tensor(estimate.n_samples), **whole}


def fitted(name, model, batches, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* covers linear", UserWarning)
        return ESTIMATES[name](model, **more).fit(batches)


def raised(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def train(model, penalty, rank):
    """Ten steps on averaged gradients of data of the rank's own, as DDP makes them."""
    optimizer = ARSAdamW(model.parameters(), lr=0.05, penalty=penalty)
    generator = torch.Generator().manual_seed(50 + rank)
    for _ in range(10):
        tokens = torch.randint(7, (4, 4), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()
        optimizer.step(loss=loss)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def under_ddp(rank, world):
    """The wrapper exchanges buffers in its forward: a fit must not, as passes differ in number."""
    ddp = nn.parallel.DistributedDataParallel(build())
    before = [ddp.training, ddp.require_forward_param_sync]
    result = found(fitted("exact", ddp, own_samples(rank, world)))
    assert "forward" not in vars(ddp)
    assert [ddp.training, ddp.require_forward_param_sync] == before
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    ddp(tokens).sum().backward()  # and it goes on
    return {name.removeprefix("module."): value for name, value in result.items()}


def refused(rank, world):
    """Every rank learns of an error of one, and none waits for ever."""
    model, mine = build(), own_samples(rank, world)
    wrong = [(mine[0][0], mine[0][1] + 70)] if rank == 0 else mine
    other = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7 + (rank == 0)))
    return {
        "a target": raised(lambda: fitted("exact", model, wrong)),
        "factors": raised(lambda: fitted("factors", model, wrong)),
        "too few": raised(lambda: DiagonalFisher(model).fit(mine, 3)),
        "nobody": raised(lambda: DiagonalFisher(model).fit([])),
        "no activations": raised(lambda: ActivationCovariance(model).fit([])),
        "models": raised(lambda: DiagonalFisher(other).fit(mine)),
        "layers": raised(lambda: fitted("factors", other, mine)),
    }


def under_fsdp(rank, world):
    results, mine = {}, own_samples(rank, world)
    for name in ESTIMATES:
        model = sharded()
        if name == "vmap":
            model(mine[0][0] if mine else torch.zeros(2, 4, dtype=torch.int64))
        hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        estimate = fitted(name, model, mine)
        if isinstance(estimate, DiagonalFisher):
            state, again = estimate.state_dict(), DiagonalFisher(model)
            again.load_state_dict(state)
        for module, before in zip(model.modules(), hooks, strict=True):
            assert (module._forward_pre_hooks, module._forward_hooks) == before
        for key, p in model.named_parameters():
            assert hasattr(p, "full_tensor")
            if isinstance(estimate, DiagonalFisher):
                assert not hasattr(state["importance"][key], "full_tensor")
                assert torch.equal(
                    again.importance[key].to_local(), estimate.importance[key].to_local()
                )
                importance = again.importance[key]
                assert importance.placements == p.placements
                assert importance.to_local().shape == p.to_local().shape
        results[name] = found(estimate)
        # It trains on as before.
        model(torch.zeros(1, 4, dtype=torch.int64)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    half = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    results["bf16"] = found(fitted("exact", half, mine))
    optimizer = ARSAdamW(model.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))  # leaves the root unsharded
    results["adam"] = found(DiagonalFisher.from_optimizer(model, optimizer))
    whole = build()
    whole(torch.zeros(1, 4, dtype=torch.int64)).square().mean().backward()
    single = ARSAdamW(whole.parameters(), lr=0.1)
    single.step()
    results["adam of one"] = found(DiagonalFisher.from_optimizer(whole, single))
    with torch.no_grad():
        next(model.parameters()).to_local().fill_(float("nan" if rank == world - 1 else 1))
    results["nan"] = raised(lambda: fitted("exact", model, mine))
    return results


def trained_under_fsdp(rank, world):
    """A penalty of a fit of a sharded model pulls as one of a fit of the whole."""
    results, mine, everything = {}, own_samples(rank, world), samples(0, sum(SHARES[world]))
    tokens = torch.arange(12).view(3, 4) % 7  # the same in every process
    for name, penalty in (("exact", EWC), ("factors", KroneckerPenalty)):
        found = []
        for model, given, group in ((sharded(), mine, None), (build(), everything, False)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                fisher = ESTIMATES[name](model, process_group=group).fit(given)
                pull = penalty(model, fisher, strength=50.0)
            optimizer = ARSAdamW(model.parameters(), lr=0.01, penalty=pull, process_group=group)
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
                loss.backward()
                optimizer.step(loss=loss)
            named = model.named_parameters()
            found.append({n: getattr(p, "full_tensor", p.detach)() for n, p in named})
        results[name] = found
    return results


def refused_under_fsdp(rank, world):
    model, alone = sharded(), [distributed.new_group([r]) for r in range(world)][rank]
    flat = build()
    flat.body.__class__ = type("FullyShardedDataParallel", (nn.Sequential,), {})
    return {
        "False": raised(lambda: DiagonalFisher(model, process_group=False).fit([])),
        "alone": raised(lambda: KroneckerFisher(model, process_group=alone).fit([])),
        "uint8": raised(lambda: DiagonalFisher(model, dtype=torch.uint8).fit([])),
        "flat": raised(lambda: DiagonalFisher(flat).fit([])),
    }


def under_tensor_parallel(rank, world):
    model = build()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    whole = copy.deepcopy(model)
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    model.body[1] = nn.Identity()  # a norm would need the whole row
    whole.body[1] = nn.Identity()
    parallelize_module(model.body, init_device_mesh("cpu", (world,)), plan)
    everything = samples(0, sum(SHARES[world]))
    alone = found(fitted("exact", whole, everything, process_group=False))
    return found(fitted("exact", model, everything)), alone


def work(rank, folder, world):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    mine = own_samples(rank, world)
    results = {name: found(fitted(name, build(), mine)) for name in ESTIMATES}
    results["local"] = found(fitted("exact", build(), mine, process_group=False)) if mine else None
    same = samples(0, 2)
    for key, group in (("signs", False), ("signs of all", None)):
        results[key] = found(DiagonalFisher(build(), process_group=group).fit(same))
        seeded = torch.Generator().manual_seed(0)
        fisher = DiagonalFisher(build(), generator=seeded, process_group=group).fit(same)
        results[f"given {key}"] = found(fisher)
    torch.manual_seed(0)
    own = Processes(None).generator(torch.device("cpu"))
    results["numbers"] = torch.rand(4, generator=own)
    results["ddp"] = under_ddp(rank, world)
    model = build()
    results["trained"] = train(model, EWC(model, fitted("exact", model, mine), 50.0), rank)
    results["refused"] = refused(rank, world)
    results["fsdp"] = under_fsdp(rank, world)
    results["trained under fsdp"] = trained_under_fsdp(rank, world)
    results["refused under fsdp"] = refused_under_fsdp(rank, world)
    results["tensor"] = under_tensor_parallel(rank, world)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def hooks_first():
    """Here the prediction is in force, as it is in the processes."""


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / str(rank)) for rank in range(request.param)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        # Sums that cancel round with the largest of their terms, and differently on every CPU.
        rounding = 1e-5 * float(torch.as_tensor(second[name]).abs().max())
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=rounding, msg=name)


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
@pytest.mark.parametrize("name", ESTIMATES)
def test_the_estimate_is_of_all_samples_and_the_same_bits_everywhere(results, name, kind):
    alone = found(fitted(name, build(), samples(0, sum(SHARES[len(results)]))))
    for result in results:
        mine = result[name] if kind == "plain" else result["fsdp"][name]
        assert_close(mine, alone)
        assert_equal(mine, results[0][name] if kind == "plain" else results[0]["fsdp"][name])


def test_a_process_may_keep_its_own(results):
    for rank, result in enumerate(results):
        mine = own_samples(rank, len(results))
        if mine:
            assert_equal(result["local"], found(fitted("exact", build(), mine)))
            assert not torch.equal(
                result["local"]["body.0.weight"], result["exact"]["body.0.weight"]
            )


def test_replicas_that_are_seeded_alike_draw_their_own_signs(results):
    world = len(results)
    numbers = [tuple(result["numbers"].tolist()) for result in results]
    assert len(set(numbers)) == world
    for result in results:
        assert_equal(result["signs of all"], results[0]["signs of all"])
        for kind in ("", "given "):
            both, alone = dict(result[f"{kind}signs of all"]), dict(result[f"{kind}signs"])
            assert both.pop("samples") == world * alone.pop("samples") == 2 * world
            # With the same signs the mean is that of one, and a generator is taken as it is.
            if kind:
                assert_close(both, alone)
            else:
                assert not any(torch.allclose(both[n], alone[n], rtol=1e-3) for n in both)


def test_a_wrapper_of_ddp_is_measured_by_itself(results):
    for result in results:
        assert_equal(result["ddp"], result["exact"])


def test_replicas_do_not_part(results):
    for result in results:
        assert torch.equal(result["trained"], results[0]["trained"])
    assert (results[0]["trained"] - torch.cat([p.flatten() for p in build().parameters()])).any()


def test_an_error_of_one_process_reaches_all(results):
    first, *others = (result["refused"] for result in results)
    for key in ("a target", "factors"):
        assert first[key].startswith("ValueError: targets of batch 0 contain ")
        for other in others:
            assert other[key].startswith("RuntimeError: rank 0 could not fit its samples, so none")
            assert other[key].endswith(first[key])
    assert others[0]["too few"].startswith("ValueError: ")
    assert first["too few"].startswith("RuntimeError: rank 1 could not fit its samples")
    for refusal in (first, *others):
        for key in ("nobody", "no activations"):
            assert refusal[key].startswith("ValueError: batches is empty in every process")
        for key in ("models", "layers"):
            assert refusal[key].startswith("ValueError: rank 0 does not have the '1.weight'")
            assert "give all of process_group the same model" in refusal[key]


def test_under_fsdp_the_parameters_own_dtype_counts_and_adams_moment_is_sharded(results):
    for result in results:
        assert_equal(result["fsdp"]["bf16"], result["fsdp"]["exact"])
        assert_close(result["fsdp"]["adam"], result["fsdp"]["adam of one"])
        assert "is not finite" in result["fsdp"]["nan"]


@pytest.mark.parametrize("name", ["exact", "factors"])
def test_a_penalty_of_a_sharded_fit_pulls_like_one_of_the_whole(results, name):
    for result in results:
        mine, alone = result["trained under fsdp"][name]
        for key, value in alone.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=2e-6, msg=key)


def test_what_a_sharded_model_cannot_have_is_refused(results):
    for result in results:
        refusal = result["refused under fsdp"]
        assert (
            f"sharded over {len(results)} processes, and with process_group=False"
            in refusal["False"]
        )
        assert "process_group lacks (rank " in refusal["alone"]
        assert "take torch.bfloat16, and let EWC(storage='compact')" in refusal["uint8"]
        assert "'body' is a FullyShardedDataParallel" in refusal["flat"]
        assert all(text.startswith(("ValueError", "TypeError")) for text in refusal.values())


def test_tensor_parallel_layers_are_measured_whole(results):
    for result in results:
        mine, alone = result["tensor"]
        assert mine.pop("samples") == len(results) * alone.pop("samples")  # each has seen all
        assert_close(mine, alone)


@pytest.mark.parametrize("kind", [DiagonalFisher, KroneckerFisher, ActivationCovariance])
@pytest.mark.parametrize("wrong", [True, 0, "gloo", [0, 1]])
def test_what_is_no_group_is_refused(kind, wrong):
    with pytest.raises(TypeError, match=r"process_group must be a ProcessGroup .* or False"):
        kind(build(), process_group=wrong)


def test_alone_nothing_changes():
    assert not distributed.is_initialized()
    for name in ESTIMATES:
        mine = found(fitted(name, build(), samples(0, 4)))
        assert_equal(mine, found(fitted(name, build(), samples(0, 4), process_group=False)))

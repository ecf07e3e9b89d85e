"""A sharded model grows into a sharded one, to the bit as in one process, a tensor at a time."""

import weakref

import pytest
import torch
import torch.multiprocessing
from growth_cases import loss_of, randomized, seeded, sizes, tokens_of
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ars import ARSAdamW, ARSConfig
from ars.models import grow

SMALL, LARGE = sizes(2, 2), sizes(3, 3)
PAPER = ARSConfig.paper(window=5)  # its state has products of betas
SETTINGS = {"lr": 1e-3, "ars": PAPER}


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def trained(model, steps=3):
    optimizer = ARSAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, steps)
    return optimizer


def train(model, optimizer, steps):
    """On the same data in every process: its mean is that of one."""
    tokens = tokens_of(SMALL)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step(loss=loss)


class Gathered:
    """Counts the elements that DTensors were gathered into and that are there at one time."""

    def __enter__(self):
        self.most, self.alive, self.real = 0, [], DTensor.full_tensor
        DTensor.full_tensor = lambda tensor, **kwargs: self.noted(self.real(tensor, **kwargs))
        return self

    def noted(self, tensor):
        self.alive = [each for each in (*self.alive, weakref.ref(tensor)) if each() is not None]
        self.most = max(self.most, sum(each().numel() for each in self.alive))
        return tensor

    def __exit__(self, *_):
        DTensor.full_tensor = self.real


def whole(tensors):
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def importances(model):
    """Sharded as the parameters are."""
    return {name: p.detach().square() for name, p in model.named_parameters()}


def states(optimizer, model):
    return {
        f"{name} {key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def grown(model, optimizer, blocks, shard=None):
    """Everything a growth gives, and a few steps of the grown model."""
    model(tokens_of(SMALL))  # under fully_shard, a forward leaves the root's parameters whole
    growth = grow(model, LARGE, seeded(7), blocks=blocks, shard=shard)
    found = {
        "model": dict(growth.model.named_parameters()),
        "initial": growth.initial,
        "importance": growth.importance(importances(model)),
        "anchor": growth.anchor(dict(model.named_parameters())),
    }
    after = ARSAdamW(growth.model.parameters(), **SETTINGS)
    growth.model(tokens_of(SMALL))
    after.load_state_dict(growth.optimizer_state(optimizer, after))
    found["state"] = states(after, growth.model)
    return growth, after, {key: copies(values) for key, values in found.items()}


def copies(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def work(rank, folder, world):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    results = {}
    for blocks in ("appended", "inserted"):
        single = randomized(SMALL)
        optimizer = trained(single)
        single.wte.requires_grad_(False)
        growth, after, expected = grown(single, optimizer, blocks)
        # The same numbers in shards, as training them would round otherwise.
        model = shard(randomized(SMALL))
        mine = trained(model)
        model.wte.requires_grad_(False)
        for old, new in zip(single.parameters(), model.parameters(), strict=True):
            distribute(old, new)
            for key in ("exp_avg", "exp_avg_sq"):
                distribute(optimizer.state[old][key], mine.state[new][key])
        with Gathered() as gathered:
            sharded, later, found = grown(model, mine, blocks, shard)
        results[f"{blocks} trains"] = [
            n for n, p in sharded.model.named_parameters() if p.requires_grad
        ]
        results[f"{blocks} parts"] = {
            f"{key} {name}": isinstance(value, DTensor)
            for key, values in found.items()
            for name, value in values.items()
            if key != "state" or " exp_avg" in name
        }
        results[f"{blocks} gathered"] = gathered.most
        results[f"{blocks} expected"] = expected
        results[f"{blocks} found"] = {key: whole(values) for key, values in found.items()}
        tokens = tokens_of(SMALL)
        results[f"{blocks} logits"] = single(tokens).detach(), sharded.model(tokens).detach()
        train(growth.model, after, 3)
        train(sharded.model, later, 3)
        results[f"{blocks} trained"] = [
            whole(dict(each.model.named_parameters())) for each in (growth, sharded)
        ]
        given = whole(importances(model))  # whole ones stay whole
        results[f"{blocks} whole"] = sharded.importance(given)["blocks.0.attn.q.weight"]
    results["replicas"] = dict(
        whole(
            dict(
                grow(
                    randomized(SMALL), LARGE, seeded(7 + rank), shard=shard
                ).model.named_parameters()
            )
        )
    )
    try:
        grow(model, LARGE)
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


def distribute(old, new):
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        new.copy_(distribute_tensor(old.detach(), new.device_mesh, new.placements))


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / str(rank)) for rank in range(request.param)]


kinds = pytest.mark.parametrize("blocks", ["appended", "inserted"])


@kinds
def test_weights_importances_anchors_and_moments_are_those_of_one_process(results, blocks):
    for result in results:
        expected, found = result[f"{blocks} expected"], result[f"{blocks} found"]
        assert expected["state"].keys() == found["state"].keys()
        for key, values in expected.items():
            assert values.keys() == found[key].keys()
            for name, value in values.items():
                if "beta_products" in name:  # of losses that a mean of three processes rounds
                    torch.testing.assert_close(value, found[key][name], rtol=0, atol=1e-12)
                else:
                    assert torch.equal(value, found[key][name]), (key, name)
        assert all(result[f"{blocks} parts"].values())
        assert result[f"{blocks} trains"] == [n for n in expected["model"] if n != "wte.weight"]


@kinds
def test_the_function_is_kept_and_training_goes_on_alike(results, blocks):
    for result in results:
        logits, mine = result[f"{blocks} logits"]
        torch.testing.assert_close(mine, logits, rtol=0, atol=1e-12)
        single, sharded = result[f"{blocks} trained"]
        for name, value in single.items():
            torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-9, msg=name)


@kinds
def test_no_process_gathers_more_than_a_tensor_or_two(results, blocks):
    largest = max(p.numel() for p in randomized(LARGE).parameters())
    for result in results:
        assert 0 < result[f"{blocks} gathered"] <= 2 * largest
        assert not isinstance(result[f"{blocks} whole"], DTensor)


def test_new_weights_are_the_first_processs(results):
    expected = dict(grow(randomized(SMALL), LARGE, seeded(7)).model.named_parameters())
    for result in results:
        for name, value in expected.items():
            assert torch.equal(result["replicas"][name], value), name


def test_a_sharded_model_needs_to_be_told_how_the_grown_one_is(results):
    for result in results:
        assert (
            "the model is sharded, and so must the grown one be: pass shard=" in result["refusal"]
        )

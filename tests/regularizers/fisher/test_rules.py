"""One pass for all samples against plain autograd, layer by layer."""

import pytest
import torch
from fisher_models import MODELS, randomised

from ars.models import GPT, GPTConfig
from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import rules

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_equals_plain_autograd(build, estimator, relative_error):
    model, batch = build()
    model = randomised(model)
    loop = DiagonalFisher(model, estimator, method="loop").fit([batch]).importance
    hooks = DiagonalFisher(model, estimator, method="hooks").fit([batch]).importance
    used = {n: t for n, t in loop.items() if t.any()}
    assert len(used) >= len(loop) - 2  # of "unused"
    assert relative_error({n: hooks[n] for n in used}, used) < TOLERANCE[torch.float64]
    assert all((hooks[n] == 0).all() for n in loop if n not in used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("estimator", ["sketch", "empirical"])
def test_our_gpt(estimator, dtype, relative_error):
    config = GPTConfig(vocab_size=17, sequence_len=8, n_layer=2, n_head=2, n_embd=16)
    model = randomised(GPT(config), dtype)
    x = torch.randint(17, (6, 8))
    results = [
        DiagonalFisher(
            model, estimator, method=method, generator=torch.Generator().manual_seed(0)
        ).fit([(x, x.roll(-1, 1))])
        for method in ("hooks", "loop")
    ]
    assert relative_error(*(r.importance for r in results)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["conv", "conv-groups", "conv1d", "frames"])
def test_patches_may_be_unfolded_some_samples_at_a_time(name, monkeypatch, relative_error):
    model, batch = MODELS[name]()
    model = randomised(model)
    whole = DiagonalFisher(model, "empirical", method="hooks").fit([batch]).importance
    sizes = []
    padded = rules._padded

    def counted(module, images):
        sizes.append(len(images) * images.shape[1] // module.in_channels)
        return padded(module, images)

    monkeypatch.setattr(rules, "_padded", counted)
    monkeypatch.setattr(rules, "PATCHES", 1)
    parts = DiagonalFisher(model, "empirical", method="hooks").fit([batch]).importance
    assert max(sizes) == (3 if name == "frames" else 1)  # images of a sample
    assert relative_error(parts, whole) < TOLERANCE[torch.float64]

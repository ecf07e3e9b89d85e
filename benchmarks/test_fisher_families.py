"""The diagonal Fisher of one small model of each family: the way that `auto` takes, and others.

Every way is compared with the loop over samples first. Models are random; transformers' are left
out where it is not installed.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contest import PLAYED_BACK, Candidate, Contest
from step_peers import quiet
from torch import Tensor, nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import diagonal

pytestmark = PLAYED_BACK

BASELINE = "forward + backward"
WIDTH, LENGTH, BATCH, BATCHES, VOCABULARY = 64, 16, 8, 2, 256
OURS = 1e-4  # float32 rounding of squares, relative to each tensor's largest entry
ROUNDS = 3
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 32, "d_ff": 2 * WIDTH, "num_layers": 2,
    "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8, "num_hidden_layers": 2}
VIT = {**LLAMA, "image_size": 16, "patch_size": 4, "num_labels": 10}
# Model, configuration and sizes of transformers.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bert": ("BertForMaskedLM", "BertConfig", LLAMA),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA),
}
FAMILIES = [*TRANSFORMERS, "convnet", "mlp"]
WAYS = ("auto", "hooks", "vmap", "loop")


def model_of(family: str) -> nn.Module:
    """Make a model at random."""
    torch.manual_seed(0)
    if family == "convnet":
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, WIDTH, 3, stride=2), nn.GroupNorm(4, WIDTH), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10),
        )  # fmt: skip
    if family == "mlp":
        return nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 10))
    import transformers

    kind, config, sizes = TRANSFORMERS[family]
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


def batch_of(family: str) -> Any:
    """Make a batch as the model is trained on."""
    classes = torch.randint(10, (BATCH,))
    if family == "mlp":
        return torch.randn(BATCH, WIDTH), classes
    images = torch.randn(BATCH, 3, 16, 16)
    if family == "convnet":
        return images, classes
    if family == "vit":
        return {"pixel_values": images, "labels": classes}
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def forward_backward(model: nn.Module, batches: list[Any]) -> None:
    """One ordinary gradient a batch."""
    for batch in batches:
        if isinstance(batch, dict):
            loss = model(**batch).loss
        else:
            loss = functional.cross_entropy(model(batch[0]), batch[1])
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def on(device: str, batch: Any) -> Any:
    """Move a batch."""
    if isinstance(batch, dict):
        return {key: tensor.to(device) for key, tensor in batch.items()}
    return tuple(tensor.to(device) for tensor in batch)


def way_taken(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the way that a fit has ended with."""
    seen: list[str] = []

    class Watched(diagonal.Differentiator):
        def add_squares(self, *args: Any) -> None:
            super().add_squares(*args)
            seen.append(self._current_method)

    with monkeypatch.context() as patched:
        patched.setattr(diagonal, "Differentiator", Watched)
        run()
    return seen[-1]


def largest_error(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest deviation relative to a tensor's largest entry, if it is no rounding."""
    least = 1e-9 * max(float(tensor.max()) for tensor in expected.values())
    return max(
        float((result[name] - tensor).abs().max() / tensor.max().clamp(min=least))
        for name, tensor in expected.items()
    )


@pytest.fixture(scope="module", params=FAMILIES)
def families(request, device, contest) -> Contest:
    """The empirical Fisher; the baseline is one forward and backward pass of the same batches."""
    family = request.param
    if family in TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    made: Contest = contest(f"fisher of {family}", BASELINE, rounds=ROUNDS, count_costs=False)
    model = model_of(family).to(device).eval()
    batches = [on(device, batch_of(family)) for _ in range(BATCHES)]
    made.candidates[BASELINE] = Candidate(lambda: forward_backward(model, batches))
    runs = {}
    for way in WAYS:
        fisher = DiagonalFisher(copy.deepcopy(model), "empirical", method=way)
        runs[way] = lambda fisher=fisher: quiet(lambda: fisher.fit(batches).importance)
    expected = runs["loop"]()
    for way, run in runs.items():
        if way in {"hooks", "vmap"}:
            try:
                run()
            except RuntimeError as error:
                made.left_out[way] = str(error)[:160]
                continue

        def check(run=run) -> dict[str, float]:
            error = largest_error(run(), expected)
            assert error < OURS, f"the largest error is {error:.1e}, the bound {OURS:.0e}"
            return {"largest error": error, "bound": OURS}

        made.candidates[way] = Candidate(run, check=check)
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.notes["auto"] = {"way": way_taken(runs["auto"], monkeypatch)}
    return made


@pytest.mark.parametrize("name", [BASELINE, *WAYS])
def test_fisher_of_family(name, families, benchmark):
    families.play(name, benchmark)

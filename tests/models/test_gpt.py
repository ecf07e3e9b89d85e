"""The GPT against a naive float64 implementation, closed-form counts and its own contract."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ars.models import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=17, sequence_len=8, n_layer=2, n_head=3, n_embd=24)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomized(config: GPTConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A model with no zero weight: at its initial values attention and MLP would write nothing."""
    model = GPT(config, seeded(seed)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=seeded(seed + 1), dtype=torch.float64)
            weight.add_(noise.to(dtype), alpha=0.3)
    return model


def tokens_of(config: GPTConfig, batch: int = 3, seed: int = 0) -> Tensor:
    shape = (batch, config.sequence_len)
    return torch.randint(config.vocab_size, shape, generator=seeded(seed))


def naive_logits(model: GPT, tokens: Tensor) -> Tensor:
    """One sequence, written out: complex rotations, explicit mask, heads in a loop."""
    c = model.config
    p = dict(model.named_parameters())
    hd, length = c.n_embd // c.n_head, len(tokens)

    def norm(x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def rope(x: Tensor) -> Tensor:
        turns = x.new_tensor([c.rope_base ** (-2 * i / hd) for i in range(hd // 2)])
        angle = torch.arange(length).to(x)[:, None] * turns
        z = torch.complex(x[:, : hd // 2], x[:, hd // 2 :]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), -1)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = norm(p["wte.weight"][tokens], c.norm_eps / c.n_head)
    for i in range(c.n_layer):
        h = norm(x, c.norm_eps)
        heads = []
        for head in range(c.n_head):
            rows = slice(head * hd, (head + 1) * hd)
            q, k, v = (h @ p[f"blocks.{i}.attn.{name}.weight"][rows].T for name in "qkv")
            q, k = (norm(rope(t), c.norm_eps * c.n_head) for t in (q, k))
            score = (q @ k.T / math.sqrt(hd)).masked_fill(future, -math.inf)
            heads.append(score.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ p[f"blocks.{i}.attn.proj.weight"].T
        h = norm(x, c.norm_eps) @ p[f"blocks.{i}.mlp.fc.weight"].T
        x = x + h.clamp_min(0).pow(2) @ p[f"blocks.{i}.mlp.proj.weight"].T
    return norm(x, c.norm_eps) @ p["lm_head.weight"].T


# norm_eps 0.3 is large enough that a misplaced eps shows in the logits.
@pytest.mark.parametrize("norm_eps", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("rope_base", [10000.0, 50.0])
def test_matches_naive_implementation(norm_eps, rope_base):
    model = randomized(dataclasses.replace(SMALL, norm_eps=norm_eps, rope_base=rope_base))
    for tokens in tokens_of(SMALL):
        expected = naive_logits(model, tokens)
        torch.testing.assert_close(model(tokens[None])[0], expected, rtol=0, atol=1e-12)
        assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "tolerance"),
    # Relative to the largest logit. bf16 has 8 bits and about ten roundings in sequence.
    [(torch.float32, torch.float32, 1e-5), (torch.bfloat16, torch.float32, 0.05)],
    ids=["fp32", "bf16"],
)
def test_lower_precision_follows_float64(dtype, logits_dtype, tolerance):
    model, low, tokens = randomized(SMALL), randomized(SMALL, dtype), tokens_of(SMALL)
    low.load_state_dict(model.state_dict())
    expected, logits = model(tokens), low(tokens)
    assert logits.dtype == logits_dtype
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def test_positions_do_not_depend_on_the_dtype_a_model_had():
    model, tokens = randomized(SMALL), tokens_of(SMALL)
    through_bf16 = GPT(SMALL).bfloat16().double()
    through_bf16.load_state_dict(model.state_dict())
    assert torch.equal(through_bf16(tokens), model(tokens))
    assert not list(model.buffers())


def test_is_causal():
    model, tokens = randomized(SMALL), tokens_of(SMALL)
    logits = model(tokens)
    for t in range(SMALL.sequence_len):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert difference[:t].eq(0).all()
        assert difference[t:].gt(1e-3).all()


def test_shorter_input_and_int32_give_the_same_logits():
    model, tokens = randomized(SMALL), tokens_of(SMALL)
    expected = model(tokens)
    torch.testing.assert_close(model(tokens[:, :5]), expected[:, :5], rtol=0, atol=1e-13)
    assert torch.equal(model(tokens.int()), expected)


def test_parameter_names():
    per_block = [f"attn.{name}.weight" for name in ("q", "k", "v", "proj")]
    per_block += ["mlp.fc.weight", "mlp.proj.weight"]
    names = [
        "wte.weight",
        *(f"blocks.{i}.{n}" for i in (0, 1) for n in per_block),
        "lm_head.weight",
    ]
    assert list(GPT(SMALL).state_dict()) == names


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("vocab_size", [11, 64])
def test_parameter_counts(depth, vocab_size):
    c = GPTConfig(vocab_size, sequence_len=4, n_layer=depth, n_head=2, n_embd=16)
    model = GPT(c)
    assert model.num_scaling_parameters() == 12 * depth * 16**2 + vocab_size * 16
    assert model.num_parameters() == 12 * depth * 16**2 + 2 * vocab_size * 16


def test_flops_are_those_torch_counts():
    model, tokens = GPT(SMALL), tokens_of(SMALL, batch=2)
    # The unfused kernel computes the masked half too, which is what the formula counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    assert counter.get_total_flops() == model.flops_per_token() * tokens.numel()


def test_initial_law():
    c = GPTConfig(vocab_size=512, sequence_len=8, n_layer=2, n_head=2, n_embd=128)
    for name, weight in GPT(c, seeded(0)).named_parameters():
        if name.endswith("proj.weight"):
            assert weight.eq(0).all()
            continue
        std = {"wte.weight": 0.8, "lm_head.weight": 0.001}.get(name, 1 / math.sqrt(128))
        # Standard error of a standard deviation over n >= 16384 draws: below 0.6 %.
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 0.03 * std
        bounded = weight.abs().max().item() <= math.sqrt(3 / 128) * (1 + 1e-6)
        assert bounded == (name not in {"wte.weight"})


def test_generator_fixes_the_weights_and_spares_the_global_state():
    state = torch.get_rng_state()
    a, b, other = GPT(SMALL, seeded(1)), GPT(SMALL, seeded(1)), GPT(SMALL, seeded(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, other.wte.weight)
    torch.manual_seed(5)
    first = GPT(SMALL)
    torch.manual_seed(5)
    assert torch.equal(first.wte.weight, GPT(SMALL).wte.weight)


def test_learns_to_copy_a_sequence():
    torch.manual_seed(0)
    model, tokens = GPT(SMALL, seeded(0)), tokens_of(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(17), abs=0.05)
    assert losses[-1] < 0.05


def sequence_loss(parameters: dict[str, Tensor], model: GPT, tokens: Tensor) -> Tensor:
    logits = functional_call(model, parameters, (tokens[None],))[0]
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])


# filterwarnings=error: a missing batching rule, which makes torch loop and warn, fails this test.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_vmapped_gradients_equal_a_loop(dtype, atol):
    model, batch = randomized(SMALL, dtype), tokens_of(SMALL, batch=4)
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    samples = vmap(grad(sequence_loss), in_dims=(None, None, 0))(parameters, model, batch)
    for i, tokens in enumerate(batch):
        loss = sequence_loss(dict(model.named_parameters()), model, tokens)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for (name, per_sample), gradient in zip(samples.items(), expected, strict=True):
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(per_sample[i], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("recompute", [False, True])
def test_traces_without_graph_breaks(recompute):
    model, tokens = randomized(SMALL, torch.float32), tokens_of(SMALL)
    model.recompute = recompute
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_single_samples_are_differentiated_whether_blocks_are_recomputed_or_not():
    model, tokens = randomized(SMALL), tokens_of(SMALL)
    weights = dict(model.named_parameters())

    def gradients():
        def total(weights, one):
            return functional_call(model, weights, one[None]).sum()

        return vmap(grad(total), (None, 0))(weights, tokens)

    expected = gradients()
    model.recompute = True
    found = gradients()
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_runs_under_autocast():
    model, tokens = randomized(SMALL, torch.float32), tokens_of(SMALL)
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() <= 0.05 * expected.abs().max()


def test_generate_takes_the_most_probable_token_at_temperature_zero():
    model, prompt = randomized(SMALL), tokens_of(SMALL)[:, :3]
    tokens = model.generate(prompt, 9, temperature=0.0)
    assert tokens.shape == (3, 12)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, :3], prompt)
    for t in range(3, 12):
        context = tokens[:, max(0, t - SMALL.sequence_len) : t]
        assert torch.equal(tokens[:, t], model(context)[:, -1].argmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-37, 1e-30])
def test_generate_takes_the_likeliest_where_the_temperature_vanishes(temperature):
    model = GPT(GPTConfig(11, 8, 1, 1, 8), torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 2], [3, 4]])
    found = model.generate(tokens, 5, temperature=temperature)
    assert torch.equal(found, model.generate(tokens, 5, temperature=0.0))


def test_generate_samples_from_the_tempered_softmax():
    model, prompt = randomized(SMALL), tokens_of(SMALL, batch=1)[:, :3]
    many = prompt.expand(20000, 3)
    sampled = model.generate(many, 1, temperature=2.0, generator=seeded(0))[:, -1]
    frequency = torch.bincount(sampled, minlength=SMALL.vocab_size) / len(many)
    expected = torch.softmax(model(prompt)[0, -1] / 2.0, -1)
    # Five standard errors of a frequency over 20000 draws, at most 0.0035 each.
    assert (frequency - expected).abs().max() < 5 * math.sqrt(0.25 / len(many))
    assert (torch.softmax(model(prompt)[0, -1], -1) - expected).abs().max() > 0.05


def test_generate_is_reproducible():
    model, prompt = randomized(SMALL), tokens_of(SMALL)[:, :3]
    first = model.generate(prompt, 9, generator=seeded(3))
    assert torch.equal(first, model.generate(prompt, 9, generator=seeded(3)))
    assert not torch.equal(first, model.generate(prompt, 9, generator=seeded(4)))
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert not model(first[:, :2]).detach().isnan().any()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"shape \(B, T\).*unsqueeze"),
        (torch.zeros(1, 1, 4, dtype=torch.int64), r"shape \(B, T\)"),
        (torch.zeros(1, 4), "integers.*long"),
        (torch.zeros(1, 9, dtype=torch.int64), "length 9.*sequence_len=8"),
        (torch.zeros(1, 0, dtype=torch.int64), "length 0"),
    ],
)
def test_forward_rejects(tokens, message):
    with pytest.raises(ValueError, match=message):
        GPT(SMALL)(tokens)


def test_generate_and_constructor_reject():
    model, prompt = GPT(SMALL), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompt, -1)
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            model.generate(prompt, 1, temperature=temperature)
    with pytest.raises(TypeError, match="GPTConfig"):
        GPT({"n_layer": 1})

"""Importances of Hugging Face's models from the batches that they are trained on.

Each is the gradient of the model's own loss of one sample, squared.
"""

import warnings

import pytest
import torch
import transformers

from ars.regularizers import ActivationCovariance, DiagonalFisher, KroneckerFisher

NEW = hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
# The models form their loss in float32, whatever the logits are; the rest is in float64.
FLOAT32_LOSS = 1e-6
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 20,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {
    "vocab_size": 20,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
OPT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 16,
}
BART = {
    "vocab_size": 20,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "masked": ("BertForMaskedLM", "BertConfig", SIZES),
    "tagged": ("BertForTokenClassification", "BertConfig", {**SIZES, "num_labels": 5}),
    "classified": ("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 5}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SIZES, "state_size": 4}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}
CAUSAL = {"gpt2", "llama", "opt", "mixtral", "mamba"}
ONE_PASS = {*FAMILIES} - {"mixtral"}


def build(family):
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).double()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the others have no float64 on a CPU
    return model


def batch_of(family, n=4, length=10):
    """Padded on the right, with labels that are masked elsewhere too."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    labels = ids % 5 if family in {"tagged", "classified"} else ids.clone()
    labels = labels[:, 0] if family == "classified" else labels.masked_fill(mask == 0, -100)
    if family in CAUSAL:
        labels[0, :4] = -100  # a prompt
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def squares_of_own_loss(model, family, batch):
    """Of the sum over the labels that a sample is predicted at, by the model itself."""
    model.eval()
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    samples = len(batch["labels"])
    for n in range(samples):
        one = {key: value[n : n + 1] for key, value in batch.items()}
        predicted = one["labels"][:, 1:] if family in CAUSAL else one["labels"]
        loss = model(**one).loss * (predicted != -100).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for total, g in zip(totals.values(), found, strict=True):
            total += g.square() / samples
    return totals


def relative_error(actual, expected):
    """Largest deviation of any tensor, relative to its largest entry.

    Gradients that are 0 but for rounding, as of the bias of keys, are compared with the model's.
    """
    assert actual.keys() == expected.keys()
    least = 1e-15 * max(e.max() for e in expected.values())
    return max(
        float((actual[n] - e).abs().max() / e.max().clamp(min=least)) for n, e in expected.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_importance_is_that_of_the_models_own_loss(family):
    model, batch = build(family), batch_of(family)
    expected = squares_of_own_loss(model, family, batch)
    method = "hooks" if family in ONE_PASS else "loop"
    fitted = DiagonalFisher(model, "empirical", method=method).fit([batch]).importance
    assert relative_error(fitted, expected) < FLOAT32_LOSS


def test_a_class_name_does_not_tell_whether_labels_are_shifted():
    """That of T5 stands for a loss that shifts; it does not shift."""
    model = build("t5")
    assert model.loss_function is build("llama").loss_function
    batch = batch_of("t5")
    given = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}
    both = [
        DiagonalFisher(model, "empirical", method="loop").fit([each]).importance
        for each in (batch, given)
    ]
    for name, importance in both[0].items():
        assert torch.equal(importance, both[1][name])


@pytest.mark.parametrize("estimator", ["sketch", "empirical"])
def test_checkpointing_changes_nothing_and_stays(estimator):
    found = []
    for checkpointed in (False, True):
        model = build("llama").train()
        if checkpointed:
            enable = f"{'activation' if NEW else 'gradient'}_checkpointing_enable"
            getattr(model, enable)()
        seed = torch.Generator().manual_seed(0)
        fisher = DiagonalFisher(model, estimator, method="hooks", generator=seed)
        found.append(fisher.fit([batch_of("llama")]).importance)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is (
            checkpointed
        )
        assert model.training
    assert relative_error(*found) == 0.0


def test_padding_adds_nothing():
    model = build("llama")
    batch = batch_of("llama")
    short = [{key: value[n : n + 1, :length] for key, value in batch.items()}
             for n, length in enumerate((10, 7, 4, 10))]  # fmt: skip
    whole = DiagonalFisher(model, "empirical", method="hooks").fit([batch]).importance
    parts = DiagonalFisher(model, "empirical", method="hooks").fit(short).importance
    assert relative_error(whole, parts) < 1e-9


def test_factors_count_the_positions_that_predict():
    model, batch = build("llama"), batch_of("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = KroneckerFisher(model, "empirical").fit([batch]).factors
        covariance = ActivationCovariance(model).fit([batch]).covariance
    states = []
    model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    model.eval()(**batch)
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    rows = states[0][predicts]
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(factors["lm_head.weight"].inputs, expected)
    torch.testing.assert_close(covariance["lm_head.weight"], expected)


def test_factors_of_gpt2_are_of_every_matrix():
    model, batch = build("gpt2"), batch_of("gpt2")
    with pytest.warns(UserWarning, match=r"is known of transformer\.wte\.weight as used by"):
        factors = KroneckerFisher(model, "empirical").fit([batch]).factors
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and "wpe" not in n}
    assert factors.keys() == matrices
    assert factors["transformer.h.0.mlp.c_fc.weight"].inputs.shape == (9, 9)
    assert factors["transformer.h.0.mlp.c_fc.weight"].outputs.shape == (32, 32)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_factors_of_mixtral_are_of_every_expert(implementation):
    """Of one position that predicts, the factors' diagonals give the squared gradients."""
    model = build("mixtral").float()
    model.set_experts_implementation(implementation)
    ids = torch.tensor([[3, 7]])
    batch = {"input_ids": ids, "labels": ids}
    with pytest.warns(
        UserWarning, match=r"is known of model\.embed_tokens\.weight, model\.l.*gate"
    ):
        factors = KroneckerFisher(model, "empirical").fit([batch]).factors
    squares = squares_of_own_loss(model, "mixtral", batch)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name and "gate" not in name:
            assert name in factors
        if p.ndim < 3:
            continue
        a, g = (factor.diagonal(dim1=-2, dim2=-1) for factor in factors[name])
        torch.testing.assert_close(g[:, :, None] * a[:, None, :], squares[name])
        assert (squares[name].flatten(1).amax(1) > 0).tolist().count(True) == 2


@pytest.mark.parametrize("method", ["hooks", "vmap"])
def test_a_model_keeps_no_cache_meanwhile(method):
    """Mamba writes to its cache in place."""
    model, batch = build("mamba"), batch_of("mamba")
    pairs = [(batch["input_ids"], batch["input_ids"])]
    assert model.config.use_cache
    found, loop = (
        DiagonalFisher(model, "empirical", method=each).fit(pairs).importance
        for each in (method, "loop")
    )
    assert relative_error(found, loop) < FLOAT32_LOSS
    assert model.config.use_cache is True

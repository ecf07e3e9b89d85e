"""Small models of each family, at random, and batches as they are trained on."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ars.models import GPT, GPTConfig

VOCABULARY = 256
OTHERS = ("gpt", "convnet", "depthwise", "mlp")
IMAGES = {"convnet", "depthwise", "vit"}
# What transformers calls a model and its configuration.
TRANSFORMERS = {
    "gpt-2": ("GPT2LMHeadModel", "GPT2Config"),
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "t5": ("T5ForConditionalGeneration", "T5Config"),
    "bert": ("BertForMaskedLM", "BertConfig"),
    "vit": ("ViTForImageClassification", "ViTConfig"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig"),
    "mamba": ("MambaForCausalLM", "MambaConfig"),
}


def _image_side(length: int) -> int:
    """Return the side of images with about as many places as a sequence, in patches of four."""
    return 16 if length < 64 else 32


def model_of(family: str, width: int, length: int) -> nn.Module:
    """Make a model of two layers at random, in evaluation mode."""
    torch.manual_seed(0)
    return (_transformer if family in TRANSFORMERS else _other)(family, width, length).eval()


def _other(family: str, width: int, length: int) -> nn.Module:
    if family == "gpt":
        heads = max(2, width // 32)
        return GPT(GPTConfig(
            vocab_size=VOCABULARY, sequence_len=length, n_layer=2, n_head=heads, n_embd=width
        ))  # fmt: skip
    if family == "mlp":
        return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    if family == "convnet":
        return nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1), nn.BatchNorm2d(width // 2), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2), nn.GroupNorm(4, width), nn.ReLU(), *head,
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU6(),
        nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU6(), *head,
    )  # fmt: skip


def _transformer(family: str, width: int, length: int) -> nn.Module:
    import transformers

    heads = max(2, width // 32)
    decoder = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip
    sizes: dict[str, dict[str, Any]] = {
        "gpt-2": {"vocab_size": VOCABULARY, "n_positions": length, "n_embd": width, "n_layer": 2,
                  "n_head": heads},
        "t5": {"vocab_size": VOCABULARY, "d_model": width, "d_kv": 32, "d_ff": 2 * width,
               "num_layers": 2, "num_heads": heads, "decoder_start_token_id": 0},
        "vit": {**decoder, "image_size": _image_side(length), "patch_size": 4, "num_labels": 10},
        "mixtral": {**decoder, "num_local_experts": 4},
        "mamba": {"vocab_size": VOCABULARY, "hidden_size": width, "state_size": 8,
                  "num_hidden_layers": 2},
    }  # fmt: skip
    kind, config = TRANSFORMERS[family]
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes.get(family, decoder)))


def batch_of(family: str, width: int, length: int, samples: int) -> Any:
    """Make a batch as the model is trained on."""
    classes, side = torch.randint(10, (samples,)), _image_side(length)
    if family == "mlp":
        return torch.randn(samples, width), classes
    if family in IMAGES:
        images = torch.randn(samples, width if family == "depthwise" else 3, side, side)
        return {"pixel_values": images, "labels": classes} if family == "vit" else (images, classes)
    ids = torch.randint(1, VOCABULARY, (samples, length))
    return (ids, ids.clone()) if family == "gpt" else {"input_ids": ids, "labels": ids.clone()}


def forward_backward(model: nn.Module, batches: list[Any]) -> None:
    """One ordinary gradient a batch."""
    for batch in batches:
        if isinstance(batch, dict):
            loss = model(**batch).loss
        else:
            loss = functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

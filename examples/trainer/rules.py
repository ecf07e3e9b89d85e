r"""Depth -> batch, learning rates and weight decay, where the user names none.

With N parameters in matrix products and N_0 those of depth 12 with the same vocabulary, B tokens a
step and B_0 = 2^19,

    B             = 2^round(log2(B_0 (N / N_0)^0.383))           tokens a step, a power of two
    lr            = 6e-4 sqrt(B / B_0) sqrt(12 / depth)          AdamW
    muon_lr       = 0.02 sqrt(B / B_0)                           Muon
    muon_adamw_lr = 0.008 sqrt(B / B_0) sqrt(12 / depth)         AdamW beside Muon
    decay         = 0.1 sqrt(B / B_0) N_0 / N                    decoupled, of either

These are nanochat's: batch and decay follow the tokens D of a model's training, of which every
depth has equally many a parameter, so D / D_0 = N / N_0; two of the rates follow the width, which
is proportional to the depth. 6e-4 with 0.5 million tokens is GPT-3's rate for the width of depth
12, 0.02 and 0.008 (its head's) are nanochat's. They are a start for large batches and were not
tuned here. Whoever names a batch gets the others for that batch.

References:
    Karpathy, "nanochat", github.com/karpathy/nanochat, scripts/base_train.py. Bergsma et al.,
    arXiv:2505.13738 (the batch). Wang and Aitchison, arXiv:2405.13698 (the decay). Brown et al.,
    arXiv:2005.14165, table 2.1 (the rate of AdamW).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.overhead import Shape
from trainer.settings import RULE, SeriesConfig

__all__ = ["Settings", "settings_of"]

_DEPTH = 12
_BATCH_TOKENS = 2**19
_BATCH_EXPONENT = 0.383
_LR = 6e-4
_MUON_LR = 0.02
_MUON_ADAMW_LR = 0.008
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Settings:
    """What depends on the depth of a model.

    Args:
        batch_size: sequences a step, over all processes.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        muon_adamw_lr: peak learning rate of the AdamW beside it.
        weight_decay: decoupled.
    """

    batch_size: int
    lr: float
    muon_lr: float
    muon_adamw_lr: float
    weight_decay: float


def settings_of(depth: int, config: SeriesConfig, shape_of: Callable[[int], Shape]) -> Settings:
    """The settings of a depth: the user's where named, the rule's elsewhere.

    Args:
        depth: layers.
        config: of the series.
        shape_of: sizes of the model of a depth.

    Example:
        >>> from trainer.settings import SeriesConfig
        >>> config = SeriesConfig(batch_size="rule", lr="rule", sequence_len=2048)
        >>> chosen = settings_of(12, config, lambda depth: Shape(depth, depth**3, 0, ()))
        >>> chosen.batch_size * 2048 == 2**19, chosen.lr
        (True, 0.0006)
    """
    horizon = shape_of(depth).scaling_params / shape_of(_DEPTH).scaling_params
    if config.batch_size == RULE:
        tokens = 2 ** round(math.log2(_BATCH_TOKENS * horizon**_BATCH_EXPONENT))
        batch_size = max(1, tokens // config.sequence_len)
    else:
        batch_size = int(config.batch_size)
    share = math.sqrt(batch_size * config.sequence_len / _BATCH_TOKENS)
    narrow = math.sqrt(_DEPTH / depth)

    def chosen(value: float | str, rule: float) -> float:
        return rule if value == RULE else float(value)

    return Settings(
        batch_size=batch_size,
        lr=chosen(config.lr, _LR * share * narrow),
        muon_lr=chosen(config.muon_lr, _MUON_LR * share),
        muon_adamw_lr=chosen(config.muon_adamw_lr, _MUON_ADAMW_LR * share * narrow),
        weight_decay=chosen(config.weight_decay, _WEIGHT_DECAY * share / horizon),
    )

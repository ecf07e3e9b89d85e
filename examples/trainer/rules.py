r"""Depth -> batch, learning rates and weight decay, where the user names none.

With D = 64 depth, D_0 = 768, B tokens a step and B_0 = 2^19,

    B          = 2^round(log2(B_0 (D / D_0)^0.383))          tokens a step, a power of two
    lr         = 6e-4 sqrt(B / B_0) sqrt(D_0 / D)            AdamW
    muon_lr    = 0.02 sqrt(B / B_0)                          Muon
    muon_adamw_lr = 0.008 sqrt(B / B_0) sqrt(D_0 / D)        AdamW beside Muon
    decay      = 0.1 sqrt(B / B_0) D_0 / D                   decoupled, of either

The exponents are nanochat's, found for its own model by its author; 6e-4 with 0.5 million tokens is
GPT-3's rate for this width, 0.02 and 0.008 (its head's) are nanochat's. They are a start for large
batches and were not tuned here. Whoever names a batch gets the others for that batch.

References:
    Karpathy, "nanochat", github.com/karpathy/nanochat. Brown et al., arXiv:2005.14165, table 2.1.
"""

import math
from dataclasses import dataclass

from trainer.config import RULE, SeriesConfig

__all__ = ["Settings", "settings_of"]

_WIDTH_PER_DEPTH = 64
_WIDTH = 768
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


def settings_of(depth: int, config: SeriesConfig) -> Settings:
    """The settings of a depth: the user's where named, the rule's elsewhere.

    Args:
        depth: layers.
        config: of the series.

    Example:
        >>> from trainer.config import SeriesConfig
        >>> config = SeriesConfig(batch_size="rule", lr="rule", sequence_len=2048)
        >>> chosen = settings_of(12, config)
        >>> chosen.batch_size * 2048 == 2**19, chosen.lr
        (True, 0.0006)
    """
    width = _WIDTH_PER_DEPTH * depth
    if config.batch_size == RULE:
        tokens = 2 ** round(math.log2(_BATCH_TOKENS * (width / _WIDTH) ** _BATCH_EXPONENT))
        batch_size = max(1, tokens // config.sequence_len)
    else:
        batch_size = int(config.batch_size)
    share = math.sqrt(batch_size * config.sequence_len / _BATCH_TOKENS)

    def chosen(value: float | str, rule: float) -> float:
        return rule if value == RULE else float(value)

    return Settings(
        batch_size=batch_size,
        lr=chosen(config.lr, _LR * share * math.sqrt(_WIDTH / width)),
        muon_lr=chosen(config.muon_lr, _MUON_LR * share),
        muon_adamw_lr=chosen(
            config.muon_adamw_lr, _MUON_ADAMW_LR * share * math.sqrt(_WIDTH / width)
        ),
        weight_decay=chosen(config.weight_decay, _WEIGHT_DECAY * share * _WIDTH / width),
    )

"""A GPT, its miniseries of sizes, and exact growth from one size to the next."""

from ars.models.config import GPTConfig, miniseries_config
from ars.models.gpt import GPT
from ars.models.growth import Growth, grow

__all__ = ["GPT", "GPTConfig", "Growth", "grow", "miniseries_config"]

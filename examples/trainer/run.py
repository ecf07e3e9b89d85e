"""One run: what every part of the trainer is told."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from common.output_folder import OutputFolder
from common.program import StopRequest
from corpus import Corpus
from trainer.parallel import Parallel
from trainer.plan import ModelPlan
from trainer.settings import Machine, SeriesConfig

__all__ = ["CONFIG_FILE", "DATA_FOLDER", "TOKENIZER_FILE", "Run"]

# In the output folder.
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DATA_FOLDER = "data"  # the text as tokens, made before the run is begun


@dataclass(frozen=True)
class Run:
    """A series, and where and with what it is trained.

    Args:
        output: its folder.
        config: the settings.
        machine: device, memory and reporting.
        corpus: the data.
        parallel: this process among those of the run.
        stop: asked at every safe point.
    """

    output: OutputFolder
    config: SeriesConfig
    machine: Machine
    corpus: Corpus
    parallel: Parallel
    stop: StopRequest

    @property
    def folder(self) -> Path:
        """Output folder."""
        return self.output.path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def fingerprint(self, plan: ModelPlan) -> str:
        """Digest of what a state of this model depends on, to tell it from that of another run."""
        facts = [self.config.to_dict(), self.corpus.sha256, plan.name]
        return hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()

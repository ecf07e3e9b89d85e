"""`ARSAdamW` in the Trainer of Hugging Face, and importances of adapters of PEFT."""

import peft
import pytest
import torch
import transformers
from plain_loop import LR
from torch import nn

from ars import ARSAdamW
from ars.regularizers import DiagonalFisher

SHAPE = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


def build(**dropout):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **SHAPE, **dropout
    )
    return transformers.GPT2LMHeadModel(config)


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IDS = torch.randint(0, 20, (10, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": ids, "labels": ids} for ids in IDS]


class WatchingTrainer(transformers.Trainer):
    def training_step(self, *args, **kwargs):
        share = super().training_step(*args, **kwargs)
        self.own.watch(share * self.current_gradient_accumulation_steps)
        return share

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(DATA, 2, collate_fn=self.data_collator)


class Surprises(transformers.TrainerCallback):
    def __init__(self, optimizer):
        self.optimizer, self.values = optimizer, []

    def on_step_end(self, *_, **__):
        self.values.append(float(self.optimizer.diagnostics["surprise"]))


def trainer(folder, epochs, **more):
    model = build(**NO_DROPOUT)
    optimizer = ARSAdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_grad_norm=0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    seen = Surprises(optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    made = WatchingTrainer(
        model, arguments, train_dataset=DATA, optimizers=(optimizer, schedule), callbacks=[seen]
    )
    made.own = optimizer
    return made, seen.values


def test_the_mean_of_all_tokens_of_a_step_is_watched(tmp_path):
    made, surprises = trainer(tmp_path, 1, save_strategy="no")
    made.train()
    model = build(**NO_DROPOUT)
    optimizer = ARSAdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    for first, surprise in zip((0, 4, 8), surprises, strict=True):  # the last has one micro-batch
        ids = IDS[first : first + 4]
        # The trainer divides the sum by the number of labels, of which the first has no prediction.
        loss = model(ids, labels=ids).loss * 7 / 8
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        assert surprise == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    whole, ahead = trainer(tmp_path / "whole", 2, save_strategy="no")
    whole.train()
    first, _ = trainer(tmp_path / "half", 2, save_strategy="epoch")
    first.train()
    second, resumed = trainer(tmp_path / "half", 2, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert resumed == ahead[3:]
    for own, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(own, other)


def adapted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))


BATCH = torch.randn(16, 4), torch.randint(0, 3, (16,))


def test_a_fresh_adapter_is_warned_of_by_name():
    model = adapted()
    with pytest.warns(
        UserWarning, match=r"lora_A\.default\.weight' is 0 throughout.*B is 0"
    ) as said:
        fisher = DiagonalFisher(model, "empirical").fit([BATCH])
    assert said[0].filename == __file__
    for name, importance in fisher.importance.items():
        assert bool(importance.any()) == ("lora_B" in name), name


def test_a_trained_adapter_has_the_importance_of_plain_autograd():
    model = adapted()
    optimizer = ARSAdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(BATCH[0]), BATCH[1])
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    found = DiagonalFisher(model, "empirical", method="hooks").fit([BATCH]).importance
    expected = DiagonalFisher(model, "empirical", method="loop").fit([BATCH]).importance
    assert found.keys() == expected.keys()
    assert len(found) == 2
    for name, importance in expected.items():
        assert importance.any()
        torch.testing.assert_close(found[name], importance, rtol=1e-4, atol=1e-9)

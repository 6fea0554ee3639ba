"""Hugging Face Trainer: one callback records a training, another anneals masks in the next. Needs gradloc[hf].

A small GPT-2 learns the characters of Python's own standard library; nothing is downloaded. About 15 seconds on two cores.
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradloc
from gradloc.integrations.huggingface import AnnealCallback, GradlocCallback

folder = Path(tempfile.mkdtemp())
text = Path(tempfile.__file__).read_bytes() + Path(torch.__file__).read_bytes()
rows = [{"input_ids": list(text[i : i + 65]), "labels": list(text[i : i + 65])} for i in range(0, 60_000, 64)]
held_out, rows = rows[-64:], rows[:-64]
config = GPT2Config(vocab_size=256, n_positions=65, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
torch.manual_seed(0)
model = GPT2LMHeadModel(config)


def trainer(steps: int) -> Trainer:
    settings = {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(folder / "out", max_steps=steps, learning_rate=3e-3, logging_steps=50, **settings)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out)


training = trainer(steps=100)
training.add_callback(GradlocCallback(run=folder / "run", report=True))
training.train()
before = training.evaluate()["eval_loss"]

masks = gradloc.find_masks(folder / "run", density=0.5, include="transformer.h.*")
training = trainer(steps=60)
annealing = AnnealCallback(masks, validate=training, budget=0.02, validate_every=20)
training.add_callback(annealing)
training.train()

print(f"{annealing.annealer.outcome}; mask exact: {annealing.annealer.exact}")
print(
    f"loss {before:.3f} before, {training.evaluate()['eval_loss']:.3f} with {masks.density:.0%} of the blocks' weights"
)

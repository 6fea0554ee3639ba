import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.ffn = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, x):
        return x + self.ffn(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(seed=0, lr=2e-3):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train(model, optimizer, steps, annealer=None):
    for _ in range(steps):
        batch = torch.randint(1500, (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        if annealer:
            annealer.step()
        optimizer.zero_grad()


@torch.no_grad()
def validation_loss():
    return float(nn.functional.cross_entropy(model(x[1500:]), y[1500:]))


model, optimizer = make()

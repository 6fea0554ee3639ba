"""The smallest use: record a classifier's training on scikit-learn's digits, and read where it landed."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

run_path = f"{tempfile.mkdtemp()}/digits"
gradloc.wrap(optimizer, model, run=run_path)
for _ in range(30):
    for batch in torch.randperm(len(x)).split(64):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

report = gradloc.report()
print(report.save_html(f"{run_path}/report.html"))

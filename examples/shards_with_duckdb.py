"""A run is Parquet files: ask your own questions with SQL. Needs duckdb 2.

Records a classifier of scikit-learn's digits, then reads its shards without gradloc. About 5 seconds. The columns are in docs/schema.md.
"""

import tempfile
from pathlib import Path

import duckdb
import torch
from sklearn.datasets import load_digits
from torch import nn

import gradloc

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
run = Path(tempfile.mkdtemp()) / "run"
gradloc.wrap(optimizer, model, run=run, every=1, flush_every=50, firing_every=5)
for _ in range(10):
    for batch in torch.randperm(len(x)).split(64):
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
gradloc.recorder_of(optimizer).close()

shards = duckdb.connect()
for table in ("cells", "windows", "firings"):
    shards.execute(f"CREATE VIEW {table} AS SELECT * FROM '{run}/shards/*/{table}-*.parquet'")

print("Where the gradient energy is, per observed step:")
energy = """
    WITH seen AS (SELECT parameter, sum(exposure) AS steps FROM windows GROUP BY parameter)
    SELECT parameter, any_value(steps) AS steps, round(sum(grad_sumsq) / any_value(steps), 6) AS energy_a_step
    FROM cells JOIN seen USING (parameter) GROUP BY parameter ORDER BY energy_a_step DESC
"""
print(shards.sql(energy))

print("How it moves over training:")
by_window = """
    SELECT "window", max(last_step) AS last_event, round(sum(grad_sumsq) FILTER (parameter LIKE '0.%') / sum(grad_sumsq), 3) AS in_the_first_layer
    FROM cells GROUP BY "window" ORDER BY "window"
"""
print(shards.sql(by_window))

print("The hidden units that most samples pull at:")
busiest = """
    SELECT unit, count(*) AS samples FROM (SELECT unnest(units) AS unit FROM firings WHERE module = '0')
    GROUP BY unit ORDER BY samples DESC, unit LIMIT 5
"""
print(shards.sql(busiest))
print(f"{len(list(run.glob('shards/*/*.parquet')))} files of {run}")

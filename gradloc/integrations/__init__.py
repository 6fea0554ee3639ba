"""Recording and annealing inside other people's training loops, with one object added to each.

`huggingface` has callbacks for `transformers.Trainer`, `lightning` for Lightning's. A loop with Accelerate needs none: give the prepared
optimizer to `gradloc.wrap` and `gradloc.Annealer`. Nothing here is imported before it is used.
"""

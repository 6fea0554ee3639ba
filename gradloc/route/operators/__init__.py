"""Every kind of operator that can run as blocks, one a file. `kinds` imports this to know all of them."""

from gradloc.route.operators import attention, conv, embedding, gated, linear, recurrent

__all__ = ["attention", "conv", "embedding", "gated", "linear", "recurrent"]

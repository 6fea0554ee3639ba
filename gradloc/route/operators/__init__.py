"""Every kind of operator that can run as blocks, one a file. Importing this makes all of them known to `kinds`."""

from gradloc.route.operators import attention, conv, embedding, gated, linear, recurrent

__all__ = ["attention", "conv", "embedding", "gated", "linear", "recurrent"]

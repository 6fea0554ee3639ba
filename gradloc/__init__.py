"""gradloc: records where training changes a model, and turns that into masks, blocks and routed execution."""

from gradloc.version import __version__

__all__ = ["__version__"]

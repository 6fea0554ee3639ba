"""Values that every stage shares: frozen, without I/O of their own beyond saving themselves.

A parameter is seen through a `DependencyLayout` as a grid of dependencies; a `CellGrid` groups those
into the cells that are counted; `Moments` are what was counted, and merge; a `MaskSet` says which
dependencies stay; a `BlockPlan` says how what stays runs as blocks.
"""

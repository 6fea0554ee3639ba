"""Every format of a run on disk: ``run.json``, Parquet shards, snapshots.

A run is a directory. `RunDirectoryWriter` makes one and appends a set of shards per window, each complete or absent;
`RunDirectory` reads it, and needs nothing but what the shards say of themselves.
"""

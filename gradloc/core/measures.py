"""Names of the locality measures: what the analyzer computes and reports show."""

LOCALITY_MEASURES = (
    "event_rate",
    "active_fraction",
    "core_fraction",
    "gini",
    "participation",
    "top1_share",
    "overlap",
    "overlap_chance",
    "drift_path_ratio",
    "dead_fraction",
    "grad_rms",
    "weight_norm",
)

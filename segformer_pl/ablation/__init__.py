"""Plan and run ablation studies."""

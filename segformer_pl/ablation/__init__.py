"""Ablation studies: what they compare, what they cost, and how their runs are executed.

A study file (:mod:`.study`) becomes one run folder per variant and seed. The statistics over these
folders are in :mod:`segformer_pl.analysis.ablation`, and the command is ``ablate``.
"""

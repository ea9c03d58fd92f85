"""SegFormer (Xie et al. 2021) for research: ablations, cluster jobs, effective receptive fields.

Importing the package is cheap; networks are in ``segformer_pl.models``, the LightningModule in
``segformer_pl.task``, the LightningDataModule in ``segformer_pl.data``.
"""

__version__ = "0.1.0"

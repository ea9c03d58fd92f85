"""A SegFormer of 5,000 parameters, for tests of commands in which any network will do.

B0's checkpoints have 45 MB, and writing, reading and hashing them takes longer than a training of a
few steps.
"""

import json

TINY_SEGFORMER = {
    "class_path": "segformer_pl.models.SegFormer",
    "init_args": {
        "encoder": {
            "class_path": "segformer_pl.models.MixTransformer",
            "init_args": {
                "embed_dims": [4, 8, 8, 16],
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 2, 2, 4],
                "mlp_ratio": 2,
            },
        },
        "decoder_dim": 16,
    },
}
# The value of --model.network
TINY_OPTION = json.dumps(TINY_SEGFORMER)

"""The thin op layer: schemas, implementations and their choice, fakes, autograd, autocast. The only door to kernels."""

from imm.ops import (  # noqa: F401  (each registers its ops)
    adaln,
    attention,
    energy_score,
    flow_map_mmd,
    flow_step,
    mmd,
    noise,
    registry,
    timestep_embedding,
)

registry.apply_forced()

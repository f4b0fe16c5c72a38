"""The thin op layer: schemas, implementations and their choice, fakes, autograd, autocast. The only door to kernels."""

from imm.ops import adaln, attention, flow_map_mmd, flow_step, mmd, noise, registry, timestep_embedding  # noqa: F401  (each registers its ops)

registry.apply_forced()

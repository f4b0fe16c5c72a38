"""Every op's schema, in one list: whoever comes first, this package or the native library, defines the ops from it.

Shapes: G groups of M particles of D features, of a score N members that learn and M targets; B images of T tokens of C
features. A ``_bwd`` op is the explicit backward of the op of that name, a ``_jvp`` op its results and their tangents; an
overload ``.out`` writes into tensors that the caller keeps, and returns nothing (torch.compile takes no aliases).
"""

_KERNEL = "str kernel, float[] bandwidths, float eps"
_LOSS = f"Tensor scale, Tensor? weight, {_KERNEL}, bool unbiased"
_BRANCHES = "Tensor x_t, Tensor x_r, Tensor g_t, Tensor g_r, Tensor c_skip_t, Tensor c_out_t, Tensor c_skip_r, Tensor c_out_r"
_STEP = "Tensor x, Tensor g, Tensor c_skip, Tensor c_out, Tensor? g_uncond, Tensor? guidance, Tensor? c_noise, "
_STEP += "Tensor? seeds, int step"

SCHEMAS: tuple[str, ...] = (
    f"mmd_loss(Tensor y_t, Tensor y_r, {_LOSS}) -> (Tensor, Tensor)",
    "mmd_loss_bwd(Tensor grad, Tensor slopes, Tensor y_t, Tensor y_r, Tensor? weight, bool unbiased) -> Tensor",
    f"flow_map_mmd({_BRANCHES}, Tensor scale, Tensor? weight, Tensor? upstream, {_KERNEL}, bool unbiased) -> (Tensor, Tensor)",
    "flow_map_mmd_bwd(Tensor grad, Tensor finished, Tensor g_t, Tensor? upstream) -> Tensor",
    "energy_score(Tensor x, Tensor y, Tensor? log_std, Tensor? seed, int draws, Tensor? scale, Tensor? weight, float factor, "
    "float alpha, float? pair_weight, str kernel, float[] bandwidths) -> (Tensor, Tensor)",
    "energy_score_bwd(Tensor grad, Tensor finished, Tensor x) -> Tensor",
    f"mmd_gram(Tensor x, Tensor y, Tensor scale, {_KERNEL}) -> Tensor",
    f"mmd_gram_bwd(Tensor grad, Tensor x, Tensor y, Tensor scale, {_KERNEL}) -> (Tensor, Tensor)",
    f"flow_step({_STEP}) -> Tensor",
    f"flow_step.out({_STEP}, *, Tensor(a!) out) -> ()",
    f"sampling_step({_STEP}, Tensor c_in, int copies) -> (Tensor, Tensor)",
    f"sampling_step.out({_STEP}, Tensor c_in, int copies, *, Tensor(a!) out, Tensor(b!) input) -> ()",
    "flow_step_bwd(Tensor grad, Tensor g, Tensor c_skip, Tensor c_out, Tensor? g_uncond, Tensor? guidance) "
    "-> (Tensor, Tensor, Tensor)",
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
    "adaln_modulate_bwd(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    "gated_residual_adaln(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    "gated_residual_adaln_bwd(Tensor grad_z, Tensor grad_h, Tensor z, Tensor y, Tensor gate, Tensor scale, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "adaln_modulate_jvp(Tensor x, Tensor shift, Tensor scale, float eps, Tensor dx, Tensor dshift, Tensor dscale) "
    "-> (Tensor, Tensor)",
    "gated_residual_adaln_jvp(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps, "
    "Tensor dx, Tensor dy, Tensor dgate, Tensor dshift, Tensor dscale) -> (Tensor, Tensor, Tensor, Tensor)",
    "timestep_attention(Tensor qkv, int heads) -> (Tensor, Tensor)",
    "timestep_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads) -> Tensor",
    "timestep_attention_jvp(Tensor qkv, int heads, Tensor dqkv) -> (Tensor, Tensor, Tensor, Tensor)",
    "timestep_embedding(Tensor t, Tensor s, int dim, float max_period, ScalarType dtype) -> Tensor",
    "timestep_embedding_bwd(Tensor grad, Tensor t, Tensor s, float max_period) -> (Tensor, Tensor)",
    "timestep_embedding_jvp(Tensor t, Tensor s, int dim, float max_period, ScalarType dtype, Tensor dt, Tensor ds) "
    "-> (Tensor, Tensor)",
    "noise(Tensor seeds, SymInt numel, int step, float scale=1.0) -> Tensor",
    "noise.out(Tensor seeds, SymInt numel, int step, float scale=1.0, *, Tensor(a!) out) -> ()",
)

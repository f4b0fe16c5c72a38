"""Every op's schema, in one list: whoever comes first, this package or the native library, defines the ops from it.

Shapes: G groups of M particles of D features; B images. A ``_bwd`` op is the explicit backward of the op of that name;
an overload ``.out`` writes into tensors that the caller keeps, and returns nothing (torch.compile takes no aliases).
"""

SCHEMAS: tuple[str, ...] = (
    "mmd_loss(Tensor y_t, Tensor y_r, Tensor scale, Tensor? weight, str kernel, float eps) -> Tensor",
    "mmd_loss_bwd(Tensor grad, Tensor y_t, Tensor y_r, Tensor scale, Tensor? weight, str kernel, float eps) -> Tensor",
    "mmd_loss_grad(Tensor y_t, Tensor y_r, Tensor scale, Tensor? weight, str kernel, float eps) -> (Tensor, Tensor)",
    "mmd_loss_grad.out(Tensor y_t, Tensor y_r, Tensor scale, Tensor? weight, str kernel, float eps, *, "
    "Tensor(a!) loss, Tensor(b!) grad) -> ()",
    "mmd_gram(Tensor x, Tensor y, Tensor scale, str kernel, float eps) -> Tensor",
    "mmd_gram_bwd(Tensor grad, Tensor x, Tensor y, Tensor scale, str kernel, float eps) -> (Tensor, Tensor)",
    "flow_step(Tensor x, Tensor g, Tensor c_skip, Tensor c_out, Tensor? g_uncond, Tensor? guidance, Tensor? c_noise, "
    "Tensor? seeds, int step) -> Tensor",
    "flow_step.out(Tensor x, Tensor g, Tensor c_skip, Tensor c_out, Tensor? g_uncond, Tensor? guidance, Tensor? c_noise, "
    "Tensor? seeds, int step, *, Tensor(a!) out) -> ()",
    "flow_step_bwd(Tensor grad, Tensor g, Tensor c_skip, Tensor c_out, Tensor? g_uncond, Tensor? guidance) "
    "-> (Tensor, Tensor, Tensor)",
    "noise(Tensor seeds, SymInt numel, int step) -> Tensor",
    "noise.out(Tensor seeds, SymInt numel, int step, *, Tensor(a!) out) -> ()",
)

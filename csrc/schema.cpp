// Schemas of all ops of the extension, once for every device; allnc/ops/ wraps them for autograd and torch.compile.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(allnc_C, m) {
  // features [N, F], labels [N] int64; means [C, F] and seen [C] bool are updated in place
  // -> value [C, F] (a copy of the new means), seen_before [C], counts [C] int64
  m.def(
      "class_mean_ema_forward(Tensor features, Tensor labels, Tensor(a!) means, Tensor(b!) seen, float momentum, "
      "int ignore_index, bool deterministic) -> (Tensor value, Tensor seen_before, Tensor counts)");
  // grad_value [C, F] -> gradient of the features [N, F]
  m.def(
      "class_mean_ema_backward(Tensor grad_value, Tensor labels, Tensor counts, Tensor seen_before, float momentum, "
      "bool straight_through, int ignore_index, ScalarType features_dtype) -> Tensor");
  // z [N, D], mu [C, D], a [N], b [C] -> lse [N]; all of one type, or z bfloat16 and the rest float32. Of `parts`
  // shares of the work only the one numbered `part` is done: the log of the partial sums, -inf where it met nothing;
  // logsumexp over the parts is the whole.
  m.def(
      "hycon_lse_forward(Tensor z, Tensor? mu, Tensor a, Tensor? b, Tensor temperature, bool shifted, int part=0, "
      "int parts=1) -> Tensor");
  // -> gradients of z[:own] [own, D] (-1: of all rows) and of mu by the anchors in z[:own] [C, D] ([0, D] without mu)
  m.def(
      "hycon_lse_backward(Tensor grad_lse, Tensor lse, Tensor z, Tensor? mu, Tensor a, Tensor? b, "
      "Tensor temperature, bool shifted, int own=-1) -> (Tensor, Tensor)");
  // z [N, D] float32, float64 or bfloat16 unit rows, labels [N] int64 in [0, C) or ignore_index (without means: any),
  // means [C, D] of any length, seen [C] bool; T is float64 for float64 z, else float32, and so are the means
  // -> loss [] T, mean over the anchors that have a positive, and what the backward needs:
  // state [3, N + C] T, activations before means: column weights | lse and norms of the means, infinite where a mean is
  // absent or has no direction | 1 / (positives of the anchor, the mean counting mean_weight), 0 for rows that are left
  // out, and the mean's share of the positives;
  // index [N] int64 (class, -1 for none), sums [C, D] T (without means [N, D]), mu [C, D] T unit rows ([0, D]),
  // pull [N and C each rounded up to 48, D rounded up to an odd number of cache lines] T: temperature times the
  // gradient of the anchors' summed lse, activations before means, or [0, .] unless with_gradient; the backward forms
  // it then
  m.def(
      "hycon_loss_forward(Tensor z, Tensor labels, Tensor? means, Tensor? seen, float temperature, float mean_weight, "
      "bool balanced, int ignore_index, bool with_gradient) -> (Tensor loss, Tensor state, Tensor index, Tensor sums, "
      "Tensor mu, Tensor pull)");
  // grad [] T -> gradients of z [N, D] in its type and of the means [C, D] T ([0, D])
  m.def(
      "hycon_loss_backward(Tensor grad, Tensor z, Tensor? means, Tensor state, Tensor index, Tensor sums, Tensor mu, "
      "Tensor pull, float temperature) -> (Tensor dz, Tensor dmeans)");
  // x, y [C, F] of any floating types, seen [C] bool -> u and v [C, F] (v [0] without y) and the factors that brought
  // rows to unit length [1 or 2, C], 0 for rows of zeros; all of `dtype`, float32 or float64
  m.def(
      "centred_unit_forward(Tensor x, Tensor? y, Tensor seen, bool centre_x, bool centre_y, ScalarType dtype) -> "
      "(Tensor u, Tensor v, Tensor scale)");
  m.def(
      "centred_unit_backward(Tensor du, Tensor? dv, Tensor u, Tensor? v, Tensor scale, Tensor seen, "
      "bool centre_x, bool centre_y, ScalarType x_dtype, ScalarType y_dtype) -> (Tensor dx, Tensor dy)");
  // x, y [C, F] unit rows float32 or float64, zero where not seen; blocks: each side with itself (own), x with y
  // (cross)
  // -> values of the blocks [own sides, then cross], and gradients of these values [of own sides, then x and y of
  // cross][C, F], or [., 0, F] unless with_gradient
  m.def(
      "p2p_blocks_forward(Tensor x, Tensor? y, Tensor seen, bool own, bool cross, bool softmax, float temperature, "
      "bool with_gradient) -> (Tensor values, Tensor gradients)");
}

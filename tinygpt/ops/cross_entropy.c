// The output projection and the cross entropy of its logits. The gradients are those of a linear
// layer: see `cross_entropy` in fast.py.
#include "vector.h"
#include "weight.h"
#include "gemm.h"

// log(x) by the series of artanh on a mantissa near 1. The relative error is below 2e-7.
INLINE float logarithm(float x) {
  if (!(x > 0 && x < __builtin_inff())) return x;  // NaN and infinity stay what they are
  union {
    float value;
    unsigned bits;
  } u = {x};
  int exponent = (int)(u.bits - 0x3f3504f3u) >> 23;  // of x / sqrt(1/2)
  u.bits -= (unsigned)exponent << 23;
  float s = (u.value - 1) / (u.value + 1), q = s * s;
  return exponent * 0.69314718f +
         2 * s * (1 + q * (1 / 3.0f + q * (1 / 5.0f + q * (1 / 7.0f + q / 9.0f))));
}

// losses = -log(softmax(x @ weight.T * scale)[target]); errors = softmax - target, the gradient of
// the losses at the logits. A target outside the vocabulary gives a loss of NaN.
static void cross_entropy(float *losses,         // (R,)
                          float *errors,         // (R, V)
                          const float *x,        // (R, C)
                          const WEIGHT *weight,  // (V, C)
                          const float *scale,    // (V,) or absent
                          const int *targets,    // (R,)
                          int core_id, int threads, int R, int C, int V) {
  range rows = share(R, core_id, threads);
  if (rows.first >= rows.last) return;
  gemm_weights(errors + (long)rows.first * V, V, x + (long)rows.first * C, C, 0, weight, C, 1,
               rows.last - rows.first, V, C);
  for (int r = rows.first; r < rows.last; r++) {
    float *p = errors + (long)r * V, top;
    if (scale)
      for (int i = 0; i < V; i++) p[i] *= scale[i];
    int known = (unsigned)targets[r] < (unsigned)V;
    float right = known ? p[targets[r]] : __builtin_nanf("");
    float total = exponentials(p, V, 1, &top), share = 1 / total;
    for (int i = 0; i < V; i++) p[i] *= share;
    if (known) p[targets[r]] -= 1;
    losses[r] = logarithm(total) + top - right;
  }
}

// The nonlinearities of the feed-forward and their slopes; the macro ACTIVATION names the one.
#include "vector.h"

enum { gelu_tanh, gelu, relu };

// The normal distribution's integral up to x, where e is e**(-x * x / 2): erf by Abramowitz and
// Stegun 7.1.26. The absolute error is below 1.5e-7.
INLINE vec normal(vec x, vec e) {
  vec a = select(x < 0.0f, -x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a);
  vec y = -0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f));
  vec tail = t * (0.254829592f + t * y) * e;  // 1 - erf(a)
  return 0.5f * (1.0f + select(x < 0.0f, tail - 1.0f, 1.0f - tail));
}

INLINE vec activate(vec x) {
  switch (ACTIVATION) {
    case gelu_tanh: return x / (1.0f + vexp(x * (-1.5957691f - 0.071354816f * x * x)));
    case gelu: return x * normal(x, vexp(-0.5f * x * x));
    case relu: return select(x > 0.0f, x, splat(0.0f));
  }
}

INLINE vec slope(vec x) {
  vec s, e;
  switch (ACTIVATION) {
    case gelu_tanh:
      s = 1.0f / (1.0f + vexp(x * (-1.5957691f - 0.071354816f * x * x)));
      return s + x * s * (1.0f - s) * (1.5957691f + 0.21406445f * x * x);
    case gelu:
      e = vexp(-0.5f * x * x);
      return normal(x, e) + x * e * 0.39894228f;
    case relu: return select(x > 0.0f, splat(1.0f), splat(0.0f));
  }
}

// y = activate(x)
static void activation(float *y,        // (n,)
                       const float *x,  // (n,)
                       int core_id, int threads, int n) {
  range part = share_steps(n, 8, core_id, threads);
  int i = part.first;
  for (; i + 8 <= part.last; i += 8) store(y + i, activate(load(x + i)));
  if (i < part.last) store_some(y + i, activate(load_some(x + i, part.last - i)), part.last - i);
}

// dx = dy * slope(x)
static void activation_backward(float *dx,        // (n,)
                                const float *dy,  // (n,)
                                const float *x,   // (n,)
                                int core_id, int threads, int n) {
  range part = share_steps(n, 8, core_id, threads);
  int i = part.first, left;
  for (; i + 8 <= part.last; i += 8) store(dx + i, load(dy + i) * slope(load(x + i)));
  if ((left = part.last - i) > 0)
    store_some(dx + i, load_some(dy + i, left) * slope(load_some(x + i, left)), left);
}

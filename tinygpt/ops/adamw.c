// AdamW for one parameter, and the sum of squares by which gradients are clipped.
#include "vector.h"

// totals[core_id] grows by the squares of this thread's share of x.
static void sum_of_squares(float *totals,   // (threads,)
                           const float *x,  // (n,)
                           int core_id, int threads, int n) {
  range part = share(n, core_id, threads);
  vec a = splat(0), b = splat(0);
  int i = part.first;
  for (; i + 16 <= part.last; i += 16) {
    vec p = load(x + i), q = load(x + i + 8);
    a += p * p;
    b += q * q;
  }
  float total = sum(a + b);
  for (; i < part.last; i++) total += x[i] * x[i];
  totals[core_id] += total;
}

enum { RATE, ADAM_RATE, ROOT, CLIP, GOOD };  // what stands in `inputs`: see optimizers.py

// The rests are 1 - beta. Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay
// Regularization", algorithm 2.
static void adamw(float *parameter,       // (n,), as are the next three
                  float *mean,
                  float *square,
                  const float *gradient,
                  const float *inputs,    // (5,)
                  int core_id, int threads, int n, float decay, float beta1, float rest1,
                  float beta2, float rest2) {
  if (inputs[GOOD] == 0) return;
  float kept = 1 - inputs[RATE] * decay, root = 1 / inputs[ROOT];
  range part = share(n, core_id, threads);
  float *restrict p = parameter, *restrict m = mean, *restrict v = square;
  const float *restrict g = gradient;
  for (int i = part.first; i < part.last; i++) {
    float d = g[i] * inputs[CLIP];
    m[i] = beta1 * m[i] + rest1 * d;
    v[i] = beta2 * v[i] + rest2 * (d * d);
    p[i] = p[i] * kept - inputs[ADAM_RATE] * (m[i] / (__builtin_sqrtf(v[i]) * root + 1e-8f));
  }
}

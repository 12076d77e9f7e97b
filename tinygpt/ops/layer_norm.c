// Layer norm and its gradient. Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
#include "vector.h"

// The mean of a row of C numbers, and 1 / their standard deviation.
static void moments(const float *x, int C, float epsilon, float *mean, float *scale) {
  vec total = splat(0), squares = splat(0);
  int i = 0;
  for (; i + 8 <= C; i += 8) total += load(x + i);
  float m = sum(total);
  AT_AN_EDGE for (; i < C; i++) m += x[i];
  m /= C;
  for (i = 0; i + 8 <= C; i += 8) {
    vec d = load(x + i) - m;
    squares += d * d;
  }
  float variance = sum(squares);
  AT_AN_EDGE for (; i < C; i++) variance += (x[i] - m) * (x[i] - m);
  *mean = m, *scale = 1 / __builtin_sqrtf(variance / C + epsilon);
}

// y = (x - mean) / deviation * weight + bias
static void layer_norm(float *y,             // (R, C)
                       const float *x,       // (R, C)
                       const float *weight,  // (C,)
                       const float *bias,    // (C,) or absent
                       int core_id, int threads, int R, int C, float epsilon) {
  range rows = share(R, core_id, threads);
  for (long r = rows.first; r < rows.last; r++) {
    const float *p = x + r * C;
    float *to = y + r * C, mean, scale;
    moments(p, C, epsilon, &mean, &scale);
    int i = 0;
    for (; i + 8 <= C; i += 8) {
      vec v = (load(p + i) - mean) * scale * load(weight + i);
      store(to + i, bias ? v + load(bias + i) : v);
    }
    AT_AN_EDGE for (; i < C; i++) to[i] = (p[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
  }
}

// With n = (x - mean) / deviation and w = dy * weight: dx = (w - mean(w) - n * mean(w * n)) /
// deviation. The gradients of weight and bias are sums over rows, of which each thread writes its
// own part.
static void layer_norm_backward(float *dx,            // (R, C)
                                float *parts,         // (threads, 2, C): of dweight and dbias
                                const float *dy,      // (R, C)
                                const float *x,       // (R, C)
                                const float *weight,  // (C,)
                                int core_id, int threads, int R, int C, float epsilon) {
  range rows = share(R, core_id, threads);
  float *dweight = parts + (long)core_id * 2 * C, *dbias = dweight + C;
  clear(dweight, 2 * C);
  for (long r = rows.first; r < rows.last; r++) {
    const float *p = x + r * C, *d = dy + r * C;
    float *to = dx + r * C, mean, scale;
    moments(p, C, epsilon, &mean, &scale);
    vec a = splat(0), b = splat(0);
    int i = 0;
    for (; i + 8 <= C; i += 8) {
      vec g = load(d + i), n = (load(p + i) - mean) * scale, w = g * load(weight + i);
      a += w;
      b += w * n;
      store(dweight + i, load(dweight + i) + g * n);
      store(dbias + i, load(dbias + i) + g);
    }
    float middle = sum(a), slope = sum(b);
    for (; i < C; i++) {
      float n = (p[i] - mean) * scale, w = d[i] * weight[i];
      middle += w, slope += w * n;
      dweight[i] += d[i] * n, dbias[i] += d[i];
    }
    middle /= C, slope /= C;
    for (i = 0; i + 8 <= C; i += 8) {
      vec n = (load(p + i) - mean) * scale;
      store(to + i, (load(d + i) * load(weight + i) - middle - n * slope) * scale);
    }
    for (; i < C; i++)
      to[i] = (d[i] * weight[i] - middle - (p[i] - mean) * scale * slope) * scale;
  }
}

// Training's fast CPU forms, put behind kernels.c and made of its parts: see fused.py, whose macros
// say which one this is and how large. A thread takes whole texts (or rows) forward and backward,
// so that threads meet once only: before the weights' gradients, which are sums over all texts.

#define FREE __attribute__((no_builtin))  // no libc: a loop must not become a call of memset

#ifdef EPSILON
enum { STRIP = 11 * ROWS };  // rows of attention at a time, which skips most of what is masked

// stats: mean and 1 / deviation of each row. C is a multiple of 8 throughout.
static void normalise(float *y, const float *x, const float *weight, const float *bias,
                      float *stats, int rows) {
  for (int m = 0; m < rows; m++, x += C, y += C, stats += 2) {
    vec total = splat(0), squares = splat(0);
    for (int i = 0; i < C; i += 8) total += load(x + i);
    float mean = stats[0] = sum(total) / C;
    for (int i = 0; i < C; i += 8) {
      vec d = load(x + i) - mean;
      squares += d * d;
    }
    float scale = stats[1] = 1 / __builtin_sqrtf(sum(squares) / C + EPSILON);
    for (int i = 0; i < C; i += 8)
      store(y + i,
            (load(x + i) - mean) * scale * load(weight + i) + (bias ? load(bias + i) : splat(0)));
  }
}

// dx (+)= the gradient at x; dweight and dbias grow by this thread's part.
static void unnormalise(float *dx, int add, const float *dy, const float *x, const float *weight,
                        const float *stats, float *dweight, float *dbias, int rows) {
  for (int m = 0; m < rows; m++, x += C, dx += C, dy += C, stats += 2) {
    vec a = splat(0), b = splat(0);
    for (int i = 0; i < C; i += 8) {
      vec g = load(dy + i), y = (load(x + i) - stats[0]) * stats[1], w = g * load(weight + i);
      a += w;
      b += w * y;
      store(dweight + i, load(dweight + i) + g * y);
      store(dbias + i, load(dbias + i) + g);
    }
    float mean = sum(a) / C, slope = sum(b) / C;
    for (int i = 0; i < C; i += 8) {
      vec y = (load(x + i) - stats[0]) * stats[1];
      vec d = (load(dy + i) * load(weight + i) - mean - y * slope) * stats[1];
      store(dx + i, add ? load(dx + i) + d : d);
    }
  }
}

// The threads' parts of a norm's gradients, `stride` apart, added up; [n0, n1) of them.
static void gather(float *to, const float *parts, long stride, int n0, int n1) {
  for (int i = n0; i < n1; i++) {
    float total = 0;
    for (int thread = 0; thread < THREADS; thread++) total += parts[thread * stride + i];
    to[i] = total;
  }
}

FREE static void clear(float *p, long n) {
  for (long i = 0; i < n; i++) p[i] = 0;
}

// y = a @ w.T + bias + residual, for rows of N out of K; residual's rows are N apart.
static void affine(float *y, long ldy, const float *a, const float *w, const float *bias,
                   const float *residual, int rows, int N, int K) {
  product(y, ldy, a, K, 0, w, K, 1, rows, N, K);
  if (bias)
    for (int m = 0; m < rows; m++)
      for (int n = 0; n < N; n++) y[m * ldy + n] += bias[n];
  if (residual)
    for (int m = 0; m < rows; m++)
      for (int n = 0; n < N; n++) y[m * ldy + n] += residual[(long)m * N + n];
}

// Rows n0 to n1 of dw = dy.T @ x, and those of the bias; dy's rows are ldy apart, x's K.
static void affine_gradient(float *dw, float *dbias, const float *dy, long ldy, const float *x,
                            int rows, int n0, int n1, int K) {
  product(dw + (long)n0 * K, K, dy + n0, ldy, 1, x, K, 0, n1 - n0, K, rows);
  if (!dbias) return;
  for (int n = n0; n < n1; n++) dbias[n] = 0;
  for (int m = 0; m < rows; m++)
    for (int n = n0; n < n1; n++) dbias[n] += dy[m * ldy + n];
}
#endif

#if defined(FORWARD) || defined(BACKWARD)
// ---- a transformer block: what it keeps for the way back, in the order of `saved` ----

enum { R = B * T, C3 = 3 * C };
#define KEPT(p)                                                                                    \
  CONST float *in = p, *qkv = in + (long)R * C, *probs = qkv + (long)R * C3,                       \
              *y = probs + (long)B * H * T * T, *sum_1 = y + (long)R * C,                          \
              *mid = sum_1 + (long)R * C, *wide = mid + (long)R * C, *active = wide + (long)R * F, \
              *sum_2 = active + (long)R * F, *stats_1 = sum_2 + (long)R * C,                       \
              *stats_2 = stats_1 + 2 * R
#endif

#ifdef FORWARD
#define CONST
FREE static void softmax(float *p, int last, int end) {
  float top, share = 1 / exponentials(p, last, SCALE, &top);
  for (int i = 0; i < last; i++) p[i] *= share;
  for (int i = last; i < end; i++) p[i] = 0;
}

static void attend(float *y, float *p, const float *q, const float *k, const float *v) {
  for (int t0 = 0; t0 < T; t0 += STRIP) {
    int rows = MIN(STRIP, T - t0), end = t0 + rows;
    float *strip = p + (long)t0 * T;
    product(strip, T, q + (long)t0 * C3, C3, 0, k, C3, 1, rows, end, D);
    for (int i = 0; i < rows; i++) softmax(strip + (long)i * T, t0 + i + 1, end);
    product(y + (long)t0 * C, C, strip, T, 0, v, C3, 0, rows, D, end);
  }
}

// `in` is x's norm, and kept if there is one in front; `mid` is what the feed-forward reads.
ENTRY {
  KEPT(saved);
  int b0 = (long)B * core_id / THREADS, b1 = (long)B * (core_id + 1) / THREADS, r = b0 * T,
      n = (b1 - b0) * T;
  const float *from = x + (long)r * C;
  if (PRE_NORM) {
    normalise(in + (long)r * C, from, ln_1_weight, ln_1_bias, stats_1 + 2 * r, n);
    from = in + (long)r * C;
  }
  float *q = qkv + (long)r * C3;
  affine(q, C3, from, attn_q_proj_weight, attn_q_proj_bias, 0, n, C, C);
  affine(q + C, C3, from, attn_k_proj_weight, attn_k_proj_bias, 0, n, C, C);
  affine(q + 2 * C, C3, from, attn_v_proj_weight, attn_v_proj_bias, 0, n, C, C);
  for (int b = b0; b < b1; b++)
    for (int h = 0; h < H; h++) {
      const float *head = qkv + (long)b * T * C3 + h * D;
      attend(y + (long)b * T * C + h * D, probs + ((long)b * H + h) * T * T, head, head + C,
             head + 2 * C);
    }
  float *s = PRE_NORM ? mid + (long)r * C : sum_1 + (long)r * C,
        *hidden = PRE_NORM ? sum_1 + (long)r * C : mid + (long)r * C;
  // Before the norm, s; behind it, hidden, which the feed-forward reads. The shortcut is either.
  affine(s, C, y + (long)r * C, attn_out_proj_weight, attn_out_proj_bias,
         SHORTCUT ? x + (long)r * C : 0, n, C, C);
  normalise(hidden, s, PRE_NORM ? ln_2_weight : ln_1_weight, PRE_NORM ? ln_2_bias : ln_1_bias,
            (PRE_NORM ? stats_2 : stats_1) + 2 * r, n);
  affine(wide + (long)r * F, F, hidden, mlp_c_fc_weight, mlp_c_fc_bias, 0, n, F, C);
  for (long i = (long)r * F; i < (long)(r + n) * F; i += 8)
    store(active + i, activate(load(wide + i)));
  float *last = PRE_NORM ? out + (long)r * C : sum_2 + (long)r * C;
  affine(last, C, active + (long)r * F, mlp_c_proj_weight, mlp_c_proj_bias,
         SHORTCUT ? (PRE_NORM ? s : hidden) : 0, n, C, F);
  if (!PRE_NORM) normalise(out + (long)r * C, last, ln_2_weight, ln_2_bias, stats_2 + 2 * r, n);
}
#endif

#ifdef BACKWARD
#define CONST const
INLINE vec slope(vec x) {
#if ACTIVATION == 1
  vec s = 1.0f / (1.0f + vexp(x * (-1.5957691f - 0.071354816f * x * x)));
  return s + x * s * (1.0f - s) * (1.5957691f + 0.21406445f * x * x);
#elif ACTIVATION == 2
  vec e = vexp(-0.5f * x * x);
  return normal(x, e) + x * e * 0.39894228f;
#else
  return select(x > 0.0f, splat(1.0f), splat(0.0f));
#endif
}

// One head of one text: the gradients at q, k and v from that at y. ds is room for T * T.
static void unattend(float *dq, float *dk, float *dv, float *ds, const float *dy, const float *p,
                     const float *q, const float *k, const float *v) {
  for (int t0 = 0; t0 < T; t0 += STRIP) {
    int rows = MIN(STRIP, T - t0), end = t0 + rows;
    float *strip = ds + (long)t0 * T;
    product(strip, T, dy + (long)t0 * C, C, 0, v, C3, 1, rows, end, D);
    for (int i = 0; i < rows; i++) {
      float *d = strip + (long)i * T;
      const float *w = p + (long)(t0 + i) * T;
      vec totals = splat(0);
      int j = 0;
      for (; j + 8 <= end; j += 8) totals += load(d + j) * load(w + j);
      float total = sum(totals);
      for (; j < end; j++) total += d[j] * w[j];
      for (j = 0; j < end; j++) d[j] = w[j] * (d[j] - total) * SCALE;
    }
    product(dq + (long)t0 * C3, C3, strip, T, 0, k, C3, 0, rows, D, end);
  }
  for (int t0 = 0; t0 < T; t0 += STRIP) {
    int rows = MIN(STRIP, T - t0);
    long at = (long)t0 * T + t0;
    product(dv + (long)t0 * C3, C3, p + at, T, 1, dy + (long)t0 * C, C, 0, rows, D, T - t0);
    product(dk + (long)t0 * C3, C3, ds + at, T, 1, q + (long)t0 * C3, C3, 0, rows, D, T - t0);
  }
}

// scratch: gradients at sum_2 (post-norm), wide, mid, sum_1 and qkv, one more of C, then each
// thread's T * T for attention and its part of the norms' gradients.
ENTRY {
  KEPT(saved);
  (void)sum_2;
  int b0 = (long)B * core_id / THREADS, b1 = (long)B * (core_id + 1) / THREADS, r = b0 * T,
      n = (b1 - b0) * T;
  long rc = (long)r * C, rf = (long)r * F;
  float *dsum_2 = scratch, *dwide = dsum_2 + (long)R * C, *dmid = dwide + (long)R * F,
        *dsum_1 = dmid + (long)R * C;
  float *dqkv = dsum_1 + (long)R * C, *spare = dqkv + (long)R * C3, *ds = spare + (long)R * C,
        *parts = ds + (long)THREADS * T * T;
  float *mine = parts + (long)core_id * 4 * C;
  const float *hidden = PRE_NORM ? sum_1 : mid;
  const float *at_sum_2 = dout;
  clear(mine, 4 * C);
  if (!PRE_NORM) {
    unnormalise(dsum_2 + rc, 0, dout + rc, sum_2 + rc, ln_2_weight, stats_2 + 2 * r, mine + 2 * C,
                mine + 3 * C, n);
    at_sum_2 = dsum_2;
  }
  product(dwide + rf, F, at_sum_2 + rc, C, 0, mlp_c_proj_weight, F, 0, n, F, C);
  for (long i = rf; i < rf + (long)n * F; i += 8)
    store(dwide + i, load(dwide + i) * slope(load(wide + i)));
  product(dmid + rc, C, dwide + rf, F, 0, mlp_c_fc_weight, C, 0, n, C, F);
  if (PRE_NORM) {  // the norm lies behind the shortcut
    for (long i = rc; i < rc + (long)n * C; i++) dsum_1[i] = SHORTCUT ? dout[i] : 0;
    unnormalise(dsum_1 + rc, 1, dmid + rc, mid + rc, ln_2_weight, stats_2 + 2 * r, mine + 2 * C,
                mine + 3 * C, n);
  } else {
    if (SHORTCUT)
      for (long i = rc; i < rc + (long)n * C; i++) dmid[i] += dsum_2[i];
    unnormalise(dsum_1 + rc, 0, dmid + rc, sum_1 + rc, ln_1_weight, stats_1 + 2 * r, mine, mine + C,
                n);
  }
  product(spare + rc, C, dsum_1 + rc, C, 0, attn_out_proj_weight, C, 0, n, C, C);
  for (int b = b0; b < b1; b++)
    for (int h = 0; h < H; h++) {
      long at = (long)b * T * C3 + h * D;
      const float *q = qkv + at;
      float *dq = dqkv + at;
      unattend(dq, dq + C, dq + 2 * C, ds + (long)core_id * T * T, spare + (long)b * T * C + h * D,
               probs + ((long)b * H + h) * T * T, q, q + C, q + 2 * C);
    }
  float *din = PRE_NORM ? dmid : dx;  // at the norm's output or at x itself
  const float *weights[3] = {attn_q_proj_weight, attn_k_proj_weight, attn_v_proj_weight};
  product(din + rc, C, dqkv + (long)r * C3, C3, 0, weights[0], C, 0, n, C, C);
  for (int i = 1; i < 3; i++) {
    product(spare + rc, C, dqkv + (long)r * C3 + i * C, C3, 0, weights[i], C, 0, n, C, C);
    for (long j = rc; j < rc + (long)n * C; j++) din[j] += spare[j];
  }
  if (PRE_NORM) {
    for (long i = rc; i < rc + (long)n * C; i++) dx[i] = SHORTCUT ? dsum_1[i] : 0;
    unnormalise(dx + rc, 1, dmid + rc, x + rc, ln_1_weight, stats_1 + 2 * r, mine, mine + C, n);
  } else if (SHORTCUT)
    for (long i = rc; i < rc + (long)n * C; i++) dx[i] += dsum_1[i];
  barrier(sync);
  const float *from = PRE_NORM ? in : x;
  affine_gradient(d_attn_q_proj_weight, d_attn_q_proj_bias, dqkv, C3, from, R, SHARE(C), C);
  affine_gradient(d_attn_k_proj_weight, d_attn_k_proj_bias, dqkv + C, C3, from, R, SHARE(C), C);
  affine_gradient(d_attn_v_proj_weight, d_attn_v_proj_bias, dqkv + 2 * C, C3, from, R, SHARE(C), C);
  affine_gradient(d_attn_out_proj_weight, d_attn_out_proj_bias, dsum_1, C, y, R, SHARE(C), C);
  affine_gradient(d_mlp_c_fc_weight, d_mlp_c_fc_bias, dwide, F, hidden, R, SHARE(F), C);
  affine_gradient(d_mlp_c_proj_weight, d_mlp_c_proj_bias, at_sum_2, C, active, R, SHARE(C), F);
  gather(d_ln_1_weight, parts, 4 * C, SHARE(C));
  gather(d_ln_2_weight, parts + 2 * C, 4 * C, SHARE(C));
  if (d_ln_1_bias) gather(d_ln_1_bias, parts + C, 4 * C, SHARE(C));
  if (d_ln_2_bias) gather(d_ln_2_bias, parts + 3 * C, 4 * C, SHARE(C));
}
#endif

#ifdef HEAD
// log(x) by the series of artanh on a mantissa near 1: relative error below 2e-7.
INLINE float logarithm(float x) {
  if (!(x > 0 && x < __builtin_inff())) return x;  // NaN and infinity stay what they are
  union {
    float value;
    int bits;
  } u = {x};
  int exponent = (u.bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  u.bits -= exponent << 23;
  float s = (u.value - 1) / (u.value + 1), q = s * s;
  return exponent * 0.69314718f +
         2 * s * (1 + q * (1 / 3.0f + q * (1 / 5.0f + q * (1 / 7.0f + q / 9.0f))));
}

// ---- last norm (if NORM), output projection, cross entropy; errors: softmax - target ----

ENTRY {
  float *normed = saved, *stats = normed + (long)R * C, *errors = stats + 2 * R;
  int r = (long)R * core_id / THREADS, n = (int)((long)R * (core_id + 1) / THREADS) - r;
  const float *from = x + (long)r * C;
  if (NORM) {
    normalise(normed + (long)r * C, from, ln_weight, ln_bias, stats + 2 * r, n);
    from = normed + (long)r * C;
  }
  product(errors + (long)r * V, V, from, C, 0, weight, C, 1, n, V, C);
  for (int m = r; m < r + n; m++) {
    int known = (unsigned)targets[m] < V;  // a loss of NaN, not a fault, where it is not
    float *p = errors + (long)m * V, right = known ? p[targets[m]] : __builtin_nanf("");
    float top, total = exponentials(p, V, 1, &top), share = 1 / total;
    for (int i = 0; i < V; i++) p[i] *= share;
    if (known) p[targets[m]] -= 1;
    out[m] = logarithm(total) + top - right;
  }
}
#endif

#ifdef UNHEAD
ENTRY {
  const float *normed = saved, *stats = normed + (long)R * C, *errors = stats + 2 * R;
  float *d = scratch, *dnormed = d + (long)R * V, *parts = dnormed + (long)R * C,
        *mine = parts + (long)core_id * 2 * C;
  int r = (long)R * core_id / THREADS, n = (int)((long)R * (core_id + 1) / THREADS) - r;
  for (int m = r; m < r + n; m++)
    for (int i = 0; i < V; i++) d[(long)m * V + i] = errors[(long)m * V + i] * dout[m];
  float *to = NORM ? dnormed : dx;
  product(to + (long)r * C, C, d + (long)r * V, V, 0, weight, C, 0, n, C, V);
  if (NORM) {
    clear(mine, 2 * C);
    unnormalise(dx + (long)r * C, 0, dnormed + (long)r * C, x + (long)r * C, ln_weight,
                stats + 2 * r, mine, mine + C, n);
  }
  barrier(sync);
  int n0 = C / 8 * core_id / THREADS * 8, n1 = C / 8 * (core_id + 1) / THREADS * 8;
  product(d_weight + n0, C, d, V, 1, (NORM ? normed : x) + n0, C, 0, V, n1 - n0, R);
  if (NORM) gather(d_ln_weight, parts, 2 * C, n0, n1);
  if (NORM && d_ln_bias) gather(d_ln_bias, parts + C, 2 * C, n0, n1);
}
#endif

#ifdef EMBED
// ---- rows of tables: out[b][t] = tokens_weight[ids[b][t]] + places_weight[t]; NaN for no id ----

FREE ENTRY {
  for (long m = 0; m < B * T; m++)
    for (int i = 0; i < C; i++) {
      float x = (unsigned)ids[m] < V ? tokens_weight[(long)ids[m] * C + i] : __builtin_nanf("");
      out[m * C + i] = x + (places_weight ? places_weight[m % T * C + i] : 0);
    }
}
#endif

#ifdef UNEMBED
FREE ENTRY {
  for (long i = 0; i < (long)V * C; i++) d_tokens[i] = 0;
  if (d_places)
    for (long i = 0; i < (long)WINDOW * C; i++) d_places[i] = 0;
  for (long m = 0; m < B * T; m++)
    for (int i = 0; i < C; i++) {
      float d = dout[m * C + i];
      if ((unsigned)ids[m] < V) d_tokens[(long)ids[m] * C + i] += d;
      if (d_places) d_places[m % T * C + i] += d;
    }
}
#endif

#ifdef SQUARES
// ---- the sum of squares over all gradients, a part for each thread ----

ENTRY {
  const float *const tensors[] = {GRADIENTS};
  const long sizes[] = {SIZES};
  float total = 0;
  for (int j = 0; j < COUNT; j++) {
    long i = sizes[j] * core_id / THREADS, end = sizes[j] * (core_id + 1) / THREADS;
    vec a = splat(0), b = splat(0);
    for (; i + 16 <= end; i += 16) {
      vec x = load(tensors[j] + i), y = load(tensors[j] + i + 8);
      a += x * x;
      b += y * y;
    }
    float part = sum(a + b);
    for (; i < end; i++) part += tensors[j][i] * tensors[j][i];
    total += part;
  }
  out[core_id] = total;
}
#endif

#ifdef ADAMW
// ---- AdamW on all parameters; numbers: rate, adam_rate, root, clip, and whether to do it ----

ENTRY {
  float *const parameters[] = {PARAMETERS}, *const means[] = {MEANS},
               *const squares[] = {SQUARE_MEANS};
  const float *const gradients[] = {GRADIENTS};
  const long sizes[] = {SIZES};
  const float decays[] = {DECAYS};
  float rate = numbers[0], adam_rate = numbers[1], root = 1 / numbers[2], clip = numbers[3];
  if (numbers[4] == 0) return;
  for (int j = 0; j < COUNT; j++) {
    float *restrict p = parameters[j], *restrict mean = means[j], *restrict square = squares[j];
    const float *restrict gradient = gradients[j];
    long end = sizes[j] * (core_id + 1) / THREADS;
    float kept = 1 - rate * decays[j];
    for (long i = sizes[j] * core_id / THREADS; i < end; i++) {
      float g = gradient[i] * clip;
      float m = mean[i] = BETA1 * mean[i] + REST1 * g;
      float v = square[i] = BETA2 * square[i] + REST2 * (g * g);
      p[i] = p[i] * kept - adam_rate * (m / (__builtin_sqrtf(v) * root + 1e-8f));
    }
  }
}
#endif

// The forward pass of a GPT that generates: B rows of T new tokens, all threads in step, no
// gradients. reading.py puts macros in front, and kernels.c.

// BAND: of so many rows at a time the scores stay in the second cache.
enum { C = H * D, R = B * T, BAND = 96 };

// A block's weights, in the order of _layer_names in reading.py; what it lacks is 0.
struct linear {
  const WEIGHT *weight;
  const float *bias, *scale;
};
struct layer {
  const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
  struct linear q_proj, k_proj, v_proj, out_proj, c_fc, c_proj;
  float *keys, *values, attention_scale;
};

// Columns n0 to n1 of a linear layer on M rows: c = activation(a @ w.T * scale + bias) + residual.
INLINE void linear_rows(int M, float *c, long ldc, const float *a, const struct linear *l,
                        const float *residual, int n0, int n1, int K, int active) {
  const WEIGHT *w = l->weight;
  const float *scale = l->scale, *bias = l->bias;
  if (M > 8) product_weights(c + n0, ldc, a, K, 0, w + (long)n0 * K, K, 1, M, n1 - n0, K);
  else few(c, ldc, a, w, M, n0, n1, K);
  for (int m = 0; m < M; m++)
    for (int n = n0; n < n1; n += 8) {
      float edge[8], *p = c + m * ldc + n;
      int whole = n + 8 <= n1;
      vec x, s = splat(1), b = splat(0), r = splat(0);
      if (whole) {
        x = load(p);
        if (scale) s = load(scale + n);
        if (bias) b = load(bias + n);
        if (residual) r = load(residual + m * ldc + n);
      } else
        for (int i = 0; i < 8; i++) {
          int j = MIN(i, n1 - n - 1);
          x[i] = p[j];
          if (scale) s[i] = scale[n + j];
          if (bias) b[i] = bias[n + j];
          if (residual) r[i] = residual[m * ldc + n + j];
        }
      x = x * s + b;
      x = (active ? activate(x) : x) + r;
      if (whole) store(p, x);
      else
        for (int i = 0; i < n1 - n; i++) p[i] = x[i];
    }
}

// The same for a number of rows that the compiler does not know, R or B: one text of it for all
// calls.
static __attribute__((noinline)) void linear(int M, float *c, long ldc, const float *a,
                                             const struct linear *l, const float *residual, int n0,
                                             int n1, int K, int active) {
  if (R == B || M == R) linear_rows(R, c, ldc, a, l, residual, n0, n1, K, active);
  else linear_rows(B, c, ldc, a, l, residual, n0, n1, K, active);
}

static void norm_row(float *y, const float *p, const float *weight, const float *bias) {
  vec total = splat(0), squares = splat(0);
  float mean = 0, variance = 0;
  int i = 0;
  for (; i + 8 <= C; i += 8) total += load(p + i);
  for (mean = sum(total); i < C; i++) mean += p[i];
  mean /= C;
  for (i = 0; i + 8 <= C; i += 8) {
    vec d = load(p + i) - mean;
    squares += d * d;
  }
  for (variance = sum(squares); i < C; i++) variance += (p[i] - mean) * (p[i] - mean);
  float scale = 1 / __builtin_sqrtf(variance / C + EPSILON);
  for (i = 0; i < C; i++) y[i] = (p[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

static void norm(int M, float *y, const float *x, const float *weight, const float *bias,
                 int core_id) {
  for (int m = M * core_id / THREADS; m < M * (core_id + 1) / THREADS; m++)
    norm_row(y + (long)m * C, x + (long)m * C, weight, bias);
}

// Turns scores p[first..last) into probabilities, and what lies around them in p[0..end) into
// zeros.
static __attribute__((noinline, no_builtin)) void softmax(float *p, float scale, int first,
                                                          int last, int end) {
  float top, share = 1 / exponentials(p + first, last - first, scale, &top);
  for (int i = 0; i < first; i++) p[i] = 0;
  for (int i = first; i < last; i++) p[i] *= share;
  for (int i = last; i < end; i++) p[i] = 0;
}

INLINE float dot(const float *a, const float *b, int n) {
  vec total = splat(0);
  int i = 0;
  for (; i + 8 <= n; i += 8) total += load(a + i) * load(b + i);
  float s = sum(total);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

// y = the sum over s in [first, last) of p[s] * values[s], for 8 * W of D columns.
INLINE void mix(float *y, const float *p, const float *values, int first, int last, int W) {
  vec acc[8];
  UNROLLED(i, 8) acc[i] = splat(0);
  for (int s = first; s < last; s++)
    UNROLLED(i, 8)
      if (i < W) acc[i] += p[s] * load(values + (long)s * D + i * 8);
  UNROLLED(i, 8)
    if (i < W) store(y + i * 8, acc[i]);
}

// One head of one text: y, q (M rows, C apart); its keys and values (S, D); where the text begins.
INLINE void attend(int M, float *y, const float *q, const float *keys, const float *values,
                   float *scores, float scale, int text, int start) {
  if (M > 8)
    for (int t0 = 0; t0 < M; t0 += BAND) {
      int rows = MIN(BAND, M - t0), end = start + t0 + rows;
      product(scores, S, q + t0 * C, C, 0, keys, D, 1, rows, end, D);
      for (int t = t0; t < t0 + rows; t++)
        softmax(scores + (long)(t - t0) * S, scale, MIN(text, start + t), start + t + 1, end);
      product(y + t0 * C, C, scores, S, 0, values, D, 0, rows, D, end);
    }
  else
    for (int t = 0; t < M; t++) {
      int first = MIN(text, start + t), last = start + t + 1, d = 0;
      for (int s = first; s < last; s++) scores[s] = dot(q + t * C, keys + (long)s * D, D);
      softmax(scores, scale, first, last, last);
      for (; d + 64 <= D; d += 64) mix(y + t * C + d, scores, values + d, first, last, 8);
      for (; d + 8 <= D; d += 8) mix(y + t * C + d, scores, values + d, first, last, 1);
      for (; d < D; d++) {
        float total = 0;
        for (int s = first; s < last; s++) total += scores[s] * values[(long)s * D + d];
        y[t * C + d] = total;
      }
    }
}

// One block, and of each text's T rows all, or only the keys, the values and the row `only`. out
// may be x, which is read for the last time before out is written. Every thread has `scores` of its
// own, T rows of S.
INLINE void block(int rows, int only, float *out, const float *x, const struct layer *l,
                  const int *padding, float *scratch, float *scores, int *sync, int core_id,
                  int start) {
  float *h = scratch, *q = h + R * C, *k = q + R * C, *v = k + R * C, *y = v + R * C,
        *mid = y + R * C, *inner = mid + R * C;
  const float *in = x;
  int M = B * rows;
  if (PRE_NORM) {
    norm(R, h, x, l->ln_1_weight, l->ln_1_bias, core_id);
    barrier(sync);
    in = h;
  }
  int h0 = H * core_id / THREADS, h1 = H * (core_id + 1) / THREADS;
  linear(R, k, C, in, &l->k_proj, 0, h0 * D, h1 * D, C, 0);
  linear(R, v, C, in, &l->v_proj, 0, h0 * D, h1 * D, C, 0);
  for (int b = 0; b < B; b++)
    for (int i = h0; i < h1; i++)
      for (int t = 0; t < T; t++)
        for (int d = 0; d < D; d++) {
          long cache = (((long)b * H + i) * S + start + t) * D + d,
               at = ((long)b * T + t) * C + i * D + d;
          l->keys[cache] = k[at];
          l->values[cache] = v[at];
        }
  if (rows < T) {  // then there is room behind q and y
    if (only < 0) return;
    float *some_in = y + M * C, *some_x = q + M * C;
    for (int b = B * core_id / THREADS; b < B * (core_id + 1) / THREADS; b++)
      for (int i = 0; i < C; i++) {
        some_in[b * C + i] = in[((long)b * T + only) * C + i];
        some_x[b * C + i] = x[((long)b * T + only) * C + i];
      }
    barrier(sync);
    in = some_in, x = some_x, start += only;
  }
  linear(M, q, C, in, &l->q_proj, 0, h0 * D, h1 * D, C, 0);
  for (int b = 0; b < B; b++)
    for (int i = h0; i < h1; i++) {
      long cache = ((long)b * H + i) * S * D, at = (long)b * rows * C + i * D;
      attend(rows, y + at, q + at, l->keys + cache, l->values + cache, scores, l->attention_scale,
             padding ? padding[b] : 0, start);
    }
  barrier(sync);
  float *sum_1 = PRE_NORM ? mid : h;
  linear(M, sum_1, C, y, &l->out_proj, SHORTCUT ? x : 0, SHARE(C), C, 0);
  barrier(sync);
  if (PRE_NORM) norm(M, h, mid, l->ln_2_weight, l->ln_2_bias, core_id);
  else norm(M, mid, h, l->ln_1_weight, l->ln_1_bias, core_id);
  barrier(sync);
  linear(M, inner, F, PRE_NORM ? h : mid, &l->c_fc, 0, SHARE(F), C, 1);
  barrier(sync);
  linear(M, PRE_NORM ? out : h, C, inner, &l->c_proj, SHORTCUT ? mid : 0, SHARE(C), F, 0);
  barrier(sync);
  if (!PRE_NORM) {
    norm(M, out, h, l->ln_2_weight, l->ln_2_bias, core_id);
    barrier(sync);
  }
}

// x = a token's row of the table + its position's; an id outside the table is as its first or last.
static void embed(float *x, const int *tokens, const struct linear *table, const float *positions,
                  int core_id) {
  for (int m = R * core_id / THREADS; m < R * (core_id + 1) / THREADS; m++) {
    long token = MAX(0, MIN(tokens[m], VOCABULARY - 1)), places = POSITION_ROWS == T ? m % T : m;
    float scale = table->scale ? table->scale[token] : 1;
    for (int i = 0; i < C; i++)
      x[(long)m * C + i] = widen1(table->weight + token * C + i) * scale +
                           positions[places * C + i];
  }
}

ENTRY {
  const struct layer layers[] = {LAYERS};
  const struct linear table = {TABLE}, head = {HEAD};
  float *scores = scratch + (long)R * (6 * C + F) + (long)core_id * T * S, *ends = scratch;
  if (tokens) {
    embed(out, tokens, &table, positions, core_id);
    barrier(sync);
  }
  // `cut`: nobody reads the last block's other rows.
  int count = sizeof layers / sizeof *layers, cut = LAST && T > 1;
  for (int i = 0; i < count - cut; i++)
    block(T, 0, out, i || tokens ? out : x, layers + i, padding, scratch, scores, sync, core_id,
          start_pos);
  if (cut)
    block(1, end ? *end : -1, out, count > 1 || tokens ? out : x, layers + count - 1, padding,
          scratch, scores, sync, core_id, start_pos);
  if (!logits) return;
  for (int b = B * core_id / THREADS; b < B * (core_id + 1) / THREADS; b++) {
    const float *row = out + (long)b * C;
    if (ln_f_weight) norm_row(ends + b * C, row, ln_f_weight, ln_f_bias);
    else
      for (int i = 0; i < C; i++) ends[b * C + i] = row[i];
  }
  barrier(sync);
  linear(B, logits, VOCABULARY, ends, &head, 0, SHARE(VOCABULARY), C, 0);
}

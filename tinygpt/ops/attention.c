// Causal attention, its gradient, and its form with a cache of keys and values. Source: Vaswani et
// al. 2017, "Attention Is All You Need", section 3.2.
//
// In q, k, v and y, (B, T, C), the n_head (or H) heads lie beside each other: head h has columns
// h * D to (h + 1) * D. Each thread takes whole heads of whole texts.
#include "vector.h"
#include "gemm.h"
#include "dropout.h"

// So many rows of scores at a time. Most of what the mask hides is never computed, and the scores
// stay in the second cache.
enum { STRIP = 11 * ROWS, BAND = 96 };

// Makes probabilities of the scores p[0..last), and zeros of p[last..end).
FREE static void softmax(float *p, float scale, int last, int end) {
  float top, share = 1 / exponentials(p, last, scale, &top);
  for (int i = 0; i < last; i++) p[i] *= share;
  for (int i = last; i < end; i++) p[i] = 0;
}

// What is common to all masks of one head.
typedef struct {
  dropout_key keys;
  unsigned first, threshold;  // the number of the head's first weight; see `kept`
  float scale;
} head_dropout;

INLINE head_dropout dropout_of(const unsigned *key, int head, int T, int place, unsigned threshold,
                               float scale, int n_head) {
  unsigned row = key[2] + head / n_head * (key[3] - 1);
  unsigned first = (row * (unsigned)n_head + head) * (unsigned)T * (unsigned)T;
  return (head_dropout){dropout_keys(key, place), first, threshold, scale};
}

// to = from with dropout, for `end` weights of query t.
INLINE void drop(float *to, const float *from, const head_dropout *d, int t, int T, int end) {
  unsigned index = d->first + (unsigned)t * (unsigned)T;
  for (int s = 0; s < end; s += 8) {
    int left = end - s;
    vec p = (left >= 8 ? load(from + s) : load_some(from + s, left)) * d->scale;
    p = (vec)((ivec)p & kept(d->keys, index + s, d->threshold));
    if (left >= 8) store(to + s, p);
    else store_some(to + s, p, left);
  }
}

// y = softmax(mask(q @ k.T * scale)) @ v, for texts that stand alone
static void attention(float *y,             // (B, T, C)
                      float *probs,         // (B, H, T, T): the weights, before dropout
                      float *scratch,       // (threads, STRIP, T)
                      const float *q,       // (B, T, C), as are the next two
                      const float *k,
                      const float *v,
                      const unsigned *key,  // (4,): seed, step, first row, stride; absent: no dropout
                      int core_id, int threads, int B, int T, int n_head, int D, int place,
                      unsigned threshold, float scale, float dropout_scale) {
  long C = (long)n_head * D;
  range heads = share(B * n_head, core_id, threads);
  for (int i = heads.first; i < heads.last; i++) {
    long at = i / n_head * T * C + i % n_head * D;
    for (int t0 = 0; t0 < T; t0 += STRIP) {
      int rows = MIN(STRIP, T - t0), end = t0 + rows;
      float *weights = probs + ((long)i * T + t0) * T;
      gemm(weights, T, q + at + t0 * C, C, 0, k + at, C, 1, rows, end, D);
      for (int r = 0; r < rows; r++)
        softmax(weights + (long)r * T, scale, t0 + r + 1, end);
      if (key) {
        head_dropout d = dropout_of(key, i, T, place, threshold, dropout_scale, n_head);
        float *mine = scratch + (long)core_id * STRIP * T;
        for (int r = 0; r < rows; r++)
          drop(mine + (long)r * T, weights + (long)r * T, &d, t0 + r, T, end);
        weights = mine;
      }
      gemm(y + at + t0 * C, C, weights, T, 0, v + at, C, 0, rows, D, end);
    }
  }
}

// With w = probs after dropout: dv = w.T @ dy; at the scores, ds = probs * (dw - sum(probs * dw)) *
// scale, where dw = dropout(dy @ v.T); dq = ds @ k and dk = ds.T @ q.
static void attention_backward(float *dq,            // (B, T, C), as are the next two
                               float *dk,
                               float *dv,
                               float *scratch,       // (threads, 2, T, T)
                               const float *dy,      // (B, T, C)
                               const float *probs,   // (B, H, T, T)
                               const float *q,       // (B, T, C), as are the next two
                               const float *k,
                               const float *v,
                               const unsigned *key,  // (4,), or absent: as in `attention`
                               int core_id, int threads, int B, int T, int n_head, int D, int place,
                               unsigned threshold, float scale, float dropout_scale) {
  long C = (long)n_head * D, TT = (long)T * T;
  range heads = share(B * n_head, core_id, threads);
  float *ds = scratch + core_id * 2 * TT, *dropped = ds + TT;
  for (int i = heads.first; i < heads.last; i++) {
    long at = i / n_head * T * C + i % n_head * D;
    const float *p = probs + i * TT, *w = key ? dropped : p;
    head_dropout drops = {0};
    if (key) drops = dropout_of(key, i, T, place, threshold, dropout_scale, n_head);
    for (int t0 = 0; t0 < T; t0 += STRIP) {
      int rows = MIN(STRIP, T - t0), end = t0 + rows;
      float *strip = ds + (long)t0 * T;
      gemm(strip, T, dy + at + t0 * C, C, 0, v + at, C, 1, rows, end, D);
      for (int t = t0; t < end; t++) {
        float *d = ds + (long)t * T;
        const float *weights = p + (long)t * T;
        if (key) {
          drop(d, d, &drops, t, T, end);
          drop(dropped + (long)t * T, weights, &drops, t, T, end);
        }
        vec totals = splat(0);
        int s = 0;
        for (; s + 8 <= end; s += 8) totals += load(d + s) * load(weights + s);
        float total = sum(totals);
        for (; s < end; s++) total += d[s] * weights[s];
        for (s = 0; s < end; s++) d[s] = weights[s] * (d[s] - total) * scale;
      }
      gemm(dq + at + t0 * C, C, strip, T, 0, k + at, C, 0, rows, D, end);
    }
    for (int t0 = 0; t0 < T; t0 += STRIP) {
      int rows = MIN(STRIP, T - t0);
      long corner = (long)t0 * T + t0;
      gemm(dv + at + t0 * C, C, w + corner, T, 1, dy + at + t0 * C, C, 0, rows, D, T - t0);
      gemm(dk + at + t0 * C, C, ds + corner, T, 1, q + at + t0 * C, C, 0, rows, D, T - t0);
    }
  }
}

INLINE float dot(const float *a, const float *b, int n) {
  vec total = splat(0);
  int i = 0;
  for (; i + 8 <= n; i += 8) total += load(a + i) * load(b + i);
  float s = sum(total);
  AT_AN_EDGE for (; i < n; i++) s += a[i] * b[i];
  return s;
}

// y = the sum over s < last of p[s] * values[s], for 8 * W of D columns.
INLINE void mix(float *y, const float *p, const float *values, int last, int D, int W) {
  vec acc[8];
  UNROLLED(i, 8) acc[i] = splat(0);
  for (int s = 0; s < last; s++)
    UNROLLED(i, 8)
      if (i < W) acc[i] += p[s] * load(values + (long)s * D + i * 8);
  UNROLLED(i, 8)
    if (i < W) store(y + i * 8, acc[i]);
}

// Whether T tokens from `start` on lie within the cache. Where a row of its own start tells another
// place, its result is NaN, and nothing is written.
INLINE int within(int start, int T, int S) { return start >= 0 && start <= S - T; }

FREE static void refuse(float *y, int rows, long C, int D) {
  for (int r = 0; r < rows; r++)
    for (int d = 0; d < D; d++) y[r * C + d] = __builtin_nanf("");
}

// Writes the k and v of one text and head, T of them and C apart, into the cache at `start`.
INLINE void remember(float *keys, float *values, const float *k, const float *v, int start, int T,
                     long C, int D) {
  for (int t = 0; t < T; t++)
    for (int d = 0; d < D; d++) {
      keys[(long)(start + t) * D + d] = k[t * C + d];
      values[(long)(start + t) * D + d] = v[t * C + d];
    }
}

// As `attention_cached`, for so few queries that a matrix product does not pay. One of them, in
// column `row`, is M = 1; else there are M = T.
static void attention_few(float *y,            // (B, M, C)
                          float *keys,         // (B, H, S, D) or more, as are values
                          float *values,
                          float *scores,       // (threads, S)
                          const float *q,      // (B, M, C)
                          const float *k,      // (B, T, C), as is v
                          const float *v,
                          const int *starts,   // (B,): where each row begins; absent: start_pos
                          const int *slots,    // (B,): its row of the cache; absent: its own
                          int core_id, int threads, int start_pos, int row, int B, int T, int M,
                          int S, int n_head, int D, float scale) {
  long C = (long)n_head * D;
  range heads = share(B * n_head, core_id, threads);
  float *mine = scores + (long)core_id * S;
  for (int i = heads.first; i < heads.last; i++) {
    int b = i / n_head, h = i % n_head, start = starts ? starts[b] : start_pos;
    int first_query = start + (M < T ? row : 0);
    long slot = ((long)(slots ? slots[b] : b) * n_head + h) * S * D;
    float *old_keys = keys + slot, *old_values = values + slot;
    if (!within(start, T, S)) {
      refuse(y + (long)b * M * C + h * D, M, C, D);
      continue;
    }
    long new = (long)b * T * C + h * D;
    remember(old_keys, old_values, k + new, v + new, start, T, C, D);
    for (int m = 0; m < M; m++) {
      long at = ((long)b * M + m) * C + h * D;
      int last = first_query + m + 1, d = 0;
      for (int s = 0; s < last; s++) mine[s] = dot(q + at, old_keys + (long)s * D, D);
      softmax(mine, scale, last, last);
      for (; d + 64 <= D; d += 64) mix(y + at + d, mine, old_values + d, last, D, 8);
      for (; d + 8 <= D; d += 8) mix(y + at + d, mine, old_values + d, last, D, 1);
      AT_AN_EDGE for (; d < D; d++) {
        float total = 0;
        AT_AN_EDGE for (int s = 0; s < last; s++) total += mine[s] * old_values[(long)s * D + d];
        y[at + d] = total;
      }
    }
  }
}

// Writes k and v into the cache, and lets T queries look at it, a band of them at a time.
static void attention_cached(float *y,            // (B, T, C)
                             float *keys,         // (B, H, S, D) or more, as are values
                             float *values,
                             float *scores,       // (threads, min(T, BAND), S)
                             const float *q,      // (B, T, C), as are k and v
                             const float *k,
                             const float *v,
                             const int *starts,   // (B,): where each row begins; absent: start_pos
                             const int *slots,    // (B,): its row of the cache; absent: its own
                             int core_id, int threads, int start_pos, int B, int T, int S, int n_head,
                             int D, float scale) {
  long C = (long)n_head * D;
  range heads = share(B * n_head, core_id, threads);
  float *mine = scores + (long)core_id * MIN(T, BAND) * S;
  for (int i = heads.first; i < heads.last; i++) {
    int b = i / n_head, h = i % n_head, start = starts ? starts[b] : start_pos;
    long slot = ((long)(slots ? slots[b] : b) * n_head + h) * S * D;
    float *old_keys = keys + slot, *old_values = values + slot;
    long at = (long)b * T * C + h * D;
    if (!within(start, T, S)) {
      refuse(y + at, T, C, D);
      continue;
    }
    remember(old_keys, old_values, k + at, v + at, start, T, C, D);
    for (int t0 = 0; t0 < T; t0 += BAND) {
      int rows = MIN(BAND, T - t0), end = start + t0 + rows;
      gemm(mine, S, q + at + t0 * C, C, 0, old_keys, D, 1, rows, end, D);
      for (int r = 0; r < rows; r++)
        softmax(mine + (long)r * S, scale, start + t0 + r + 1, end);
      gemm(y + at + t0 * C, C, mine, S, 0, old_values, D, 0, rows, D, end);
    }
  }
}

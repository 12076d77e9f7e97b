// Fast CPU forms, for clang with tinygrad's flags: freestanding, no libc, vectors by language
// extension alone, so that AVX2, AVX-512 and NEON all come from this one text. Sizes and types are
// macros that kernels.py puts in front: see there. Matrices are row-major; `ld` is the distance
// between rows.

// Which functions that take or give vectors would have another ABI without AVX: all are inlined.
#pragma clang diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
// Where a thread's part of n things begins, and where it ends.
#define SHARE(n) (int)((long)(n) * core_id / THREADS), (int)((long)(n) * (core_id + 1) / THREADS)

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int ivec __attribute__((vector_size(32)));
typedef WEIGHT wvec __attribute__((vector_size(8 * sizeof(WEIGHT)), aligned(1)));

// As wide as registers are, for the two loops that take the time: `tile` and `few`.
#ifdef __AVX512F__
enum { LANES = 16, REGISTERS = 32 };
#else
enum { LANES = 8, REGISTERS = 16 };
#endif
typedef float reg __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int ireg __attribute__((vector_size(LANES * 4)));
typedef WEIGHT wreg __attribute__((vector_size(LANES * sizeof(WEIGHT)), aligned(1)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec select(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }
INLINE float sum(vec x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

INLINE reg load_reg(const float *p) { return *(const reg *)p; }
INLINE void store_reg(float *p, reg x) { *(reg *)p = x; }
INLINE float sum_reg(reg x) {
  float parts[LANES];
  store_reg(parts, x);
  return sum(LANES == 8 ? load(parts) : load(parts) + load(parts + LANES - 8));
}

#ifdef BFLOAT16
#define WIDEN(p, narrow, whole, wide)                                                              \
  (wide)(__builtin_convertvector(*(const narrow *)(p), whole) << 16)
#else
#define WIDEN(p, narrow, whole, wide) __builtin_convertvector(*(const narrow *)(p), wide)
#endif
INLINE vec widen(const WEIGHT *p) { return WIDEN(p, wvec, ivec, vec); }
INLINE reg widen_reg(const WEIGHT *p) { return WIDEN(p, wreg, ireg, reg); }
INLINE float widen1(const WEIGHT *p) {
#ifdef BFLOAT16
  union { int bits; float value; } u = {(int)*p << 16};
  return u.value;
#else
  return (float)*p;
#endif
}

// e**x by 2**n * 2**f with |f| <= 1/2 and f's Taylor polynomial: relative error below 3e-7.
INLINE vec vexp(vec x) {
  x = select(x < -87.0f, splat(-87.0f), select(x > 88.0f, splat(88.0f), x)) * 1.44269504f;
  vec shifted = x + 12582912.0f;  // 1.5 * 2**23: rounds to a whole number
  vec f = (x - (shifted - 12582912.0f)) * 0.69314718f;
  vec y = 4.1666667e-2f + f * (8.3333333e-3f + f * 1.3888889e-3f);
  y = 1.0f + f * (1.0f + f * (0.5f + f * (1.6666667e-1f + f * y)));
  return (vec)((ivec)y + (((ivec)shifted - 0x4b400000) << 23));
}

// The normal distribution's integral up to x, where e is e**(-x * x / 2): erf by Abramowitz and
// Stegun 7.1.26, absolute error below 1.5e-7.
INLINE vec normal(vec x, vec e) {
  vec a = select(x < 0.0f, -x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a);
  vec y = -0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f));
  vec tail = t * (0.254829592f + t * y) * e;  // 1 - erf(a)
  return 0.5f * (1.0f + select(x < 0.0f, tail - 1.0f, 1.0f - tail));
}

// GELU in its tanh form (1), exact (2), ReLU (3), or nothing.
INLINE vec activate(vec x) {
#if ACTIVATION == 1
  return x / (1.0f + vexp(x * (-1.5957691f - 0.071354816f * x * x)));
#elif ACTIVATION == 2
  return x * normal(x, vexp(-0.5f * x * x));
#elif ACTIVATION == 3
  return select(x > 0.0f, x, splat(0.0f));
#else
  return x;
#endif
}

// p[0..n) become e**((p - *top) * scale), where *top is the largest of them; their sum.
INLINE float exponentials(float *p, int n, float scale, float *top) {
  vec tops = splat(p[0]), totals = splat(0);
  int i = 0;
  for (; i + 8 <= n; i += 8) tops = select(load(p + i) > tops, load(p + i), tops);
  *top = tops[0];
  for (int j = 1; j < 8; j++) *top = MAX(*top, tops[j]);
  for (; i < n; i++) *top = MAX(*top, p[i]);
  for (i = 0; i + 8 <= n; i += 8) {
    vec e = vexp((load(p + i) - *top) * scale);
    totals += e;
    store(p + i, e);
  }
  float total = sum(totals);
  for (; i < n; i++) total += p[i] = vexp(splat((p[i] - *top) * scale))[0];
  return total;
}

// ---- matrix product: c[m][n] = sum over k of a[m][k] * b[k][n], or b[n][k] if `transposed` ----

enum { ROWS = 6, COLUMNS = 2 * LANES };        // of the tile held in registers
enum { DEPTH = 256, BLOCK_ROWS = 44 * ROWS };  // of what is worked on at a time

// A panel of b, its COLUMNS side by side for each k, zeros past its edge: panel[k][column]. Eight
// rows of b at a time go through registers, where they are transposed; not all COLUMNS in turn,
// which where they lie a multiple of 4096 bytes apart are more than the first cache keeps.
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
INLINE void transpose(vec r[8]) {
  vec t[8];
  UNROLLED(i, 4) {
    t[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  UNROLLED(i, 2)
    UNROLLED(j, 2) {
      r[4 * i + j] = SHUFFLE(t[4 * i + j], t[4 * i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[4 * i + j + 2] = SHUFFLE(t[4 * i + j], t[4 * i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  UNROLLED(i, 4) {
    t[i] = SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[i + 4] = SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  UNROLLED(i, 8) r[i] = t[i];
}

#define DEFINE_PACK(pack, TYPE, widen, widen1)                                                     \
  static void pack(float *panel, const TYPE *b, long ld, int transposed, int columns, int depth) { \
    int k = 0;                                                                                     \
    if (columns == COLUMNS && transposed) {                                                        \
      k = depth / 8 * 8;                                                                           \
      for (int n = 0; n < COLUMNS; n += 8)                                                         \
        for (int j = 0; j < k; j += 8) {                                                           \
          vec r[8];                                                                                \
          UNROLLED(i, 8) r[i] = widen(b + (n + i) * ld + j);                                       \
          transpose(r);                                                                            \
          UNROLLED(i, 8) store(panel + (j + i) * COLUMNS + n, r[i]);                               \
        }                                                                                          \
    } else if (columns == COLUMNS)                                                                 \
      for (; k < depth; k++)                                                                       \
        for (int n = 0; n < COLUMNS; n += 8)                                                       \
          store(panel + k * COLUMNS + n, widen(b + k * ld + n));                                   \
    for (; k < depth; k++)                                                                         \
      for (int n = 0; n < COLUMNS; n++)                                                            \
        panel[k * COLUMNS + n] = n < columns                                                       \
                                     ? widen1(transposed ? b + n * ld + k : b + k * ld + n)        \
                                     : 0;                                                          \
  }
INLINE float value(const float *p) { return *p; }
DEFINE_PACK(pack, float, load, value)
DEFINE_PACK(pack_weights, WEIGHT, widen, widen1)

// One tile: c[ROWS][COLUMNS] (+)= packed rows of a times a panel; `rows` and `columns` of it are
// real.
INLINE void tile(float *c, long ldc, const float *packed, const float *panel, int rows, int columns,
                 int depth, int add) {
  reg acc[ROWS][2];
  UNROLLED(i, ROWS) acc[i][0] = acc[i][1] = (reg){0};
  UNROLLED(i, ROWS)
    for (int n = 0; n < COLUMNS; n += 16) __builtin_prefetch(c + MIN(i, rows - 1) * ldc + n, 1);
  _Pragma("clang loop unroll_count(2)") for (int k = 0; k < depth; k++) {
    reg b0 = load_reg(panel + k * COLUMNS), b1 = load_reg(panel + k * COLUMNS + LANES);
    UNROLLED(i, ROWS) {
      float x = packed[k * ROWS + i];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  UNROLLED(i, ROWS)
    if (i < rows) {
      float *p = c + i * ldc;
      if (columns == COLUMNS) {
        UNROLLED(h, 2)
          store_reg(p + h * LANES, add ? load_reg(p + h * LANES) + acc[i][h] : acc[i][h]);
      } else {
        float edge[COLUMNS];
        UNROLLED(h, 2) store_reg(edge + h * LANES, acc[i][h]);
        for (int n = 0; n < columns; n++) p[n] = add ? p[n] + edge[n] : edge[n];
      }
    }
}

// A block of a, whose rows lie `row` apart and columns `step`, tile by tile: packed[tile][k][row],
// so that a tile reads it in order. What is stored eight rows wide is too much, and covered by the
// next store; behind the last there must be room.
static void pack_rows(float *packed, const float *a, long row, long step, int rows, int depth) {
  for (int m = 0; m < rows; m += ROWS, packed += (long)ROWS * depth) {
    int k = 0;
    if (step == 1)
      for (; k + 8 <= depth; k += 8) {
        vec r[8];
        UNROLLED(i, 8) r[i] = load(a + MIN(m + MIN(i, ROWS - 1), rows - 1) * row + k);
        transpose(r);
        UNROLLED(i, 8) store(packed + (k + i) * ROWS, r[i]);
      }
    if (row == 1 && m + 8 <= rows)
      for (; k < depth; k++) store(packed + k * ROWS, load(a + m + k * step));
    for (; k < depth; k++)
      UNROLLED(i, ROWS) packed[k * ROWS + i] = a[MIN(m + i, rows - 1) * row + k * step];
  }
}

// Lines first to last, `width` bytes each and `ld` apart, on their way into the cache.
INLINE void fetch(const char *p, long ld, int first, int last, int width) {
  for (int i = first; i < last; i++)
    for (int x = 0; x < width; x += 64) __builtin_prefetch(p + i * ld + x);
}

// `a` is [m][k], or [k][m] if a_transposed. Blocks are cut evenly, and so that a panel stays in the
// first cache and a block of rows in the second; with each tile comes a share of the next panel's
// b.
#define DEFINE_PRODUCT(product, pack, TYPE)                                                        \
  static void product(float *c, long ldc, const float *a, long lda, int a_transposed,              \
                      const TYPE *b, long ldb, int transposed, int M, int N, int K) {              \
    float panel[DEPTH * COLUMNS] __attribute__((aligned(64))), packed[BLOCK_ROWS * DEPTH + 2];     \
    int blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS,                                                \
        height = (M + blocks * ROWS - 1) / (blocks * ROWS) * ROWS;                                 \
    for (int k = 0; k < K; k += DEPTH)                                                             \
      for (int m0 = 0; m0 < M; m0 += height) {                                                     \
        int depth = MIN(DEPTH, K - k), m1 = MIN(m0 + height, M);                                   \
        if (a_transposed) pack_rows(packed, a + k * lda + m0, 1, lda, m1 - m0, depth);             \
        else pack_rows(packed, a + m0 * lda + k, lda, 1, m1 - m0, depth);                          \
        for (int n = 0; n < N; n += COLUMNS) {                                                     \
          int columns = MIN(COLUMNS, N - n);                                                       \
          pack(panel, transposed ? b + n * ldb + k : b + k * ldb + n, ldb, transposed, columns,    \
               depth);                                                                             \
          const TYPE *next = transposed ? b + (n + COLUMNS) * ldb + k : b + k * ldb + n + COLUMNS; \
          int lines = n + COLUMNS < N ? (transposed ? COLUMNS : depth) : 0,                        \
              share = lines * ROWS / (m1 - m0) + 1;                                                \
          for (int m = m0, i = 0; m < m1; m += ROWS, i += share) {                                 \
            fetch((const char *)next, ldb * sizeof(TYPE), i, MIN(i + share, lines),                \
                  (transposed ? depth : COLUMNS) * sizeof(TYPE));                                  \
            tile(c + m * ldc + n, ldc, packed + (long)(m - m0) * depth, panel, MIN(ROWS, m1 - m),  \
                 columns, depth, k > 0);                                                           \
          }                                                                                        \
        }                                                                                          \
      }                                                                                            \
  }
DEFINE_PRODUCT(product, pack, float)
DEFINE_PRODUCT(product_weights, pack_weights, WEIGHT)

// Columns n0 to n1 of c = a @ b.T for M rows of a, a constant of at most 8, and weights b[n][k]:
// bound by memory, so each weight goes straight from there into as many sums as the registers hold.
// A core fetches ahead for each of several places far apart that it reads in turn: so there are
// STREAMS of them. Where they do not come out even, a row is computed twice.
enum { STREAMS = 4, MOST = REGISTERS / 2 / STREAMS };  // half of the registers for sums
INLINE void few(float *c, long ldc, const float *a, const WEIGHT *b, int M, int n0, int n1, int K) {
  const int AT_ONCE = MIN(M, MOST), U = M > 1 ? 1 : 2;  // rows of a, and registers of a row
  int part = (n1 - n0 + STREAMS - 1) / STREAMS;
  for (int n = n0; n < n0 + part; n++)
    for (int m = 0; m < M; m += AT_ONCE) {
      const float *rows[MOST];
      const WEIGHT *w[STREAMS];
      reg acc[STREAMS][MOST][2];
      UNROLLED(j, MOST) rows[j] = a + (long)MIN(m + j, M - 1) * K;
      UNROLLED(i, STREAMS) w[i] = b + (long)MIN(n + i * part, n1 - 1) * K;
      UNROLLED(i, STREAMS)
        UNROLLED(j, MOST)
          UNROLLED(u, 2) acc[i][j][u] = (reg){0};
      int k = 0;
      for (; k + LANES * U <= K; k += LANES * U)
        UNROLLED(u, 2)
          UNROLLED(i, STREAMS)
            if (u < U) {
              reg x = widen_reg(w[i] + k + u * LANES);
              UNROLLED(j, MOST)
                if (j < AT_ONCE) acc[i][j][u] += x * load_reg(rows[j] + k + u * LANES);
            }
      UNROLLED(i, STREAMS)
        UNROLLED(j, MOST)
          if (j < AT_ONCE) {
            float s = sum_reg(acc[i][j][0] + acc[i][j][1]);
            for (int l = k; l < K; l++) s += widen1(w[i] + l) * rows[j][l];
            c[MIN(m + j, M - 1) * ldc + MIN(n + i * part, n1 - 1)] = s;
          }
    }
}

// Waits for the other threads. sync[0] counts arrivals; sync[16], a cache line on, the meetings;
// sync[32] holds the address of the system's sched_yield, or 0: where another program has taken a
// core, the thread that is late needs the one on which the others wait.
INLINE void barrier(int *sync) {
  if (THREADS == 1) return;
  int (*yield)(void) = *(int (**)(void))(sync + 32);
  int meeting = __atomic_load_n(sync + 16, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(sync, 1, __ATOMIC_ACQ_REL) == THREADS) {
    __atomic_store_n(sync, 0, __ATOMIC_RELAXED);
    __atomic_store_n(sync + 16, meeting + 1, __ATOMIC_RELEASE);
  } else
    for (int turns = 0; __atomic_load_n(sync + 16, __ATOMIC_ACQUIRE) == meeting; turns++)
      if (turns > 2000 && yield) yield();
}

#ifdef MATMUL
// ---- c = a @ b for each of BATCH pairs; a is (M, K), or (K, M) if A_TRANSPOSED; b likewise ----

ENTRY {
  int b0 = 0, b1 = BATCH, m0 = 0, m1 = SIZE_M, n0 = 0, n1 = SIZE_N;
  if (BATCH > 1) {
    b0 = BATCH * core_id / THREADS;
    b1 = BATCH * (core_id + 1) / THREADS;
  } else {  // whole tiles to each thread, of the longer side, as each packs the whole of the other
    int by_rows = SIZE_M > SIZE_N && !FEW, size = by_rows ? SIZE_M : SIZE_N,
        step = by_rows ? ROWS : COLUMNS;
    int tiles = (size + step - 1) / step,
        ahead = MIN(tiles, HEAD_START * size / (2L * SIZE_M * SIZE_N * SIZE_K * step));
    int first = core_id ? MIN(size, (ahead + (tiles - ahead) * core_id / THREADS) * step) : 0;
    int last = MIN(size, (ahead + (tiles - ahead) * (core_id + 1) / THREADS) * step);
    if (by_rows) m0 = first, m1 = last;
    else n0 = first, n1 = last;
  }
#if FEW
  few(c, SIZE_N, a, b, SIZE_M, n0, n1, SIZE_K);
#else
  if (m0 < m1)
    for (long i = b0; i < b1; i++)
      product_weights(c + (i * SIZE_M + m0) * SIZE_N + n0, SIZE_N,
                      a + i * SIZE_M * SIZE_K + (A_TRANSPOSED ? m0 : (long)m0 * SIZE_K),
                      A_TRANSPOSED ? SIZE_M : SIZE_K, A_TRANSPOSED,
                      b + i * SIZE_K * SIZE_N + (B_TRANSPOSED ? (long)n0 * SIZE_K : n0),
                      B_TRANSPOSED ? SIZE_K : SIZE_N, B_TRANSPOSED, m1 - m0, n1 - n0, SIZE_K);
#endif
}
#endif

#ifdef THRESHOLD
// ---- for each row the largest t for which weights where order >= t sum to the target, or 0 ----

typedef unsigned uvec __attribute__((vector_size(32), aligned(4)));

ENTRY {
  for (int row = ROWS_OF_ORDER * core_id / THREADS; row < ROWS_OF_ORDER * (core_id + 1) / THREADS;
       row++) {
    const unsigned *p = order + (long)row * SIZE;
    const float *w = weights + (long)row * SIZE;
    unsigned t = 0;
    for (unsigned bit = 1u << 31; bit; bit >>= 1) {
      unsigned trial = t | bit;
      vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
      int i = 0;
      for (; i + 32 <= SIZE; i += 32)
        UNROLLED(u, 4)
          sums[u] += (vec)((ivec)(*(const uvec *)(p + i + u * 8) >= trial) &
                           (ivec)load(w + i + u * 8));
      float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; i < SIZE; i++)
        if (p[i] >= trial) total += w[i];
      if (total >= *target) t = trial;
    }
    found[row] = t;
  }
}
#endif

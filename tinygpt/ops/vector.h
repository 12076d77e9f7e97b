// What all operations stand on: vectors, and functions of them. The text is for clang with
// tinygrad's flags: freestanding, without a C library. Vectors are a language extension, so that
// AVX2, AVX-512 and NEON all come from this one text.
//
// Matrices are row-major, and `ld` (leading dimension) is the distance between two rows.
// Every operation runs on `threads` threads at once, and `core_id` says which one this is.

// Without AVX these functions would have another calling convention. All of them are inlined.
#pragma clang diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

// Before a loop that only edges take: clang makes of it just what it says. As vectors, such loops
// take more than half of the time in which a matrix product compiles.
#define AT_AN_EDGE _Pragma("clang loop vectorize(disable) interleave(disable) unroll(disable)")

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int ivec __attribute__((vector_size(32)));
typedef unsigned uvec __attribute__((vector_size(32), aligned(4)));
typedef unsigned long long u64;

// Registers as wide as the processor has, for the loops that take the time: GEMM and GEMV.
#ifdef __AVX512F__
enum { LANES = 16, REGISTERS = 32 };
#else
enum { LANES = 8, REGISTERS = 16 };
#endif
typedef float reg __attribute__((vector_size(LANES * 4), aligned(4)));
typedef unsigned ureg __attribute__((vector_size(LANES * 4)));

// A part of a row of things: those from `first` up to, but without, `last`.
typedef struct {
  int first, last;
} range;

// One thread's share of n things. The shares of all threads cover each thing once.
INLINE range share(long n, int core_id, int threads) {
  return (range){(int)(n * core_id / threads), (int)(n * (core_id + 1) / threads)};
}

// As `share`, but every share but the last is a whole number of `step`s.
INLINE range share_steps(int n, int step, int core_id, int threads) {
  range steps = share((n + step - 1) / step, core_id, threads);
  return (range){MIN(n, steps.first * step), MIN(n, steps.last * step)};
}

#if __has_feature(thread_sanitizer)
// It does not see accesses of 32 bytes, so they are of one number each where it watches.
INLINE vec load(const float *p) {
  vec x;
  for (int i = 0; i < 8; i++) x[i] = p[i];
  return x;
}
INLINE void store(float *p, vec x) {
  for (int i = 0; i < 8; i++) p[i] = x[i];
}
INLINE reg load_reg(const float *p) {
  reg x;
  for (int i = 0; i < LANES; i++) x[i] = p[i];
  return x;
}
INLINE void store_reg(float *p, reg x) {
  for (int i = 0; i < LANES; i++) p[i] = x[i];
}
#else
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE reg load_reg(const float *p) { return *(const reg *)p; }
INLINE void store_reg(float *p, reg x) { *(reg *)p = x; }
#endif
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec select(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }
INLINE float sum(vec x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

INLINE float sum_reg(reg x) {
  float parts[LANES];
  store_reg(parts, x);
  return sum(LANES == 8 ? load(parts) : load(parts) + load(parts + LANES - 8));
}

// The first n of 8 numbers, n < 8; the others are 0.
INLINE vec load_some(const float *p, int n) {
  vec x = {0};
  AT_AN_EDGE for (int i = 0; i < n; i++) x[i] = p[i];
  return x;
}
INLINE void store_some(float *p, vec x, int n) {
  AT_AN_EDGE for (int i = 0; i < n; i++) p[i] = x[i];
}

// e**x as 2**n * 2**f with |f| <= 1/2, and Taylor's polynomial for 2**f. The relative error is
// below 3e-7.
INLINE vec vexp(vec x) {
  x = select(x < -87.0f, splat(-87.0f), select(x > 88.0f, splat(88.0f), x)) * 1.44269504f;
  vec shifted = x + 12582912.0f;  // adding 1.5 * 2**23 rounds to a whole number
  vec f = (x - (shifted - 12582912.0f)) * 0.69314718f;
  vec y = 4.1666667e-2f + f * (8.3333333e-3f + f * 1.3888889e-3f);
  y = 1.0f + f * (1.0f + f * (0.5f + f * (1.6666667e-1f + f * y)));
  return (vec)((uvec)y + (((uvec)shifted - 0x4b400000u) << 23));
}

// The natural logarithm of positive normal numbers: x as 2**e * m with m within a factor of sqrt(2)
// of 1, and log m by the series of artanh((m - 1) / (m + 1)). The relative error is below 3e-7.
INLINE vec vlog(vec x) {
  uvec bits = (uvec)x - 0x3f3504f3u;  // the bits of sqrt(1/2)
  vec e = __builtin_convertvector((ivec)bits >> 23, vec);
  vec m = (vec)((bits & 0x7fffffu) + 0x3f3504f3u);
  vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  vec y = z * (0.33333333f + z * (0.2f + z * (0.14285714f + z * 0.11111111f)));
  return e * 0.69314718f + 2.0f * (s + s * y);
}

// p[0..n) become e**((p - *top) * scale), where *top is the largest of them. Returns their sum.
INLINE float exponentials(float *p, int n, float scale, float *top) {
  vec tops = splat(p[0]), totals = splat(0);
  int i = 0;
  for (; i + 8 <= n; i += 8) tops = select(load(p + i) > tops, load(p + i), tops);
  *top = tops[0];
  for (int j = 1; j < 8; j++) *top = MAX(*top, tops[j]);
  AT_AN_EDGE for (; i < n; i++) *top = MAX(*top, p[i]);
  for (i = 0; i + 8 <= n; i += 8) {
    vec e = vexp((load(p + i) - *top) * scale);
    totals += e;
    store(p + i, e);
  }
  float total = sum(totals);
  AT_AN_EDGE for (; i < n; i++) total += p[i] = vexp(splat((p[i] - *top) * scale))[0];
  return total;
}

// A loop that clears or copies must not become a call of memset or memcpy, which are not there.
#define FREE __attribute__((no_builtin))
FREE static void clear(float *p, long n) {
  for (long i = 0; i < n; i++) p[i] = 0;
}

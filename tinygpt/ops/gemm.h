// Matrix products. gemm_panels.h, included for each type of b, has the loops over whole matrices.

enum { ROWS = 6, COLUMNS = 2 * LANES };        // of the tile that is held in registers
enum { DEPTH = 256, BLOCK_ROWS = 44 * ROWS };  // of what is worked on at a time

// Transposes 8 rows of 8. Rows that lie a multiple of 4096 bytes apart are more than the first
// cache keeps, so a matrix is transposed 8 rows at a time, not COLUMNS of them in turn.
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

// One tile: c[ROWS][COLUMNS] is (or, with `add`, grows by) packed rows of a times a panel of b.
// Only `rows` and `columns` of the tile exist.
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
        AT_AN_EDGE for (int n = 0; n < columns; n++) p[n] = add ? p[n] + edge[n] : edge[n];
      }
    }
}

// Packs a block of a, whose rows lie `row` apart and columns `step`, tile by tile into
// packed[tile][k][row], which a tile then reads in order. A store is eight rows wide: what is too
// much, the next store covers, and behind the last one there must be room.
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
    AT_AN_EDGE for (; k < depth; k++)
      UNROLLED(i, ROWS) packed[k * ROWS + i] = a[MIN(m + i, rows - 1) * row + k * step];
  }
}

// Asks for lines first to last, each `width` bytes and `ld` apart, to be brought into the cache.
INLINE void prefetch_lines(const char *p, long ld, int first, int last, int width) {
  for (int i = first; i < last; i++)
    for (int x = 0; x < width; x += 64) __builtin_prefetch(p + i * ld + x);
}

INLINE float same1(const float *p) { return *p; }
#define GEMM gemm
#define PACK pack
#define TYPE float
#define LOAD load
#define LOAD1 same1
#include "gemm_panels.h"
#undef GEMM
#undef PACK
#undef TYPE
#undef LOAD
#undef LOAD1
#ifdef WIDEN  // weight.h is there
#define GEMM gemm_weights
#define PACK pack_weights
#define TYPE WEIGHT
#define LOAD widen
#define LOAD1 widen1
#include "gemm_panels.h"
#undef GEMM
#undef PACK
#undef TYPE
#undef LOAD
#undef LOAD1
#endif

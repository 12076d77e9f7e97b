// A matrix product for b of one TYPE: gemm.h includes this text for float, and for WEIGHT.

// Packs a panel of b, its COLUMNS side by side for each k, with zeros past its edge:
// panel[k][column].
static void PACK(float *panel, const TYPE *b, long ld, int transposed, int columns, int depth) {
  int k = 0;
  if (columns == COLUMNS && transposed) {
    k = depth / 8 * 8;
    for (int n = 0; n < COLUMNS; n += 8)
      for (int j = 0; j < k; j += 8) {
        vec r[8];
        UNROLLED(i, 8) r[i] = LOAD(b + (n + i) * ld + j);
        transpose(r);
        UNROLLED(i, 8) store(panel + (j + i) * COLUMNS + n, r[i]);
      }
  } else if (columns == COLUMNS)
    for (; k < depth; k++)
      for (int n = 0; n < COLUMNS; n += 8)
        store(panel + k * COLUMNS + n, LOAD(b + k * ld + n));
  AT_AN_EDGE for (; k < depth; k++)
    AT_AN_EDGE for (int n = 0; n < COLUMNS; n++)
      panel[k * COLUMNS + n] =
          n < columns ? LOAD1(transposed ? b + n * ld + k : b + k * ld + n) : 0;
}

// c (M, N) = a (M, K) @ b (K, N). `a` is [m][k], or [k][m] if a_transposed; b is [k][n], or [n][k]
// if b_transposed. Blocks are cut evenly, and so that a panel stays in the first cache and a block
// of rows in the second. With each tile comes a share of the next panel's b.
static void GEMM(float *c, long ldc, const float *a, long lda, int a_transposed, const TYPE *b,
                 long ldb, int b_transposed, int M, int N, int K) {
  float panel[DEPTH * COLUMNS] __attribute__((aligned(64))), packed[BLOCK_ROWS * DEPTH + 2];
  int blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS,
      height = (M + blocks * ROWS - 1) / (blocks * ROWS) * ROWS;
  for (int k = 0; k < K; k += DEPTH)
    for (int m0 = 0; m0 < M; m0 += height) {
      int depth = MIN(DEPTH, K - k), m1 = MIN(m0 + height, M);
      if (a_transposed) pack_rows(packed, a + k * lda + m0, 1, lda, m1 - m0, depth);
      else pack_rows(packed, a + m0 * lda + k, lda, 1, m1 - m0, depth);
      for (int n = 0; n < N; n += COLUMNS) {
        int columns = MIN(COLUMNS, N - n);
        PACK(panel, b_transposed ? b + n * ldb + k : b + k * ldb + n, ldb, b_transposed, columns,
             depth);
        const TYPE *next = b;  // where there is none, its place would lie outside of b
        if (n + COLUMNS < N)
          next += b_transposed ? (n + COLUMNS) * ldb + k : k * ldb + n + COLUMNS;
        int lines = n + COLUMNS < N ? (b_transposed ? COLUMNS : depth) : 0,
            lines_a_tile = lines * ROWS / (m1 - m0) + 1;
        for (int m = m0, i = 0; m < m1; m += ROWS, i += lines_a_tile) {
          prefetch_lines((const char *)next, ldb * sizeof(TYPE), i, MIN(i + lines_a_tile, lines),
                         (b_transposed ? depth : COLUMNS) * sizeof(TYPE));
          tile(c + m * ldc + n, ldc, packed + (long)(m - m0) * depth, panel, MIN(ROWS, m1 - m),
               columns, depth, k > 0);
        }
      }
    }
}

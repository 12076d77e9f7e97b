// A product of a few rows with weights, as generating one token takes it.

// Columns n0 to n1 of c = a @ b.T, for M rows of a (at most 16, a constant) and weights b[n][k]. The
// time is that of reading b, so each weight goes straight from memory into as many sums as the
// registers hold. A core fetches ahead for each of several far places that it reads in turn, so
// there are STREAMS of them. Where they do not come out even, a row is computed twice.
enum { STREAMS = 4, MOST_ROWS = REGISTERS / 2 / STREAMS };  // half of the registers hold sums
INLINE void gemv(float *c, long ldc, const float *a, const WEIGHT *b, int M, int n0, int n1, int K) {
  const int AT_ONCE = MIN(M, MOST_ROWS), U = M > 1 ? 1 : 2;  // rows of a, and registers of a row
  int part = (n1 - n0 + STREAMS - 1) / STREAMS;
  for (int n = n0; n < n0 + part; n++)
    for (int m = 0; m < M; m += AT_ONCE) {
      const float *rows[MOST_ROWS];
      const WEIGHT *w[STREAMS];
      reg acc[STREAMS][MOST_ROWS][2];
      UNROLLED(j, MOST_ROWS) rows[j] = a + (long)MIN(m + j, M - 1) * K;
      UNROLLED(i, STREAMS) w[i] = b + (long)MIN(n + i * part, n1 - 1) * K;
      UNROLLED(i, STREAMS)
        UNROLLED(j, MOST_ROWS)
          UNROLLED(u, 2) acc[i][j][u] = (reg){0};
      int k = 0;
      for (; k + LANES * U <= K; k += LANES * U)
        UNROLLED(u, 2)
          UNROLLED(i, STREAMS)
            if (u < U) {
              reg x = widen_reg(w[i] + k + u * LANES);
              UNROLLED(j, MOST_ROWS)
                if (j < AT_ONCE) acc[i][j][u] += x * load_reg(rows[j] + k + u * LANES);
            }
      UNROLLED(i, STREAMS)
        UNROLLED(j, MOST_ROWS)
          if (j < AT_ONCE) {
            float s = sum_reg(acc[i][j][0] + acc[i][j][1]);
            AT_AN_EDGE for (int l = k; l < K; l++) s += widen1(w[i] + l) * rows[j][l];
            c[MIN(m + j, M - 1) * ldc + MIN(n + i * part, n1 - 1)] = s;
          }
    }
}

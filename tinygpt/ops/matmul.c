// c = a @ b for each of `batch` pairs of matrices.
#include "vector.h"
#include "weight.h"
#include "gemm.h"

static void matmul(float *c,         // (batch, M, N)
                   const float *a,   // (batch, M, K), or (batch, K, M) if a_transposed
                   const WEIGHT *b,  // (batch, K, N), or (batch, N, K) if b_transposed
                   int core_id, int threads, int batch, int M, int N, int K, int a_transposed,
                   int b_transposed) {
  range pairs = {0, batch}, rows = {0, M}, columns = {0, N};
  // A thread packs the whole of the shorter side by itself, so the longer one is shared out.
  if (batch > 1) pairs = share(batch, core_id, threads);
  else if (M > N) rows = share_steps(M, ROWS, core_id, threads);
  else columns = share_steps(N, COLUMNS, core_id, threads);
  if (rows.first >= rows.last || columns.first >= columns.last) return;
  for (long i = pairs.first; i < pairs.last; i++)
    gemm_weights(c + (i * M + rows.first) * N + columns.first, N,
                 a + i * M * K + (a_transposed ? rows.first : (long)rows.first * K),
                 a_transposed ? M : K, a_transposed,
                 b + i * K * N + (b_transposed ? (long)columns.first * K : columns.first),
                 b_transposed ? K : N, b_transposed, rows.last - rows.first,
                 columns.last - columns.first, K);
}

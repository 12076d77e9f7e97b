// A linear layer and its gradients.
#include "vector.h"
#include "weight.h"
#include "gemm.h"
#include "gemv.h"

// y = y * scale + bias + residual for some rows and columns of N.
static void finish(float *y, const float *scale, const float *bias, const float *residual,
                   range rows, range columns, int N) {
  for (long m = rows.first; m < rows.last; m++)
    for (int n = columns.first; n < columns.last; n += 8) {
      float *p = y + m * N + n;
      const float *r = residual ? residual + m * N + n : 0;
      int left = columns.last - n;
      if (left >= 8) {
        vec x = load(p);
        if (scale) x *= load(scale + n);
        if (bias) x += load(bias + n);
        if (r) x += load(r);
        store(p, x);
      } else
        AT_AN_EDGE for (int i = 0; i < left; i++) {
          float x = p[i];
          if (scale) x *= scale[n + i];
          if (bias) x += bias[n + i];
          if (r) x += r[i];
          p[i] = x;
        }
    }
}

// y = x @ weight.T * scale + bias + residual
static void linear(float *y,                          // (M, N)
                   const float *x,                    // (M, K)
                   const WEIGHT *weight,              // (N, K)
                   const float *scale,                // (N,) or absent
                   const float *bias,                 // (N,) or absent
                   const float *residual,             // (M, N) or absent
                   int core_id, int threads, int few,  // few: M if it is at most 16, else 0
                   int M, int N, int K) {
  range rows = {0, M}, columns = {0, N};
  if (few) {
    columns = share(N, core_id, threads);
    gemv(y, N, x, weight, few, columns.first, columns.last, K);
  } else {
    // A thread packs the whole of the shorter side by itself, so the longer one is shared out.
    if (M > N) rows = share_steps(M, ROWS, core_id, threads);
    else columns = share_steps(N, COLUMNS, core_id, threads);
    if (rows.first >= rows.last || columns.first >= columns.last) return;
    gemm_weights(y + (long)rows.first * N + columns.first, N, x + (long)rows.first * K, K, 0,
                 weight + (long)columns.first * K, K, 1, rows.last - rows.first,
                 columns.last - columns.first, K);
  }
  finish(y, scale, bias, residual, rows, columns, N);
}

// dx = dy @ weight, dweight = dy.T @ x, and dbias = the sum of dy's rows
static void linear_backward(float *dx,               // (M, K)
                            float *dweight,          // (N, K)
                            float *dbias,            // (N,) or absent
                            const float *dy,         // (M, N)
                            const float *x,          // (M, K)
                            const float *weight,     // (N, K)
                            int core_id, int threads, int M, int N, int K) {
  range rows = share_steps(M, ROWS, core_id, threads), columns = share(N, core_id, threads);
  if (rows.first < rows.last)
    gemm(dx + (long)rows.first * K, K, dy + (long)rows.first * N, N, 0, weight, K, 0,
         rows.last - rows.first, K, N);
  if (columns.first >= columns.last) return;
  gemm(dweight + (long)columns.first * K, K, dy + columns.first, N, 1, x, K, 0,
       columns.last - columns.first, K, M);
  if (!dbias) return;
  for (int n = columns.first; n < columns.last; n++) dbias[n] = 0;
  for (long m = 0; m < M; m++)
    for (int n = columns.first; n < columns.last; n++) dbias[n] += dy[m * N + n];
}

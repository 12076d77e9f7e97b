// Dropout, with what it is added to.
#include "vector.h"
#include "dropout.h"

// y = (x where it is kept, else 0) * scale + residual
static void dropout(float *y,              // (n,)
                    const float *x,        // (n,)
                    const float *residual,  // (n,) or absent
                    const unsigned *key,   // (4,): seed, step, first row, stride
                    int core_id, int threads, int n, int row_size, int place, unsigned threshold,
                    float scale) {
  range part = share_steps(n, 8, core_id, threads);
  dropout_key keys = dropout_keys(key, place);
  for (int row = part.first / row_size, i = part.first; i < part.last; row++) {
    int end = MIN(part.last - i, row_size - i % row_size) + i;
    unsigned before = (key[2] + row * (key[3] - 1)) * (unsigned)row_size;
    for (; i < end; i += MIN(8, end - i)) {
      int left = end - i, whole = left >= 8;
      vec v = whole ? load(x + i) : load_some(x + i, left);
      v = (vec)((ivec)(v * scale) & kept(keys, before + i, threshold));
      if (residual) v += whole ? load(residual + i) : load_some(residual + i, left);
      if (whole) store(y + i, v);
      else store_some(y + i, v, left);
    }
  }
}

// Dropout, with what it is added to.
#include "vector.h"
#include "dropout.h"

// y = (x where it is kept, else 0) * scale + residual
static void dropout(float *y,              // (n,)
                    const float *x,        // (n,)
                    const float *residual,  // (n,) or absent
                    const unsigned *key,   // (3,): seed, step, first row
                    int core_id, int threads, int n, int row_size, int place, unsigned threshold,
                    float scale) {
  range part = share_steps(n, 8, core_id, threads);
  dropout_key keys = dropout_keys(key, place);
  unsigned first = key[2] * (unsigned)row_size;
  for (int i = part.first; i < part.last; i += 8) {
    int left = part.last - i, whole = left >= 8;
    vec v = whole ? load(x + i) : load_some(x + i, left);
    v = (vec)((ivec)(v * scale) & kept(keys, first + i, threshold));
    if (residual) v += whole ? load(residual + i) : load_some(residual + i, left);
    if (whole) store(y + i, v);
    else store_some(y + i, v, left);
  }
}

// The threshold above which top-k and top-p keep tokens.
#include "vector.h"

// For each row the largest t for which the weights where order >= t sum to the target, or 0. It is
// found from its highest bit down.
static void threshold(unsigned *found,        // (B, 1)
                      const unsigned *order,  // (B, V): bits in the order of the numbers
                      const float *weights,   // (B, V)
                      const float *target,    // (B, 1)
                      int core_id, int threads, int B, int V) {
  range rows = share(B, core_id, threads);
  for (int row = rows.first; row < rows.last; row++) {
    const unsigned *p = order + (long)row * V;
    const float *w = weights + (long)row * V;
    unsigned t = 0;
    for (unsigned bit = 1u << 31; bit; bit >>= 1) {
      unsigned trial = t | bit;
      vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
      int i = 0;
      for (; i + 32 <= V; i += 32)
        UNROLLED(u, 4)
          sums[u] += (vec)((ivec)(*(const uvec *)(p + i + u * 8) >= trial) &
                           (ivec)load(w + i + u * 8));
      float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; i < V; i++)
        if (p[i] >= trial) total += w[i];
      if (total >= target[row]) t = trial;
    }
    found[row] = t;
  }
}

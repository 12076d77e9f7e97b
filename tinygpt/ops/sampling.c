// The threshold above which top-k and top-p keep tokens, and the noise that draws among them.
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

// Threefry's 64 bits for each of 8 counters, in place: their low words, and their high ones. Source:
// Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", with 20 rounds.
INLINE void threefry(uvec *low, uvec *high, u64 seed) {
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  unsigned a = (unsigned)seed, b = (unsigned)(seed >> 32), keys[3] = {a, b, a ^ b ^ 0x1bd11bdau};
  uvec x = *low + keys[0], y = *high + keys[1];
  UNROLLED(i, 5) {
    UNROLLED(j, 4) {
      int r = rotations[i % 2][j];
      x += y;
      y = (y << r | y >> (32 - r)) ^ x;
    }
    x += keys[(i + 1) % 3];
    y += keys[(i + 2) % 3] + i + 1;
  }
  *low = x;
  *high = y;
}

// As `gumbel` in plain.py makes it of 32 bits.
INLINE vec noise_of(uvec bits) {
  vec uniform = (__builtin_convertvector((ivec)(bits >> 9), vec) + 0.5f) * 0x1p-23f;
  return -vlog(-vlog(uniform));
}

// Gumbel noise. A counter's low word is for the first half of a row, its high one for the second.
static void gumbel(float *noise,        // (B, V)
                   const u64 *seeds,    // (B,)
                   const int *draws,    // (B,)
                   int core_id, int threads, int B, int V) {
  int half = (V + 1) / 2, blocks = (half + 7) / 8;
  range part = share((long)B * blocks, core_id, threads);
  for (int i = part.first; i < part.last; i++) {
    int row = i / blocks, place = i % blocks * 8;
    uvec low = (uvec){0, 1, 2, 3, 4, 5, 6, 7} + place, high = (uvec){0} + draws[row];
    threefry(&low, &high, seeds[row]);
    float *p = noise + (long)row * V;
    int first = MIN(8, half - place), second = MIN(8, V - half - place);
    if (first == 8) store(p + place, noise_of(low));
    else store_some(p + place, noise_of(low), first);
    if (second == 8) store(p + half + place, noise_of(high));
    else store_some(p + half + place, noise_of(high), second);
  }
}

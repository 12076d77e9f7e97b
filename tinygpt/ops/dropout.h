// Which numbers dropout keeps. Every mask is a function of (seed, step, place, index) alone, the
// same in C as in plain tensors: see `dropout_bits` in plain.py.

// A bijection of 32 bits in which every bit of x moves every bit of the result. Source: C. Wellons,
// "Prospecting for Hash Functions", 2018, `lowbias32`.
#define MIX32(x)                                                                                   \
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16

typedef struct {
  unsigned first, second;
} dropout_key;

// What is common to all numbers of one place in one step; key is (seed, step, first row, stride): row
// i of a batch is row `first row + i * stride` of the whole one, which others may have parts of.
INLINE dropout_key dropout_keys(const unsigned *key, int place) {
  unsigned x = key[0];
  MIX32(x);
  x += key[1];
  MIX32(x);
  x += place;
  MIX32(x);
  unsigned y = x + 0x9e3779b9u;
  MIX32(y);
  return (dropout_key){x, y};
}

// For numbers index to index + 7: all bits set where the number is kept.
INLINE ivec kept(dropout_key key, unsigned index, unsigned threshold) {
  uvec x = (uvec){0, 1, 2, 3, 4, 5, 6, 7} + index;
  x ^= key.first;
  MIX32(x);
  x += key.second;
  MIX32(x);
  return (ivec)(x >= threshold);
}

// A weight may be held in fewer bits than a float has, and is widened where it is used. The macro
// WEIGHT names its type; BFLOAT16 says that the type, unsigned short, is the upper half of a float.

typedef WEIGHT wvec __attribute__((vector_size(8 * sizeof(WEIGHT)), aligned(1)));
typedef WEIGHT wreg __attribute__((vector_size(LANES * sizeof(WEIGHT)), aligned(1)));

#ifdef BFLOAT16
#define WIDEN(p, narrow, whole, wide)                                                              \
  (wide)(__builtin_convertvector(*(const narrow *)(p), whole) << 16)
#else
#define WIDEN(p, narrow, whole, wide) __builtin_convertvector(*(const narrow *)(p), wide)
#endif
INLINE vec widen(const WEIGHT *p) { return WIDEN(p, wvec, uvec, vec); }
INLINE reg widen_reg(const WEIGHT *p) { return WIDEN(p, wreg, ureg, reg); }
INLINE float widen1(const WEIGHT *p) {
#ifdef BFLOAT16
  union {
    unsigned bits;
    float value;
  } u = {(unsigned)*p << 16};
  return u.value;
#else
  return (float)*p;
#endif
}

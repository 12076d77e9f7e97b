// Has runner.c call functions with few and with many arguments, pointers and then numbers, as the
// kernels are, without a C library, so that an emulated processor can run it. Ends with 0 if each
// argument arrived.
#include "runner.c"

#define P4(n) long long *p##n##0, long long *p##n##1, long long *p##n##2, long long *p##n##3
#define V4(n) int v##n##0, int v##n##1, int v##n##2, int v##n##3
#define TOLD(n) (*p##n##0 + *p##n##1 * 3 + *p##n##2 * 5 + *p##n##3 * 7)
#define SUM(n) (v##n##0 + v##n##1 * 3 + v##n##2 * 5 + v##n##3 * 7)

static long long out[1];

static void few(long long *to, long long *p, int v, int core) { *to = *p * 100 + v * 10 + core; }

static void many(long long *to, P4(0), P4(1), P4(2), V4(0), V4(1), V4(2), V4(3), V4(4), int core) {
  *to = TOLD(0) + TOLD(1) * 11 + TOLD(2) * 13 + SUM(0) * 17 + SUM(1) * 19 + SUM(2) * 23 +
        SUM(3) * 29 + SUM(4) * 31 + core;
}

static word caller_of_many(word f, const word *a) {
  (void)f;
  (void)a;
  return 0;
}

static int check(void) {
  static word table[600];
  static struct place place;
  static long long told[12];
  struct call *c = (struct call *)table;
  long long seven = 7;
  *c = (struct call){(word)few, 0, 0, 1, 0, 3, 0, 4};
  c->arguments[0] = (word)out;
  c->arguments[1] = (word)&seven;
  c->arguments[2] = -3;
  run_table(&place, table, 1, 0, 0);
  if (out[0] != 670) return 1;
  long long want = 0, weights[] = {1, 3, 5, 7}, groups[] = {1, 11, 13, 17, 19, 23, 29, 31};
  *c = (struct call){(word)many, 0, 0, 1, 0, 33, 0, 34};
  c->arguments[0] = (word)out;
  for (int i = 0; i < 12; i++) {
    told[i] = 1000 - 77 * i;
    c->arguments[1 + i] = (word)&told[i];
    want += told[i] * weights[i % 4] * groups[i / 4];
  }
  for (int i = 0; i < 20; i++) {
    c->arguments[13 + i] = i * 31 - 200;
    want += (i * 31 - 200) * weights[i % 4] * groups[3 + i / 4];
  }
  c->arguments[33] = 0;
  run_table(&place, table, 1, 0, 0);
  if (out[0] != want) return 2;
  c->caller = (word)caller_of_many;  // then the function itself is not called
  out[0] = 5;
  run_table(&place, table, 1, 0, 1);
  return out[0] == 5 ? 0 : 3;
}

#ifdef HOSTED
int main(void) { return check(); }
#else
void _start(void) {
  register long status __asm__("x0") = check();
  register long number __asm__("x8") = 93;  // exit
  __asm__ volatile("svc 0" : : "r"(status), "r"(number));
  for (;;) {}
}
#endif

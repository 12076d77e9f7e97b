// Runs a table of calls on several threads. It does not know what the called functions compute;
// graph.py writes the table. clang compiles this file with tinygrad's flags, so it is freestanding:
// no header, and no function of the C library except through the pointers that Python hands over.

typedef long long word;

// One for each thread, 64 bytes apart so that no two threads write to the same cache line.
struct bed {
  unsigned ticket;  // how many tables this thread has been asked to run
  int asleep;       // whether the thread waits for its bell
  void *bell;       // a semaphore of the operating system
  word padding[6];
};

// Where the threads of the pool wait for work and for each other.
struct place {
  int arrived;
  int padding1[15];
  unsigned meetings;  // which, as tickets, may go around
  int padding2[15];
  int (*wait)(void *bell, word forever);
  int (*post)(void *bell);
  word *table;  // what the pool is to run; null has its threads end
  int threads, careful;
  word padding3[4];
  struct bed beds[];
};

// A call in the table; the next one follows its arguments, and one without a function ends it.
struct call {
  word function;
  word caller;   // of a function with more arguments than `start` knows: what calls it, else 0
  word first;    // the thread that runs it, or the first of several
  word threads;  // how many threads run it
  word meet;     // whether all threads must have finished what stands before it
  word core_at;  // which argument is the number of the thread, or -1
  word ticks;    // time spent, where PROFILE is defined
  word count;
  word arguments[];
};

static void serve(struct place *place, int id);
static void run(struct place *place, word *table, int threads, int id, int careful);
static void wake(struct place *place, int id);

// The entry. It stands first because tinygrad starts a compiled text at its first byte.
//   id: 0 to run the table on the calling thread and on threads 1 to `threads` - 1 of the pool;
//       above 0 to become that thread of the pool, until the table is null.
//   careful: meet before every call, whatever the table says.
void run_table(struct place *place, word *table, int threads, int id, int careful) {
  if (id > 0) {
    serve(place, id);
    return;
  }
  place->table = table;
  place->threads = threads;
  place->careful = careful;
  for (int i = 1; i < threads; i++) {
    __atomic_store_n(&place->beds[i].ticket, place->beds[i].ticket + 1, __ATOMIC_SEQ_CST);
    wake(place, i);
  }
  if (table) run(place, table, threads, 0, careful);
}

static void wake(struct place *place, int id) {
  struct bed *bed = &place->beds[id];
  if (__atomic_load_n(&bed->asleep, __ATOMIC_SEQ_CST) &&
      __atomic_exchange_n(&bed->asleep, 0, __ATOMIC_SEQ_CST))
    place->post(bed->bell);
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits until *counter is no longer `old`: first by looking at it, then asleep, so that where
// another program has taken a core, the thread that is late gets the one on which this one waits.
static void await(struct place *place, int id, unsigned *counter, unsigned old) {
  struct bed *bed = &place->beds[id];
  for (int turns = 0; turns < SPINS; turns++) {
    if (__atomic_load_n(counter, __ATOMIC_ACQUIRE) != old) return;
    relax();
  }
  while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) == old) {
    __atomic_store_n(&bed->asleep, 1, __ATOMIC_SEQ_CST);
    // The counter may have changed before `asleep` was set; then nobody rings, unless it was seen.
    if (__atomic_load_n(counter, __ATOMIC_SEQ_CST) != old &&
        __atomic_exchange_n(&bed->asleep, 0, __ATOMIC_SEQ_CST))
      return;
    while (place->wait(bed->bell, -1)) {}
  }
}

// Waits until all threads have come here. At the last meeting of a table only thread 0 waits.
static void meet(struct place *place, int threads, int id, int last) {
  if (threads == 1) return;
  unsigned meeting = __atomic_load_n(&place->meetings, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&place->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&place->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&place->meetings, meeting + 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < (last ? 1 : threads); i++)
      if (i != id) wake(place, i);
  } else if (!last || id == 0) {
    await(place, id, &place->meetings, meeting);
  }
}

static void serve(struct place *place, int id) {
  for (unsigned seen = 0;;) {
    unsigned *ticket = &place->beds[id].ticket;
    await(place, id, ticket, seen);
    seen = __atomic_load_n(ticket, __ATOMIC_ACQUIRE);
    if (!place->table) return;
    run(place, place->table, place->threads, id, place->careful);
  }
}

#define F4(m, i) m(i), m(i + 1), m(i + 2), m(i + 3)
#define F8(m, i) F4(m, i), F4(m, i + 4)
#define F16(m, i) F8(m, i), F8(m, i + 8)
#define F32(m, i) F16(m, i), F16(m, i + 16)
#define F64(m, i) F32(m, i), F32(m, i + 32)
#define TYPE(i) word
#define VALUE(i) a[i]
#define CALL(F) ((void (*)(F(TYPE, 0)))f)(F(VALUE, 0))

// In both conventions, System V for x86-64 and the one of Arm for aarch64, the caller puts up the
// arguments and takes them down again, each in a register or a word of the stack, of which an int
// is the low half. So a function may be given more than it takes, and a few sizes do for all.
// (macOS packs arguments on the stack; kernels are compiled for bare Arm, and so is this.)
static void start(word f, const word *a, word count) {
  if (count <= 4) CALL(F4);
  else if (count <= 8) CALL(F8);
  else if (count <= 16) CALL(F16);
  else if (count <= 32) CALL(F32);
  else CALL(F64);
}

static void call(const struct call *c, const word *a) {
  if (c->caller)
    ((void (*)(word, const word *))c->caller)(c->function, a);
  else
    start(c->function, a, c->count);
}

// With arguments of its own for each thread, which differ in the number of the thread.
static __attribute__((noinline)) void call_numbered(const struct call *c, int id) {
  word a[c->count < 64 ? 64 : c->count];
  for (word i = 0; i < c->count; i++) a[i] = c->arguments[i];
  a[c->core_at] = id - c->first;
  call(c, a);
}

static word ticks(void) {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
  word now;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
#else
  return 0;
#endif
}

static void run(struct place *place, word *table, int threads, int id, int careful) {
  for (struct call *c = (struct call *)table; c->function; c = (void *)(c->arguments + c->count)) {
    if (c->meet | careful) meet(place, threads, id, 0);
    if (id < c->first || id >= c->first + c->threads) continue;
#ifdef PROFILE
    word begun = ticks();
#endif
    if (c->threads > 1 && c->core_at >= 0) call_numbered(c, id);
    else call(c, c->arguments);
#ifdef PROFILE
    if (id == c->first) c->ticks += ticks() - begun;
#endif
  }
  meet(place, threads, id, 1);
}

// Walks tables from stdin on threads of pthread, for ThreadSanitizer to watch, and compares with
// their calls one by one. test_graph.py writes the tables: on the first line how many threads and
// how many calls; then for each call its sources, whether it reads what it writes, its first
// thread, its threads, whether it meets, and a buffer and an offset for each part.
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner.c"

enum { BUFFERS = 8, SIZE = 48, THREADS = 8, TURNS = 3 };

static unsigned now[BUFFERS][3 * SIZE], then[BUFFERS][3 * SIZE];

static void mix(unsigned *out, const unsigned *a, const unsigned *b, const unsigned *c, int sources,
                int adds, int threads, int core) {
  const unsigned *from[] = {a, b, c};
  for (int i = core; i < SIZE; i += threads) {
    unsigned x = adds ? out[i] : 7;
    for (int s = 0; s < sources; s++) x = x * 1664525u + from[s][SIZE - 1 - i] + 1013904223u;
    out[i] = x;
  }
}

static int wait_for(void *bell, word forever) {
  (void)forever;
  return sem_wait(bell);
}

static int post(void *bell) { return sem_post(bell); }

static struct place *place;

static void *worker(void *id) {
  run_table(place, 0, 0, (int)(long)id, 0);
  return 0;
}

int main(void) {
  static sem_t bells[THREADS];
  pthread_t threads[THREADS];
  if (posix_memalign((void **)&place, 64, sizeof *place + THREADS * sizeof(struct bed))) return 2;
  memset(place, 0, sizeof *place + THREADS * sizeof(struct bed));
  place->wait = wait_for;
  place->post = post;
  place->meetings = ~0u / 2 - 3;  // as after days: the next ones reach past the largest int
  for (long i = 0; i < THREADS; i++) {
    sem_init(&bells[i], 0, 0);
    place->beds[i].bell = &bells[i];
    if (i) pthread_create(&threads[i], 0, worker, (void *)i);
  }
  int most, calls, tables = 0;
  while (scanf("%d %d", &most, &calls) == 2) {
    word *table = calloc(calls * 17 + 512, sizeof(word)), *at = table;
    for (int i = 0; i < calls; i++) {
      int sources, adds, first, count, meets;
      if (scanf("%d %d %d %d %d", &sources, &adds, &first, &count, &meets) != 5) return 3;
      struct call *c = (struct call *)at;
      *c = (struct call){(word)mix, 0, first, count, meets, 7, 0, 8};
      for (int s = 0; s <= sources; s++) {
        int buffer, offset;
        if (scanf("%d %d", &buffer, &offset) != 2) return 3;
        c->arguments[s] = (word)&now[buffer][offset];
      }
      c->arguments[4] = sources;
      c->arguments[5] = adds;
      c->arguments[6] = count;
      at = c->arguments + c->count;
    }
    for (int i = 0; i < BUFFERS * 3 * SIZE; i++) now[0][i] = then[0][i] = i * 2654435761u;
    for (int turn = 0; turn < TURNS; turn++) {
      run_table(place, table, most, 0, turn == 1);
      for (struct call *c = (struct call *)table; c->function; c = (void *)(c->arguments + 8)) {
        word *a = c->arguments;
        unsigned *part[4];
        for (int s = 0; s < 4; s++)
          part[s] = a[s] ? &then[0][(unsigned *)a[s] - &now[0][0]] : 0;
        for (int core = 0; core < c->threads; core++)
          mix(part[0], part[1], part[2], part[3], a[4], a[5], a[6], core);
      }
      if (memcmp(now, then, sizeof now)) {
        fprintf(stderr, "table %d differs\n", tables);
        return 1;
      }
    }
    tables++;
    free(table);
  }
  run_table(place, 0, THREADS, 0, 0);
  for (int i = 1; i < THREADS; i++) pthread_join(threads[i], 0);
  printf("%d tables\n", tables);
  return 0;
}

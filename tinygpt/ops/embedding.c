// Rows of a table, and the gradient of the table.
#include "vector.h"
#include "weight.h"

// y[i] = table[ids[i]] * scale[ids[i]]; an id that the table does not have gives NaN.
FREE static void embedding(float *y,             // (count, C)
                           const int *ids,       // (count,)
                           const WEIGHT *table,  // (V, C)
                           const float *scale,   // (V,) or absent
                           int core_id, int threads, int count, int V, int C) {
  range rows = share(count, core_id, threads);
  for (long r = rows.first; r < rows.last; r++) {
    long id = ids[r];
    if ((unsigned)ids[r] >= (unsigned)V)
      for (int i = 0; i < C; i++) y[r * C + i] = __builtin_nanf("");
    else {
      float s = scale ? scale[id] : 1;
      for (int i = 0; i < C; i++) y[r * C + i] = widen1(table + id * C + i) * s;
    }
  }
}

// dtable[id] = the sum of dy where ids is id. Each thread has some of the columns, so that no two
// write to the same place.
FREE static void embedding_backward(float *dtable,    // (V, C)
                                    const float *dy,  // (count, C)
                                    const int *ids,   // (count,)
                                    int core_id, int threads, int count, int V, int C) {
  range columns = share_steps(C, 16, core_id, threads);
  for (long id = 0; id < V; id++)
    for (int i = columns.first; i < columns.last; i++) dtable[id * C + i] = 0;
  for (long r = 0; r < count; r++)
    if ((unsigned)ids[r] < (unsigned)V)
      for (int i = columns.first; i < columns.last; i++)
        dtable[(long)ids[r] * C + i] += dy[r * C + i];
}

/* A team of threads that go through one function together, from barrier to barrier.

   Work between two barriers is handed out by a counter, so a thread whose core is busy elsewhere
   takes less of it. Waiting threads spin for a moment, then sleep. */

#ifndef TEAM_H
#define TEAM_H

#include "mora.h"

typedef void (*TeamFunction)(Team *, int thread, void *argument);

Team *team_new(int threads);
void team_free(Team *);
int team_size(const Team *);

/* Calls function(team, thread, argument) on every thread, the caller's being 0; one run at a
   time. */
void team_run(Team *, TeamFunction, void *argument);

/* The next unit of work, from 0; each number is given once between two barriers. */
int team_next(Team *);

/* Waits for all threads; the counter starts at 0 again. */
void team_barrier(Team *);

#endif

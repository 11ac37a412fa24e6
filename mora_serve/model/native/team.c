#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SPINS = 1500, YIELDS = 2000 };

/* A counter that threads wait for. */
typedef struct {
    _Alignas(64) atomic_int value;
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} Gate;

struct Team {
    int threads;
    TeamFunction function;
    void *argument;
    pthread_mutex_t one_run;
    pthread_t *workers;
    int stopping;
    Gate runs;                       /* begun */
    Gate barriers;                   /* passed */
    _Alignas(64) atomic_int next;    /* unit of work */
    _Alignas(64) atomic_int arrived; /* at the barrier */
};

typedef struct {
    Team *team;
    int thread;
} Worker;

static inline void pause_core(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void gate_init(Gate *gate)
{
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

static int passed(Gate *gate, int old)
{
    return atomic_load_explicit(&gate->value, memory_order_acquire) != old;
}

/* Until the counter is no longer `old`. Most waits are short, so a thread spins first. Then it
   yields: it may be on the very core that the thread it waits for needs, and as it stays runnable
   the system sees that two threads share a core and moves one. Only then it sleeps. */
static void gate_wait(Gate *gate, int old)
{
    for (int i = 0; i < SPINS; i++) {
        if (passed(gate, old))
            return;
        pause_core();
    }
    for (int i = 0; i < YIELDS; i++) {
        if (passed(gate, old))
            return;
        sched_yield();
    }
    pthread_mutex_lock(&gate->lock);
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->value) == old)
        pthread_cond_wait(&gate->changed, &gate->lock);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->lock);
}

static void gate_step(Gate *gate)
{
    atomic_fetch_add(&gate->value, 1);
    if (atomic_load(&gate->sleepers)) {
        pthread_mutex_lock(&gate->lock);
        pthread_cond_broadcast(&gate->changed);
        pthread_mutex_unlock(&gate->lock);
    }
}

static void *work(void *argument)
{
    Worker worker = *(Worker *)argument;
    Team *team = worker.team;
    free(argument);
    for (int run = 0;; run++) {
        gate_wait(&team->runs, run);
        if (team->stopping)
            return NULL;
        team->function(team, worker.thread, team->argument);
        team_barrier(team);
    }
}

Team *team_new(int threads)
{
    Team *team = aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
    if (!team)
        return NULL;
    *team = (Team){.threads = 1};
    pthread_mutex_init(&team->one_run, NULL);
    gate_init(&team->runs);
    gate_init(&team->barriers);
    team->workers = calloc(threads > 1 ? threads : 1, sizeof(pthread_t));
    for (int i = 1; i < threads && team->workers; i++) {
        Worker *worker = malloc(sizeof(Worker));
        if (!worker)
            break;
        *worker = (Worker){team, i};
        if (pthread_create(&team->workers[i], NULL, work, worker)) {
            free(worker);
            break; /* fewer threads, the same results */
        }
        team->threads++;
    }
    return team;
}

void team_free(Team *team)
{
    team->stopping = 1;
    gate_step(&team->runs);
    for (int i = 1; i < team->threads; i++)
        pthread_join(team->workers[i], NULL);
    free(team->workers);
    free(team);
}

int team_size(const Team *team)
{
    return team->threads;
}

void team_run(Team *team, TeamFunction function, void *argument)
{
    pthread_mutex_lock(&team->one_run);
    team->function = function;
    team->argument = argument;
    atomic_store(&team->next, 0);
    gate_step(&team->runs);
    function(team, 0, argument);
    team_barrier(team);
    pthread_mutex_unlock(&team->one_run);
}

int team_next(Team *team)
{
    return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
}

void team_barrier(Team *team)
{
    int old = atomic_load(&team->barriers.value);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->threads) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        gate_step(&team->barriers);
    } else {
        gate_wait(&team->barriers, old);
    }
}

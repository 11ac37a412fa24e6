#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SPINS = 4000, YIELDS = 50 };

struct Team {
    int threads;
    TeamFunction function;
    void *argument;
    pthread_mutex_t one_run;
    pthread_mutex_t sleep;
    pthread_cond_t wake;
    pthread_t *workers;
    int stopping;
    _Alignas(64) atomic_int run;      /* number of the run under way */
    _Alignas(64) atomic_int next;     /* work */
    _Alignas(64) atomic_int arrived;  /* at the barrier */
    _Alignas(64) atomic_int passed;   /* barriers */
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

/* Until *value is no longer `old`: spins first, since most waits are short. */
static int changed(atomic_int *value, int old, int yields)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(value, memory_order_acquire) != old)
            return 1;
        pause_core();
    }
    for (int i = 0; yields < 0 || i < yields; i++) {
        if (atomic_load_explicit(value, memory_order_acquire) != old)
            return 1;
        sched_yield();
    }
    return 0;
}

static void *work(void *argument)
{
    Worker worker = *(Worker *)argument;
    Team *team = worker.team;
    free(argument);
    for (int run = 0;;) {
        if (!changed(&team->run, run, YIELDS)) {
            pthread_mutex_lock(&team->sleep);
            while (atomic_load(&team->run) == run)
                pthread_cond_wait(&team->wake, &team->sleep);
            pthread_mutex_unlock(&team->sleep);
        }
        run = atomic_load(&team->run);
        if (team->stopping)
            return NULL;
        team->function(team, worker.thread, team->argument);
        team_barrier(team);
    }
}

static void begin(Team *team)
{
    pthread_mutex_lock(&team->sleep);
    atomic_fetch_add(&team->run, 1);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->sleep);
}

Team *team_new(int threads)
{
    Team *team = aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
    if (!team)
        return NULL;
    *team = (Team){.threads = 1};
    pthread_mutex_init(&team->one_run, NULL);
    pthread_mutex_init(&team->sleep, NULL);
    pthread_cond_init(&team->wake, NULL);
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
    begin(team);
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
    if (team->threads > 1)
        begin(team);
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
    int passed = atomic_load(&team->passed);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->threads) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        atomic_store_explicit(&team->passed, passed + 1, memory_order_release);
    } else {
        changed(&team->passed, passed, -1);
    }
}

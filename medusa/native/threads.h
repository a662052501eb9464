/* The threads of a call, and where they wait for one another. */

#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#if __has_include(<linux/futex.h>) /* not everywhere a part of what comes with a compiler */
#define HAS_FUTEX
#include <limits.h>
#include <linux/futex.h>
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

#include "vectors.h"

#define PATIENCE 20000 /* nanoseconds that a thread waits for others awake */

/* Where the threads of a call wait for one another. */
typedef struct {
    _Alignas(LINE) atomic_int arrived;
    _Alignas(LINE) atomic_int round;
    atomic_int asleep;
} Meeting;

/* One of `threads` threads, and where it meets the others. */
typedef struct {
    int64_t thread, threads;
    Meeting *meeting;
} Team;

#define TEAM(meeting) ((Team){THREAD, THREADS, &(meeting)}) /* within a parallel region */

INLINE void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void sleep_through(Meeting *m, int round)
{
    while (atomic_load(&m->round) == round) {
#ifdef HAS_FUTEX
        atomic_fetch_add(&m->asleep, 1);
        syscall(SYS_futex, &m->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
        atomic_fetch_sub(&m->asleep, 1);
#else
        sched_yield();
#endif
    }
}

/* Go on when all are here. Who waits looks for a moment, since the others are near if they run, and then gives its core away:
   another program may have theirs. Calls end so too, since OpenMP's own end of a region keeps the core much longer. */
static void meet(Team team)
{
    Meeting *m = team.meeting;
    const int round = atomic_load_explicit(&m->round, memory_order_relaxed);
    if (team.threads == 1) return;
    if (atomic_fetch_add(&m->arrived, 1) == team.threads - 1) {
        atomic_store(&m->arrived, 0);
        atomic_store(&m->round, round + 1);
#ifdef HAS_FUTEX
        if (atomic_load(&m->asleep)) syscall(SYS_futex, &m->round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
        return;
    }
    for (const int64_t end = nanoseconds() + PATIENCE; nanoseconds() < end;)
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&m->round, memory_order_acquire) != round) return;
            relax();
        }
    sleep_through(m, round);
}

INLINE void share(int64_t all, Team team, int64_t *first, int64_t *last)
{
    *first = all * team.thread / team.threads;
    *last = all * (team.thread + 1) / team.threads;
}

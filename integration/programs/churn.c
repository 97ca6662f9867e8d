/* churn MIB HOT_MIB OPS_PER_SECOND [mix] [huge] [family]: memory that changes all the time and is checked all the time.
 *
 * Page n of the arena holds mix(n, version[n]) in three places, or zeros for version 0. Pages are written at random within
 * the hot part; with `mix`, chunks are also unmapped, moved, protected, given back and inherited by children; with `huge`
 * they are of huge pages where there are some; with `family` two children that share it all go on like their parent. Any
 * page that does not hold what the table of versions says ends the program: /status (or STATUS, and those of the children
 * with a number behind) says BAD, else how far it has come. SIGUSR1: check all.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 64, WORDS = PAGE / 8 };

static uint64_t **chunk;
static uint32_t *version;
static size_t pages, hot;
static int status;
static volatile sig_atomic_t check_all;
static uint64_t x = 88172645463325252u;
static int huge, family;

static void bad(const char *what, size_t page)
{
    char text[256];
    int n = snprintf(text, sizeof text, "BAD %s page %zu errno %d\n", what, page, errno);
    if (pwrite(status, text, n, 0) != n)
        _exit(3);
    _exit(2);
}

static uint64_t next(void)
{
    return x ^= x << 13, x ^= x >> 7, x ^= x << 17, x;
}

static uint64_t mix(size_t page, uint32_t v)
{
    return v ? (page + 1) * 0x9e3779b97f4a7c15u ^ (uint64_t)v * 0xc2b2ae3d27d4eb4fu : 0;
}

static uint64_t *at(size_t page)
{
    return chunk[page / CHUNK] + page % CHUNK * WORDS;
}

static void check(size_t page)
{
    uint64_t *p = at(page), want = mix(page, version[page]);
    if (p[0] != want || p[WORDS / 2] != want || p[WORDS - 1] != want) {
        char text[128];
        snprintf(text, sizeof text, "contents %lx %lx %lx, not %lx (version %u) at %p", p[0], p[WORDS / 2], p[WORDS - 1], want,
                 version[page], (void *)p);
        bad(text, page);
    }
}

static void put(size_t page)
{
    uint64_t *p = at(page);
    version[page]++;
    p[0] = p[WORDS / 2] = p[WORDS - 1] = mix(page, version[page]);
}

static uint64_t *fresh(void *where)
{
    void *p = mmap(where, CHUNK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (where ? MAP_FIXED : 0), -1, 0);
    if (p == MAP_FAILED)
        bad("mmap", 0);
    if (huge)
        madvise(p, CHUNK * PAGE, MADV_HUGEPAGE);
    return p;
}

static void move_things(void)
{
    size_t c = next() % (pages / CHUNK), first = c * CHUNK;
    switch (next() % 6) {
    case 0: /* unmapped, and new at the same place */
        if (munmap(chunk[c], CHUNK * PAGE))
            bad("munmap", first);
        fresh(chunk[c]);
        memset(version + first, 0, CHUNK * sizeof *version);
        break;
    case 1: /* given back */
        if (madvise(chunk[c], CHUNK * PAGE, MADV_DONTNEED))
            bad("madvise", first);
        memset(version + first, 0, CHUNK * sizeof *version);
        break;
    case 2: { /* moved */
        uint64_t *to = fresh(NULL);
        if (mremap(chunk[c], CHUNK * PAGE, CHUNK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
            bad("mremap", first);
        chunk[c] = to;
        break;
    }
    case 3: /* read-only and back */
        if (mprotect(chunk[c], CHUNK * PAGE / 2, PROT_READ) || mprotect(chunk[c], CHUNK * PAGE / 2, PROT_READ | PROT_WRITE))
            bad("mprotect", first);
        break;
    case 4: /* one half given back */
        if (madvise(chunk[c], CHUNK * PAGE / 2, MADV_DONTNEED))
            bad("madvise", first);
        memset(version + first, 0, CHUNK / 2 * sizeof *version);
        break;
    default: { /* inherited */
        pid_t child = fork();
        if (child < 0)
            bad("fork", 0);
        if (child == 0) {
            for (int i = 0; i < 200; i++) {
                size_t page = next() % pages;
                check(page);
                put(page);
                check(page);
            }
            _exit(0);
        }
        int how;
        while (waitpid(child, &how, 0) != child)
            if (errno != EINTR)
                bad("waitpid", 0);
        if (how != 0)
            _exit(2);
    }
    }
    for (size_t page = first; page < first + CHUNK; page++)
        check(page);
}

static void on_signal(int signal)
{
    (void)signal;
    check_all = 1;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 1;
    pages = strtoul(argv[1], NULL, 10) * 256;
    hot = strtoul(argv[2], NULL, 10) * 256;
    long rate = strtol(argv[3], NULL, 10);
    int moves = 0;
    for (int i = 4; i < argc; i++) {
        moves |= !strcmp(argv[i], "mix");
        huge |= !strcmp(argv[i], "huge");
        family |= !strcmp(argv[i], "family");
    }
    const char *where = getenv("STATUS");
    status = open(where ? where : "/status", O_RDWR | O_CREAT | O_TRUNC, 0644);
    version = calloc(pages, sizeof *version);
    chunk = calloc(pages / CHUNK, sizeof *chunk);
    char *arena = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (status < 0 || !version || !chunk || arena == MAP_FAILED)
        return 1;
    for (size_t c = 0; c < pages / CHUNK; c++)
        chunk[c] = (uint64_t *)(arena + c * CHUNK * PAGE);
    if (huge)
        madvise(arena, pages * PAGE, MADV_HUGEPAGE);
    for (size_t page = 0; page < pages; page++)
        put(page);
    if (family)
        for (int i = 0; i < 2; i++) {
            pid_t child = fork();
            if (child == 0) {
                char name[256];
                snprintf(name, sizeof name, "%s.%d", where ? where : "/status", i);
                status = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);
                x ^= i + 77;
                break;
            }
        }
    signal(SIGUSR1, on_signal);
    struct timespec began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    unsigned checks = 0;
    for (uint64_t ops = 0;; ops++) {
        size_t page = next() % hot;
        check(page);
        put(page);
        if (moves && ops % 512 == 0)
            move_things();
        if (ops % 128 == 0) {
            check(next() % pages);
            char text[128];
            int n = snprintf(text, sizeof text, "ops %020lu checks %010u\n", ops, checks);
            if (ops % 1024 == 0 && pwrite(status, text, n, 0) != n)
                return 3;
            if (check_all) {
                check_all = 0;
                for (size_t p = 0; p < pages; p++)
                    check(p);
                checks++;
            }
            if (rate) {
                clock_gettime(CLOCK_MONOTONIC, &now);
                double ahead = (double)ops / rate - (now.tv_sec - began.tv_sec) - (now.tv_nsec - began.tv_nsec) * 1e-9;
                if (ahead > 0.0005)
                    usleep(ahead * 1e6);
            }
        }
    }
}
